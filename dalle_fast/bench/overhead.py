# SPDX-License-Identifier: MIT
"""What a call costs when there is nothing to compute: each op at its smallest size beside torch's nearest."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator

import torch

from .optimizers import adamw_row
from .rows import Call, all_rooms, quick_peers, room_row

REPEATS, REPEAT_SECONDS = 9, 0.01


def overhead_rows() -> Iterator[tuple[str, Call, dict[str, Call]]]:
    """(name, ours, peers) of every op that has a case "one"; forward alone."""
    for room in all_rooms():
        if room.name == "adamw16":  # its public face is the optimizer
            continue
        case = next(case for case in room.cases if case.name == "one")
        row = room_row(room, case, torch.float32, False)
        yield room.name, row.ours, quick_peers(row)
    for count in (1, 100):
        row = adamw_row(f"{count} x 1", [(1,)] * count)
        yield row.name, row.ours, quick_peers(row)


def measure_overheads(only: str = "", say: Callable[[str], None] = print) -> list[dict]:
    """Microseconds of a call, the least of some interleaved repeats: [{"name", "ours_us", "peers": {name: us}}]."""
    results = []
    for name, ours, peers in overhead_rows():
        if not re.search(only, name):
            continue
        calls = {"ours": ours, **peers}
        counts = {key: max(1, int(REPEAT_SECONDS / max(_seconds(call, 10), 1e-9))) for key, call in calls.items()}
        best = dict.fromkeys(calls, math.inf)
        for _ in range(REPEATS):
            for key, call in calls.items():
                best[key] = min(best[key], _seconds(call, counts[key]))
        best = {key: 1e6 * seconds for key, seconds in best.items()}
        results.append({"name": name, "ours_us": best.pop("ours"), "peers": best})
        against = ", ".join(f"{peer} {us:.1f}" for peer, us in best.items())
        say(f"{results[-1]['ours_us']:9.1f} us a call  {name}  ({against})")
    return results


def _seconds(call: Call, count: int) -> float:
    """Of one call among `count`."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
