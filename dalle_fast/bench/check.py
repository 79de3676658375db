# SPDX-License-Identifier: MIT
"""Holds the ratios of a run against recorded ones: ratios only, never times, and what fails is measured again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from .report import BenchError, load

ALLOWED = 0.7  # of a recorded ratio: what is below is a loss and no noise
ATTEMPTS = 3  # a neighbour on the machine may spoil one measurement, hardly three in a row
MACHINE = ("device", "cpu_level", "threads")

Ratios = dict[tuple[str, str], float]


def ratios_of(report: dict) -> Ratios:
    """(row, peer) -> ratio of the best times: a busy neighbour moves medians of some rounds, hardly all of them."""
    return {
        (row["name"], name): peer["best_ms"] / row["best_ms"]
        for row in report["table"]["rows"]
        for name, peer in row["peers"].items()
        if isinstance(peer, dict)
    }


def records(path: str | Path) -> list[dict]:
    """The result in a file, or all of a CPU in a folder, newest first; other files there are passed over.

    Raises:
        BenchError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return [load(path)]
    found = []
    for file in path.glob("*.json"):
        with contextlib.suppress(BenchError):
            found.append(load(file))
    found = [report for report in found if "gpu" not in report["machine"]]
    if not found:
        raise BenchError(f"{path}: no benchmark result of a CPU in this folder")
    return sorted(found, key=lambda report: report.get("date", ""), reverse=True)


def least_ratios(recorded: list[dict], machine: dict) -> tuple[Ratios, str]:
    """What each ratio must not fall below, and in words what it is derived from.

    On a machine that has a record: ALLOWED of the newest one. Elsewhere how far we lead is the peer's affair (MKL's
    generator of random numbers is fast on Intel alone, other parts of it too), and a lead of 16 that is 3 there is no
    loss. But what no recorded machine has seen is a peer ahead of us: so there it is ALLOWED of the smallest recorded
    ratio, and of 1 where that is a lead. A kernel that became some times slower falls below this on any machine.
    """
    own = [r for r in recorded if all(r["machine"].get(name) == machine.get(name) for name in MACHINE)]
    if own:
        least = {key: ALLOWED * ratio for key, ratio in ratios_of(own[0]).items()}
        return least, f"{ALLOWED} of the record of {own[0].get('date', 'an unknown day')[:10]} on such a machine"
    least = {}
    for report in recorded:
        for key, ratio in ratios_of(report).items():
            least[key] = min(least.get(key, ALLOWED), ALLOWED * ratio)
    here = ", ".join(str(machine.get(name)) for name in MACHINE)
    return least, f"no record of a machine like this ({here}): {ALLOWED}, or {ALLOWED} of the smallest ratio recorded"


def check(
    report: dict, recorded: list[dict], again: Callable[[str], dict], say: Callable[[str], None] = print
) -> list[str]:
    """Ratios of `report` that stay below what is allowed in each of `ATTEMPTS` measurements, as lines to print.

    Args:
        report: a run's result.
        recorded: results to hold it against.
        again: measures the row of this name once more.
        say: gets a line for each new attempt.

    Raises:
        BenchError: no ratio is in both, so that nothing would be checked.
    """
    least, rule = least_ratios(recorded, report["machine"])
    now = {key: ratio for key, ratio in ratios_of(report).items() if key in least}
    if not now:
        raise BenchError("no ratio of this run is in a record: nothing to check")
    say(f"checking {len(now)} ratios: {rule}")
    for attempt in range(2, ATTEMPTS + 1):
        for name in sorted({row for (row, peer), ratio in now.items() if ratio < least[row, peer]}):
            say(f"attempt {attempt}: {name}")
            repeated = ratios_of({"table": {"rows": [again(name)]}})
            now |= {key: max(ratio, now[key]) for key, ratio in repeated.items() if key in now}
    return [
        f"{row} against {peer}: {ratio:.2f}, must be {least[row, peer]:.2f} or more"
        for (row, peer), ratio in now.items()
        if ratio < least[row, peer]
    ]
