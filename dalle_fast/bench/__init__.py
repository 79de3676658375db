# SPDX-License-Identifier: MIT
"""Benchmarks: every op beside its peers in one run, each checked against float64 (`dalle-fast bench`, `make bench`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .dalle_pytorch import dalle_pytorch_rows
from .optimizers import adamw_row, optimizer_rows
from .report import BenchError, compare, load, losses, machine, markdown, page, save
from .rows import Row, room_rows
from .steps import step_rows
from .table import failures, line, measure, run, show
from .timing import Timer, Timing, roofs
from .vocabularies import vocabulary_row, vocabulary_rows


def all_rows(dalle_pytorch: str = "") -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of everything that is timed on a CPU: the rooms' benchmarks, losses, optimizer, training steps.

    `dalle_pytorch`: folder of a clone of lucidrains/DALLE-pytorch, whose training step is then a peer.
    """
    yield from room_rows()
    yield from vocabulary_rows()
    yield from optimizer_rows()
    yield from step_rows()
    if dalle_pytorch:
        yield from dalle_pytorch_rows(dalle_pytorch)


__all__ = [
    "BenchError",
    "Row",
    "Timer",
    "Timing",
    "adamw_row",
    "all_rows",
    "compare",
    "dalle_pytorch_rows",
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
    "vocabulary_row",
    "vocabulary_rows",
]
