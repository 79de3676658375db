# SPDX-License-Identifier: MIT
"""A run's state in files: copied at once, written in the background, the same at any number of ranks."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import CheckpointError, UserError, shown
from ..models import store
from ..optim import AdamW16, Dion
from ..parallel import pieces
from ..parallel.world import World


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread, while training goes on.

    Args:
        world: its first rank writes; all ranks of the first replica do where parameters are in parts.
        run_dir: the run's folder.
        keep: newest checkpoints to keep.
        on_phase: called with the name of each phase of a save; for tests.
    """

    def __init__(self, world: World, run_dir: Path, keep: int, on_phase: Callable[[str], None] | None = None) -> None:
        self.world, self.run_dir, self.keep = world, run_dir, keep
        self.phase = on_phase or (lambda _: None)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._known: set[str] = set()  # checkpoints that need not be read before older ones are deleted

    def start(self, step: int, files: Mapping[str, Any]) -> Path:
        """Begins to write a checkpoint, when the one before is done. Called by all ranks.

        Args:
            step: it is named after.
            files: file name -> text, a dict of tensors or any JSON value; tensors are copied before this returns.

        Returns:
            The folder to be.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        name = f"step-{step:08d}"
        parent = self.run_dir / "checkpoints"
        in_parts = self.world.num_shards > 1
        if in_parts:
            taken = {file: _frozen(value, pieces.take_piece) for file, value in files.items()}
            work: Callable[[], None] | None = self._in_parts(parent, name, taken)
        elif self.world.is_first:
            copies = {k: _frozen(v, lambda t: pieces.take_piece(t).data) for k, v in files.items()}
            work = lambda: store.save_snapshot(parent, name, copies, self.phase)  # noqa: E731
        else:
            work = None
        if work is not None:
            self._thread = threading.Thread(target=self._run, args=(work, name), name="checkpoint")
            self._thread.start()
        return parent / name

    def _run(self, work: Callable[[], None], name: str) -> None:
        try:
            work()
            self._known.add(name)
            if self.world.is_first:
                store.prune(self.run_dir, self.keep, self._known)
        except OSError as error:  # of another rank
            failed = CheckpointError(f"{self.run_dir}: the checkpoint could not be written ({error.strerror or error})")
            failed.__cause__ = error
            self._error = failed
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; `wait` raises."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: it could not be written.
        """
        self.close()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Returns when nothing is being written, whatever became of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _in_parts(self, parent: Path, name: str, files: dict[str, Any]) -> Callable[[], None]:
        tensors = {file: value for file, value in files.items() if _is_pieces(value)}
        aside = parent / f".{name}.tmp"

        def fill() -> None:
            if self.world.replica == 0:
                for file, value in tensors.items():
                    pieces.fill(aside / file, value)

        def reserve() -> None:
            for file, value in files.items():
                self.phase(f"write {file}")
                if file in tensors:
                    pieces.reserve(aside / file, value)
                else:
                    store.write_atomic(aside / file, value)

        def first() -> None:
            with store.writing(parent, name, self.phase) as (_, entries):
                self._together(reserve)
                self._together(fill)
                for file in files:
                    path = aside / file
                    entries[file] = {"size": path.stat().st_size, "sha256": store.file_hash(path)}

        def other() -> None:
            self._together(lambda: None)
            self._together(fill)

        return first if self.world.is_first else other

    def _together(self, function: Callable[[], None]) -> None:
        """Calls it and waits for all ranks; an OSError of any is raised in all."""
        mine: OSError | None = None
        try:
            function()
        except OSError as error:
            mine = error
        errors: list = [None] * self.world.size
        dist.all_gather_object(errors, mine, group=self.world.saving)
        for error in errors:
            if error is not None:
                raise error


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _is_pieces(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, pieces.Piece) for v in value.values())


def _frozen(value: Any, take: Callable[[torch.Tensor], Any]) -> Any:
    """A copy that training does not change any more: of each tensor what `take` gives, bytes of anything else."""
    return {name: take(t) for name, t in value.items()} if _is_tensors(value) else store.serialize(value)


