# SPDX-License-Identifier: MIT
"""Benchmarks: every op beside its peers in one run, each checked against float64 (`dalle-fast bench`, `make bench`)."""

from __future__ import annotations

from .rows import Row, room_rows
from .table import failures, line, measure, run, show
from .timing import Timer, Timing, roofs

__all__ = ["Row", "Timer", "Timing", "failures", "line", "measure", "roofs", "room_rows", "run", "show"]
