# SPDX-License-Identifier: MIT
"""One training loop and a recipe for each stage."""

from __future__ import annotations

from .clip import CLIPTrainConfig
from .config import DataConfig, LoopConfig, load_config, save_config, with_steps
from .dalle import DALLETrainConfig
from .dvae import DVAETrainConfig
from .loop import Interrupted, RunResult
from .run import RECIPES, run

__all__ = [
    "RECIPES",
    "CLIPTrainConfig",
    "DALLETrainConfig",
    "DVAETrainConfig",
    "DataConfig",
    "Interrupted",
    "LoopConfig",
    "RunResult",
    "load_config",
    "run",
    "save_config",
    "with_steps",
]
