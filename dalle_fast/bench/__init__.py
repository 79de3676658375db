# SPDX-License-Identifier: MIT
"""Benchmarks: every op beside its peers in one run, each checked against float64 (`dalle-fast bench`, `make bench`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .optimizers import adamw_row, optimizer_rows
from .report import BenchError, compare, load, losses, machine, markdown, page, save
from .rows import Row, room_rows
from .steps import step_rows
from .table import failures, line, measure, run, show
from .timing import Timer, Timing, roofs


def all_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of everything that is timed on a CPU: the rooms' benchmarks, the optimizer, training steps."""
    yield from room_rows()
    yield from optimizer_rows()
    yield from step_rows()


__all__ = [
    "BenchError",
    "Row",
    "Timer",
    "Timing",
    "adamw_row",
    "all_rows",
    "compare",
    "failures",
    "line",
    "load",
    "losses",
    "machine",
    "markdown",
    "measure",
    "optimizer_rows",
    "page",
    "roofs",
    "room_rows",
    "run",
    "save",
    "show",
    "step_rows",
]
