# SPDX-License-Identifier: MIT
"""The ops. Each is a room of its own: `dalle_fast/ops/<room>` with csrc/<room> behind it."""

from __future__ import annotations

from .null import null

__all__ = [
    "null",
]
