# SPDX-License-Identifier: MIT
"""Optimizers and schedules."""

from __future__ import annotations

from .adamw16 import AdamW16
from .dion import Dion
from .gradient_scale import ResblockGradScaler
from .schedules import PlateauHalving, cosine, warmup_linear

__all__ = ["AdamW16", "Dion", "PlateauHalving", "ResblockGradScaler", "cosine", "warmup_linear"]
