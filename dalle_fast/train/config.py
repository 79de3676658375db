# SPDX-License-Identifier: MIT
"""What a run is made of: frozen dataclasses, read from and written to TOML; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from ..data.augment import AUGMENTATIONS
from ..errors import ConfigError, require_ints, require_numbers, shown
from ..files import read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
LARGEST = 2**63 - 1
MAX_BYTES = 1 << 20
"""Of a TOML file."""


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions."""

    source: str = "emoji"
    """"emoji", "emoji-styles", "shapes", a folder of pictures with .txt captions, or a WebDataset .tar (a glob for
    several)."""
    split: str = "train"
    """"train", or "all" to train on the held-out combinations too."""
    augment: str = "none"
    """"none", "jitter" (small shifts), or the paper's crops: "stage1" (dVAE, flips too), "stage2" (transformer)."""
    emphasis: str = ""
    """Regular expression: training pairs whose caption it is found in come `emphasis_repeats` times an epoch."""
    emphasis_repeats: int = 3
    """How often; the others come once."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.emphasis)
        except re.error as error:
            raise ConfigError(f"emphasis: expected a regular expression, got {self.emphasis!r} ({error})") from None
        if self.emphasis_repeats < 1:
            raise ConfigError(f"emphasis_repeats: expected at least 1, got {self.emphasis_repeats}")
        if self.augment not in AUGMENTATIONS:
            raise ConfigError(f"augment: expected one of {', '.join(AUGMENTATIONS)}, got {self.augment!r}")
        if self.split not in ("train", "all"):
            raise ConfigError(f"split: expected train or all, got {self.split!r}")


@dataclass(frozen=True)
class LoopConfig:
    """What every recipe shares."""

    steps: int = 1000
    """Updates in all."""
    batch_size: int = 32
    """Samples per update."""
    accumulate: int = 1
    """Parts a batch is worked off in; gradients are those of the whole batch."""
    seed: int = 0
    """Decides initial weights, order, augmentation, noise."""
    precision: str = "auto"
    """"fp32", "bf16" (autocast), "auto" (bf16 where the processor multiplies it fast), or "fp16-resblock": the
    transformer's branches in float16 with a gradient scale for each resblock, as in the paper."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    checkpointing: bool = False
    """Recompute each resblock in the backward pass: less memory, a third more work."""
    shard: int = 1
    """Ranks of a machine that hold one copy of the transformer between them, each a part of every parameter."""
    powersgd_rank: int = 0
    """Rank of the factors that the transformer's gradients travel as between copies, in all shards together; 0 sends
    gradients whole."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0 is no clipping."""
    ema_decay: float = 0.999
    """Decay of the averaged weights; 0 keeps none."""
    ema_every: int = 1
    """Updates between averagings."""
    log_every: int = 20
    """Updates between lines of metrics.jsonl."""
    log_histograms: int = 0
    """Updates between exponent histograms of the transformer's gradients, in metrics.jsonl and gradients.png; 0 is
    never."""
    sample_every: int = 500
    """Updates between pictures and held-out losses; 0 is never."""
    save_every: int = 500
    """Updates between checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep, at least 2."""
    max_skipped: int = 20
    """Updates in a row that may be skipped for gradients that are not finite; with fp16-resblock, 125 more, and the
    count begins anew whenever a scale falls."""
    max_replaced: float = 0.1
    """Share of the samples between two log lines that may be unreadable and replaced; more of them stop the run."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "shard", "ema_every", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        counts = ("sample_every", "log_histograms", "keep", "max_skipped", "seed", "powersgd_rank")
        require_numbers(self, clip_norm=(0, math.inf), **dict.fromkeys(counts, (0, LARGEST)))
        require_ints(self, **dict.fromkeys(("steps", "batch_size", "shard", "ema_every", "log_every"), LARGEST))
        if self.batch_size % self.accumulate:
            raise ConfigError(f"accumulate: expected a divisor of batch_size {self.batch_size}, got {self.accumulate}")
        if self.powersgd_rank % self.shard:
            raise ConfigError(f"powersgd_rank: expected a multiple of shard {self.shard}, got {self.powersgd_rank}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16-resblock"):
            raise ConfigError(f"precision: expected auto, fp32, bf16 or fp16-resblock, got {self.precision!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device: expected auto, cpu or cuda, got {self.device!r}")
        if not 0 <= self.max_replaced <= 1:
            raise ConfigError(f"max_replaced: expected a share from 0 to 1, got {self.max_replaced}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")

    def refuse_transformer_options(self, kind: str) -> None:
        """For the other stages.

        Raises:
            ConfigError: an option is for the transformer.
        """
        for name, value in (("shard", 1), ("powersgd_rank", 0)):
            if getattr(self, name) != value:
                raise ConfigError(f"loop.{name}: is for dalle; expected {value} for {kind}")
        if self.precision == "fp16-resblock":
            raise ConfigError(f"loop.precision: fp16-resblock is for dalle; expected auto, fp32 or bf16 for {kind}")
        if self.log_histograms:
            raise ConfigError(f"loop.log_histograms: counts gradients of dalle; expected 0 for {kind}")


def require_betas(betas: tuple[float, float]) -> None:
    """Of AdamW.

    Raises:
        ConfigError: one is not in [0, 1).
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas: expected two numbers in [0, 1), got {betas}")


def with_steps(config: T, steps: int) -> T:
    """The same run stretched to `steps` updates: every field that ends in `_steps` scales along."""
    factor = steps / config.loop.steps
    scaled = {
        field.name: max(1, round(getattr(config, field.name) * factor))
        for field in dataclasses.fields(config)
        if field.name.endswith("_steps")
    }
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps), **scaled)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Builds a config dataclass.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type; the message names it.
    """
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        path = shown(f"{where}.{key}" if where else key)[1:-1]
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(hints)}"
            raise ConfigError(f"{path}: no such key{hint}")
        arguments[key] = _convert(hints[key], value, path)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a table, got {shown(value)}")
        return from_dict(kind, value, path)
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise ConfigError(f"{path}: expected {len(items)} values, got {shown(value)}")
        return tuple(_convert(item, v, path) for item, v in zip(items, value, strict=True))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and abs(value) > LARGEST:  # an int of 400 digits is no float
        raise ConfigError(f"{path}: expected a number of at most {LARGEST}, got {shown(value)}")
    if kind is float and number:
        return float(value)
    odd = isinstance(kind, types.GenericAlias) or not isinstance(value, kind)
    if odd or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {getattr(kind, '__name__', kind)}, got {shown(value)}")
    return value


def load_config(cls: type[T], path: Path | str) -> T:
    """Reads a TOML file.

    Raises:
        ConfigError: not there, not TOML, or a key or value that does not fit; the message names the file.
    """
    try:
        values = tomllib.loads(read_bytes(path, MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error.strerror or error})") from error
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path}: cannot be read as TOML ({' '.join(str(error).split())[:500]})") from error
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as TOML (nested too deeply)") from None
    values.pop("recipe", None)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def save_config(config: Any, path: Path | str, recipe: str) -> None:
    """Writes a TOML file that `load_config` reads back equal."""
    from ..models.store import write_atomic

    write_atomic(Path(path), tomli_w.dumps({"recipe": recipe, **dataclasses.asdict(config)}).encode())


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of two configs of one class."""
    found = []
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        path = f"{where}.{field.name}" if where else field.name
        if dataclasses.is_dataclass(a):
            found += differences(a, b, path)
        elif a != b:
            found.append((path, a, b))
    return found
