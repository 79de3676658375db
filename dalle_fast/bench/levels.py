# SPDX-License-Identifier: MIT
"""What a lower CPU level costs: each op's first benchmark case at every level that this build and processor have."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from ..ops import _backend
from .rows import all_rooms, room_row
from .timing import Timer


def measure_levels(budget: float = 0.3, only: str = "", say: Callable[[str], None] = print) -> list[dict]:
    """[{"name", "ms": {level: milliseconds}, "error": {level: relative error}, "bound"}], in float32.

    `error` is that of the level against float64 and must not pass `bound`.

    Args:
        budget: seconds of a level of a row.
        only: rooms whose name matches this pattern.
        say: gets a line for each.
    """
    names = {number: name for name, number in _backend.CPU_LEVELS.items()}
    timer, results, before = Timer("cpu", budget), [], _backend._C.cpu_level()
    for room in all_rooms():
        if not room.benchmarks or not re.search(only, room.name):
            continue
        case = room.benchmarks[0]
        backward = room.differentiable and case.differentiable
        result: dict = {"ms": {}, "error": {}}
        try:
            for level in _backend.usable_cpu_levels():
                _backend._C.set_cpu_level(level)
                row = room_row(room, case, torch.float32, backward)
                result["error"][names[level]] = row.error()
                row.ours()
                result["ms"][names[level]] = 1e3 * timer.compare({"ours": row.ours})["ours"].median
        finally:
            _backend._C.set_cpu_level(before)
        results.append({"name": row.name, **result, "bound": row.bound})
        say(line(results[-1]))
    return results


def line(result: dict) -> str:
    """One row for the terminal: milliseconds of each level, and how many times those of the best it takes."""
    best = list(result["ms"].values())[-1]
    parts = [f"{name} {ms:.3f} ({ms / best:.1f}x)" for name, ms in result["ms"].items()]
    return f"{result['name']}, ms: {'  '.join(parts)}"


def wrong_levels(results: list[dict]) -> list[str]:
    """One line for each level of a row whose error passes the bound."""
    return [
        f"{result['name']} at {name}: error {error:.1e} > {result['bound']:.1e}"
        for result in results
        for name, error in result["error"].items()
        if not error <= result["bound"]
    ]
