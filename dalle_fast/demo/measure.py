# SPDX-License-Identifier: MIT
"""What each stage costs on this machine: a few updates of throw-away copies."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..sample import SampleOptions, System
from ..train.loop import Loop
from ..train.recipe import Recipe
from ..train.run import build
from .plan import STAGES, StageCost

_MIN_UPDATES = 2


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.monotonic()
    result = call()
    return result, time.monotonic() - begin


def _update_seconds(loop: Loop, limit: float) -> float:
    """The median; what comes in between is not the stage's."""
    times: list[float] = []
    while len(times) < _MIN_UPDATES or (sum(times) < limit and len(times) < 50):
        times.append(_timed(loop.update)[1])
    return sorted(times)[len(times) // 2]


def measure(
    configs: Mapping[str, Any], options: SampleOptions, limit: float = 2.0
) -> tuple[dict[str, StageCost], float]:
    """Costs of the stages, and seconds for sampling one caption.

    Args:
        configs: stage -> train config; "dvae", "clip" and "dalle".
        options: how a caption is sampled.
        limit: seconds of updates in each stage, at least two updates.
    """
    costs: dict[str, StageCost] = {}
    recipes: dict[str, Recipe] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            run_dir = Path(folder) / stage

            def start(config: Any = configs[stage], run_dir: Path = run_dir) -> Loop:
                loop = Loop(build(config, run_dir), run_dir, quiet=True)
                loop.update()
                return loop

            loop, setup = _timed(start)
            update = _update_seconds(loop, limit)
            with torch.no_grad(), loop.averaged():
                look = _timed(loop.recipe.evaluate)[1] + _timed(loop.recipe.pictures)[1]
            costs[stage] = StageCost(setup, update, look, loop.config.batch_size)
            recipes[stage] = loop.recipe
            if stage == "dvae":  # the transformer reads it from its folder
                loop.save()
                loop.writer.wait()
            loop.writer.close()
        model = recipes["dalle"].model
        system = System(recipes["dvae"].model, model, recipes["clip"].model.eval(), model.tokenizer)
        caption = recipes["dalle"].dataset.captions[0]
        system.sample(caption, options)
        _, seconds = _timed(lambda: system.sample(caption, options))
    return costs, seconds
