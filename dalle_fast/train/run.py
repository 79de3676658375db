# SPDX-License-Identifier: MIT
"""`run`: a config and a folder in, a trained stage out; the same call goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, TrainingError, shown
from ..parallel.world import World
from .clip import CLIPRecipe, CLIPTrainConfig
from .config import differences, load_config, save_config, with_steps
from .dalle import DALLERecipe, DALLETrainConfig
from .dvae import DVAERecipe, DVAETrainConfig
from .loop import Loop, RunResult
from .recipe import Recipe

RECIPES: dict[str, tuple[type, type[Recipe]]] = {
    "dvae": (DVAETrainConfig, DVAERecipe),
    "clip": (CLIPTrainConfig, CLIPRecipe),
    "dalle": (DALLETrainConfig, DALLERecipe),
}
# What may change between the sessions of a run without changing what it computes.
_FREE = {"dvae", "loop.shard"} | {
    f"loop.{name}"
    for name in ("save_every", "keep", "sample_every", "log_histograms", "device", "max_replaced", "max_skipped")
}


def device_of(name: str) -> torch.device:
    """ "auto" | "cpu" | "cuda" -> device.

    Raises:
        ConfigError: another name, or CUDA is asked for and not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {shown(name)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here; `dalle-fast doctor` says why")
    return torch.device(name)


def join(config: Any) -> World:
    """The ranks that a config is trained by."""
    loop = config.loop
    return World.join(device_of(loop.device).type, loop.shard, alone=loop.powersgd_rank > 0)


def build(config: Any, run_dir: Path, world: World | None = None) -> Recipe:
    """The recipe of a config, with weights that depend on its seed alone."""
    _, recipe = RECIPES[kind_of(config)]
    device = device_of(config.loop.device)
    world = world or join(config)
    with seeded(config.loop.seed):
        if recipe is DALLERecipe:
            return DALLERecipe(config, device, world, config.dvae or run_dir.parent / "dvae")
        return recipe(config, device, world)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator begins at `seed` in the block, and is as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def kind_of(config: Any) -> str:
    """ "dvae", "clip" or "dalle"."""
    for kind, (cls, _) in RECIPES.items():
        if isinstance(config, cls):
            return kind
    raise ConfigError(f"config: expected one of {', '.join(RECIPES)}, got {type(config).__name__}")


def steps_for(config: Any, run_dir: Path, minutes: float, world: World | None = None) -> int:
    """How many updates fit in some minutes here, measured on a throw-away copy."""
    world = world or join(config)
    recipe = world.each(lambda: build(config, run_dir, world))
    loop = Loop(recipe, run_dir, quiet=True)
    times = []
    deadline = time.monotonic() + min(0.05 * minutes * 60, 20)
    while len(times) < 8 or (len(times) < 200 and world.first(lambda: time.monotonic() < deadline)):
        begin = time.monotonic()
        loop.update()
        times.append(time.monotonic() - begin)
    warm = sorted(times[len(times) // 3 :])
    mean = sum(warm) / len(warm)
    return world.first(lambda: max(10, int(minutes * 60 / mean)))


def run(
    config: Any,
    run_dir: Path | str,
    *,
    minutes: float | None = None,
    resume: bool = True,
    quiet: bool = False,
    on_phase: Callable[[str], None] | None = None,
) -> RunResult:
    """Trains a stage in a folder, or goes on with it.

    Args:
        config: DVAETrainConfig, CLIPTrainConfig or DALLETrainConfig.
        run_dir: the run's folder.
        minutes: stretch or shrink the run to about this time on this machine; measured when it begins, and written
            into config.toml, so that a resumed run is the same run.
        resume: go on with what is there; False refuses a folder that holds a run.
        quiet: print nothing.
        on_phase: called with the name of each phase of a save; for tests.

    Raises:
        ConfigError: the folder holds a run with another config.
        CheckpointError, DataError, TrainingError: see there.
        Interrupted: after SIGINT or SIGTERM; the run is saved.
    """
    run_dir = Path(run_dir)
    world = join(config)
    try:
        config = world.first(lambda: _agreed(config, run_dir, minutes, resume))
        if minutes is not None and not world.first((run_dir / "config.toml").exists):
            config = with_steps(config, steps_for(config, run_dir, minutes, world))
        recipe = world.each(lambda: build(config, run_dir, world))
        loop = Loop(recipe, run_dir, quiet=quiet, on_phase=on_phase)
        world.first(lambda: _store(config, run_dir))
        return loop.run()
    except OSError as error:  # something in the way in the run's folder, a full disk
        raise TrainingError(f"{error.filename or run_dir}: {error.strerror or error}") from error
    finally:
        world.leave()


def _store(config: Any, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.toml", kind_of(config))


def _agreed(config: Any, run_dir: Path, minutes: float | None, resume: bool) -> Any:
    """The config to train: of a folder that holds a run, what it holds, if that is the same run."""
    if minutes is not None and not 0 < minutes < 1e7:
        raise ConfigError(f"minutes: expected more than 0, got {minutes}")
    stored = run_dir / "config.toml"
    if not stored.exists():
        return config
    if not resume:
        raise ConfigError(f"{run_dir}: holds a run already; choose another folder or let it resume")
    before = load_config(type(config), stored)
    if minutes is not None:
        config = with_steps(config, before.loop.steps)
    for key, old, new in differences(before, config):
        longer = key == "loop.steps" and minutes is None
        if key not in _FREE and not longer:
            raise ConfigError(
                f"{key}: this folder's run has {old!r}, now {new!r} is asked for ({stored}); "
                "choose another run folder or the old value"
            )
    return config
