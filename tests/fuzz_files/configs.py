# SPDX-License-Identifier: MIT
"""TOML of a config: by --config, and in the folder of a run that goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import tomli_w
import torch
from tiny import clip_config, dalle_config, dvae_config

from dalle_fast import cli
from dalle_fast.models import DALLE, DVAE
from dalle_fast.train import DALLETrainConfig, DVAETrainConfig, load_config

from .base import FileTarget, draw_pictures
from .guard import WATCH
from .mutate import damaged, json_value, replace_entry

run_module = importlib.import_module("dalle_fast.train.run")  # `dalle_fast.train.run` is its function

SMALL = 1_000_000  # parameters: more of them are real work


class Reached(BaseException):
    """The config was taken and real work would begin."""


class ConfigTarget(FileTarget):
    """Whatever stands in config.toml: read, or refused with the file and the key."""

    name = "config"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        source = str(draw_pictures(self.root / "pictures"))
        self.values: dict[str, dict[str, Any]] = {}
        for config in (dvae_config(2), clip_config(2), dalle_config(2)):
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
            kind = run_module.kind_of(config)
            self.values[kind] = {"recipe": kind, **dataclasses.asdict(config)}
        run_module.run(dvae_config(1), self.root / "dvae", quiet=True)

    def names(self, text: str, folder: Path) -> bool:
        # what only the data or the model find out names the key or its value
        keys = ("loop", "model", "data", "dvae", "device", "batch_size", "expected", "not enough memory")
        return str(folder) in text or any(key in text for key in keys)

    def case(self, rng: Random, folder: Path) -> str | None:
        kind = rng.choice(list(self.values))
        file = folder / "config.toml"
        values = _toml_value(json_value(rng, self.values[kind])) if rng.random() < 0.9 else self.values[kind]
        try:
            content = tomli_w.dumps(values if isinstance(values, dict) else {"x": values}).encode("utf-8", "replace")
        except (ValueError, TypeError, RecursionError):
            content = b"[loop]\nsteps = " + b"[" * rng.choice([10, 100, 100_000])
        file.write_bytes(damaged(rng, content) if rng.random() < 0.4 else content)
        if rng.random() < 0.05:
            replace_entry(rng, file)
        with WATCH.off():
            os.symlink(self.root / "dvae", folder / "dvae")  # where a transformer's run looks for it
        way = rng.randrange(4)
        if way == 0 and kind == "dalle":
            return self._plan(rng, file)
        cls, _ = run_module.RECIPES[kind]
        config = load_config(cls, file)
        if way == 1:
            return _dry_run(config)
        return _first_update(config, folder)

    def _plan(self, rng: Random, file: Path) -> str | None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli._plan(["--config", str(file), "--gpus", rng.choice(["1", "8", "64"]), "--link", "25Gbit"])
        return None if out.getvalue() else "plan said nothing"


def _toml_value(value: Any, levels: int = 300) -> Any:
    """Without None, which TOML lacks."""
    if levels == 0:
        return 0
    if isinstance(value, dict):
        return {str(k): _toml_value(v, levels - 1) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_toml_value(v, levels - 1) for v in value if v is not None]
    return value


def _dry_run(config: Any) -> str | None:
    from dalle_fast.estimate import estimate

    return None if estimate(config) else "no estimate"


def _first_update(config: Any, folder: Path) -> str | None:
    with first_update_only():
        try:
            run_module.run(config, folder / "run", quiet=True)
        except Reached:
            return None
    return "the loop was not reached"


@contextlib.contextmanager
def first_update_only() -> Iterator[None]:
    """`run` as it is up to its first update, which is made where the model is small; then Reached."""
    whole_build, whole_run = run_module.build, run_module.Loop.run

    def build(config: Any, run_dir: Path, world: Any = None) -> Any:
        if not _is_small(config):
            raise Reached
        return whole_build(config, run_dir, world)

    def one(loop: Any) -> Any:
        loop.update()
        raise Reached

    run_module.build, run_module.Loop.run = build, one
    try:
        yield
    finally:
        run_module.build, run_module.Loop.run = whole_build, whole_run


def _is_small(config: Any) -> bool:
    if config.loop.batch_size > 64:
        return False
    if isinstance(config, (DVAETrainConfig, DALLETrainConfig)):
        with torch.device("meta"):
            model = DVAE(config.model) if isinstance(config, DVAETrainConfig) else DALLE(config.model)
        pixels = getattr(config.model, "image_size", 1) ** 2
        return sum(p.numel() for p in model.parameters()) <= SMALL and pixels <= 4096
    sizes = config.model
    small = sizes.width <= 64 and sizes.num_layers <= 4 and sizes.image_size <= 64 and sizes.embed_dim <= 1024
    return small and sizes.text_len <= 128 and config.text_vocab_size <= 10**4
