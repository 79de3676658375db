# SPDX-License-Identifier: MIT
"""Optimizers and schedules."""

from __future__ import annotations

from .adamw16 import AdamW16
from .schedules import PlateauHalving, cosine, warmup_linear

__all__ = ["AdamW16", "PlateauHalving", "cosine", "warmup_linear"]
