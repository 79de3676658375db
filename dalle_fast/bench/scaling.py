# SPDX-License-Identifier: MIT
"""Curves: time against tokens, codes, rank, samples, parameters and threads, ours and the peers'."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

from .optimizers import adamw_row
from .rows import Row, all_rooms, quick_peers, room_row
from .timing import Timer

PARAMETERS = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
# ops by threads: one bound by products, one by arithmetic, two by memory, one by short chains of work
THREADED = ("sparse_attention", "gumbel_softmax", "linear_cross_entropy", "householder", "powersgd")


def curves() -> Iterator[tuple[str, str, list[tuple[int, Callable[[], Row]]], bool]]:
    """(name, what grows, [(its value, maker)], whether it is the number of threads)."""
    for room in all_rooms():
        for unit, cases in room.curves.items():
            backward = room.differentiable
            name = f"{room.name} {unit} float32{' forward+backward' if backward else ''}"
            points = [
                (size, lambda r=room, c=case, b=backward: room_row(r, c, torch.float32, b))
                for size, case in cases.items()
            ]
            yield name, unit, points, False
    points = [(count, lambda n=count: adamw_row(f"{n}", [(n,)])) for count in PARAMETERS]
    yield "AdamW16 parameters", "parameters", points, False
    most = torch.get_num_threads()
    threads = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
    makers = [
        (room.name, lambda r=room: room_row(r, r.benchmarks[0], torch.float32, False))
        for room in all_rooms()
        if room.name in THREADED
    ]
    makers.append(("AdamW16", lambda: adamw_row("16M", [(1 << 24,)])))
    for name, make in makers:
        yield f"{name} threads", "threads", [(count, make) for count in threads], True


def measure_curves(budget: float = 0.5, only: str = "", say: Callable[[str], None] = print) -> list[dict]:
    """[{"name", "unit", "points": [{"x", "ours_ms", "peers": {name: ms}}]}], medians; `budget` seconds a function."""
    timer, results = Timer("cpu", budget), []
    for name, unit, points, by_threads in curves():
        if not re.search(only, name):
            continue
        curve = {"name": name, "unit": unit, "points": []}
        for x, make in points:
            with _threads(x) if by_threads else contextlib.nullcontext():
                row = make()
                functions = {"ours": row.ours, **quick_peers(row)}
                for function in functions.values():
                    function()
                times = {key: 1e3 * timing.median for key, timing in timer.compare(functions).items()}
            curve["points"].append({"x": x, "ours_ms": times.pop("ours"), "peers": times})
        results.append(curve)
        say(line(curve))
    return results


def line(curve: dict) -> str:
    """One curve for the terminal: milliseconds and the ratio to the best peer at each point."""
    parts = []
    for point in curve["points"]:
        best = min(point["peers"].values(), default=None)
        ratio = f" ({best / point['ours_ms']:.2f}x)" if best else ""
        parts.append(f"{point['x']}: {point['ours_ms']:.3f}{ratio}")
    return f"{curve['name']}, ms: {'  '.join(parts)}"


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
