# SPDX-License-Identifier: MIT
"""The ops. Each is a room of its own: `dalle_fast/ops/<room>` with csrc/<room> behind it."""

from __future__ import annotations

from .linear_cross_entropy import linear_cross_entropy
from .null import null
from .pattern import AttentionPattern

__all__ = [
    "AttentionPattern",
    "linear_cross_entropy",
    "null",
]