def find(world: World, run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in the first rank's folder, or None when there is none.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """

    def look() -> tuple[Path | None, list[str]]:
        damaged: list[CheckpointError] = []
        folder = store.find_latest(run_dir, damaged.append)
        if folder is None and damaged:
            raise CheckpointError(
                f"{run_dir}: no checkpoint is whole ({damaged[0]}). To begin anew, choose another folder "
                "or remove this one."
            )
        return folder, [str(error) for error in damaged]

    folder, damaged = world.first(look)
    for error in damaged:
        say(f"passed over: {error}")
    return folder


_STATE = {"step": int, "skipped_in_a_row": int, "window": dict, "last": dict, "optimizer_groups": list, "recipe": dict,
          "data": str}  # fmt: skip
_WINDOW = ("count", "skipped", "replaced", "examined")


def read_state(path: Path) -> dict[str, Any]:
    """What a run keeps beside its tensors.

    Raises:
        CheckpointError: it cannot be read, or a value is none that a run writes; names the key.
    """
    state = store.read_json(path)

    def require(right: bool, key: str, value: Any) -> None:
        if not right:
            raise CheckpointError(f"{path}: {key} is damaged, got {shown(value)}")

    require(isinstance(state, dict), "it", state)
    for key, kind in _STATE.items():
        require(type(state.get(key)) is kind, key, state.get(key))
    for key in ("step", "skipped_in_a_row"):
        require(0 <= state[key] < 2**53, key, state[key])
    window = state["window"]
    require(window.keys() == {*_WINDOW, "sums"}, "window", window)
    for key in _WINDOW:
        require(type(window[key]) is int and 0 <= window[key] < 2**53, f"window.{key}", window[key])
    require(isinstance(window["sums"], dict), "window.sums", window["sums"])
    for key, value in {**window["sums"], **state["last"]}.items():
        require(type(value) in (int, float), key, value)
    require(all(isinstance(group, dict) for group in state["optimizer_groups"]), "optimizer_groups", None)
    return state


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of whoever takes up a part of the state into one that names the file.

    Raises:
        CheckpointError: the body met values that do not fit.
    """
    try:
        yield
    except UserError as error:
        if str(path.parent) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        text = " ".join(str(error).split())[:500]
        raise CheckpointError(f"{path}: does not fit this run ({type(error).__name__}: {text})") from error


# ---- optimizers


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """State tensors by "index.name", and the groups as JSON."""
    state = optimizer.state_dict()
    tensors = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            tensors[f"{index}.{name}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors, json.loads(json.dumps(state["param_groups"]))


def unpack_optimizer(
    world: World, optimizer: torch.optim.Optimizer, path: Path | None, groups: list[dict[str, Any]]
) -> None:
    """Takes up what `pack_optimizer` gave, from a file (None: no state yet).

    Raises:
        CheckpointError: it belongs to other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    if path is not None:
        found = pieces.contents(world, path)
        _check_moments(optimizer, parameters, found, path)
        like = {key: parameters[int(key.split(".", 1)[0])] for key in found}
        for key, value in pieces.read_like(world, path, like).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
    for group, own in zip(groups, optimizer.state_dict()["param_groups"], strict=False):
        group.update({name: tuple(value) for name, value in group.items() if name == "betas"})  # JSON has no tuples
        for name in own.keys() & group.keys() - {"lr"}:  # which every update sets anew
            if type(group[name]) is not type(own[name]):
                expected, got = shown(own[name]), shown(group[name])
                raise CheckpointError(f"the optimizer's state does not fit ({name}: expected {expected}, got {got})")
        group["lr"] = own["lr"]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the optimizer's state does not fit the model ({error})") from error


_MOMENTS: dict[type, dict[str, torch.dtype | None]] = {
    AdamW16: {"step": torch.int64, "mean": torch.uint16, "variance": torch.uint16},
    torch.optim.AdamW: {"step": None, "exp_avg": None, "exp_avg_sq": None},
}
"""Names and dtypes of the state of a parameter; None: floating."""


def _check_moments(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], found: Mapping[str, pieces.Contents], path: Path
) -> None:
    """Raises CheckpointError where a file has not what an optimizer of this kind keeps of these parameters."""
    expected = _MOMENTS.get(type(optimizer), {})
    names: dict[int, set[str]] = {}
    for key, (dtype, shape) in found.items():
        index, _, name = key.partition(".")
        if not (index.isascii() and index.isdigit() and int(index) < len(parameters)):
            raise CheckpointError(f"{path}: {shown(key)} belongs to no parameter")
        names.setdefault(int(index), set()).add(name)
        parameter = parameters[int(index)]
        columns = parameter[0].numel() if parameter.dim() > 1 else 0
        if isinstance(optimizer, Dion) and name == "basis":  # [columns, rank] of a matrix
            fits = len(shape) == 2 and shape[0] == columns and 0 < shape[1] <= min(columns, len(parameter))
        else:
            fits = shape in ((), parameter.shape) and not (
                name != "step" and name in expected and shape != parameter.shape
            )
        if not fits:
            raise CheckpointError(f"{path}: {key}: expected {list(parameter.shape)}, got {list(shape)}")
        wanted = expected.get(name, dtype)
        if dtype != wanted and not (wanted is None and dtype.is_floating_point):
            raise CheckpointError(f"{path}: {key}: expected {wanted or 'floating numbers'}, got {dtype}")
    for index in range(len(parameters)) if names else ():
        if missing := expected.keys() - names.get(index, expected.keys()):
            raise CheckpointError(f"{path}: {index}.{min(missing)} is missing")


def averages(model: nn.Module, ema: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with averaged weights in place of the trained ones."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {**model.state_dict(), **dict(zip(names, ema, strict=True))}
