# SPDX-License-Identifier: MIT
"""Benchmarks: every op beside its peers in one run, each checked against float64 (`dalle-fast bench`, `make bench`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .check import check, records
from .levels import measure_levels, wrong_levels
from .optimizers import adamw_row, optimizer_rows
from .overhead import measure_overheads
from .page import page
from .peak_rates import PEAKS, Peaks, peaks
from .relaxation import relaxation_row, relaxation_rows
from .report import BenchError, compare, load, machine, markdown, save, side_by_side, summary
from .rows import Row, room_rows
from .scaling import measure_curves
from .steps import step_rows
from .table import failures, line, measure, run, show
from .timing import Timer, Timing
from .vocabularies import vocabulary_row, vocabulary_rows


def all_rows(clone: str = "") -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of everything that is timed on a CPU: the rooms' benchmarks, losses, optimizer, training steps.

    `clone` is a folder with DALLE-pytorch, one more peer of a training step.
    """
    yield from room_rows()
    yield from relaxation_rows()
    yield from vocabulary_rows()
    yield from optimizer_rows()
    yield from step_rows(clone=clone)


__all__ = [
    "PEAKS",
    "BenchError",
    "Peaks",
    "Row",
    "Timer",
    "Timing",
    "adamw_row",
    "all_rows",
    "check",
    "compare",
    "failures",
    "line",
    "load",
    "machine",
    "markdown",
    "measure",
    "measure_curves",
    "measure_levels",
    "measure_overheads",
    "optimizer_rows",
    "page",
    "peaks",
    "records",
    "relaxation_row",
    "relaxation_rows",
    "room_rows",
    "run",
    "save",
    "show",
    "side_by_side",
    "step_rows",
    "summary",
    "vocabulary_row",
    "vocabulary_rows",
    "wrong_levels",
]
