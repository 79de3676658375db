# SPDX-License-Identifier: MIT
"""Trains the small system that ships in the package, evaluates it and writes it as 16-bit weights: `make pretrained`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from .data import open_dataset
from .errors import ConfigError
from .presets import preset
from .train import run
from .train.config import save_config
from .train.loop import Loop, RunResult
from .train.patches import PatchCodes, PatchDALLERecipe, PatchDVAERecipe, fit_codes
from .train.run import device_of, seeded

STAGES = ("codes", "dvae", "clip", "dalle")
SOURCE = "emoji-styles"


def _codes(run_dir: Path) -> PatchCodes:
    """The clusters of the run; found when there are none yet."""
    config = preset("dvae", SOURCE)
    path = run_dir / "codes.safetensors"
    if not path.exists():
        dataset = open_dataset(config.data.source, config.data.split, config.model.image_size)
        PatchCodes(fit_codes(dataset, config.model, config.loop.seed), config.model.downsampling).save(path)
    return PatchCodes.load(path, config.model.downsampling)


def train_stage(stage: str, run_dir: Path | str, steps: int | None = None, quiet: bool = False) -> RunResult | None:
    """Trains a stage of the system, or goes on with it.

    Args:
        stage: "codes", "dvae", "clip" or "dalle"; the later ones find the codes if there are none.
        run_dir: folder of all of them.
        steps: updates in all; None: the preset's.
        quiet: print nothing.

    Raises:
        ConfigError: no such stage.
        DataError, CheckpointError, TrainingError, Interrupted: see `train.run`.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    run_dir = Path(run_dir)
    codes = _codes(run_dir)
    if stage == "codes":
        return None
    config = preset(stage, SOURCE)
    if steps is not None:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))
    folder = run_dir / stage
    if stage == "clip":
        return run(config, folder, quiet=quiet)
    device = device_of(config.loop.device)
    with seeded(config.loop.seed):
        if stage == "dvae":
            recipe = PatchDVAERecipe(config, device, codes)
        else:
            recipe = PatchDALLERecipe(config, device, codes, run_dir / "dvae")
    loop = Loop(recipe, folder, quiet=quiet)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.toml", stage)
    return loop.run()


def main(args: list[str] | None = None) -> None:
    """`python -m dalle_fast.pretrain`."""
    parser = argparse.ArgumentParser(prog="python -m dalle_fast.pretrain", description=__doc__)
    parser.add_argument("--run", default="runs/pretrained", help="folder; the same command goes on with what is there")
    parser.add_argument("--stage", default="all", help=f"all, or one of {', '.join(STAGES)}")
    parser.add_argument("--steps", type=int, help="updates of the one stage in place of the preset's")
    arguments = parser.parse_args(args)
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        train_stage(stage, arguments.run, arguments.steps)


if __name__ == "__main__":
    main()
