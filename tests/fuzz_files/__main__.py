# SPDX-License-Identifier: MIT
"""`python tests/fuzz_files`: every target for some minutes of processor time; `--case` repeats one of its cases."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run by the folder's name; a package `tests` of others may lie in site-packages
    sys.path[0] = str(Path(__file__).parents[1])
    __package__ = "fuzz_files"

import torch
from fuzz.runner import Report, explain, fuzz

from .base import FileTarget
from .checkpoints import CheckpointTarget
from .command import CommandTarget
from .configs import ConfigTarget
from .data import DataTarget, PictureTarget
from .logs import LogTarget
from .text import BenchTarget, TokenizerTarget

TARGETS: dict[str, type[FileTarget]] = {
    cls.name: cls
    for cls in (
        ConfigTarget,
        CheckpointTarget,
        TokenizerTarget,
        DataTarget,
        PictureTarget,
        LogTarget,
        BenchTarget,
        CommandTarget,
    )
}
ROUND = 500  # cases between two looks at the clock


def fuzz_for(target: FileTarget, seed: int, first: int, seconds: float, most: int = 50) -> Report:
    """Rounds of cases until they have taken `seconds` of processor time."""
    whole, began, number = Report(target.name, seed), _children_time(), first
    size = 8
    while _children_time() - began < seconds and len(whole.failures) < most:
        report = fuzz(target, seed, range(number, number + size), limit=target.seconds, most=most, say=_say)
        number, size = number + size, min(2 * size, ROUND)
        whole.counts.update(report.counts)
        whole.failures += report.failures
        whole.seconds += report.seconds
    return whole


def _children_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz_files", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="one target, or several; all")
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time for each target")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="only this one, in this process: what it raises is shown")
    parser.add_argument("--json", help="write the reports to this file")
    arguments = parser.parse_args(args)
    torch.set_num_threads(1)
    reports = []
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as folder:
        for name in arguments.target or TARGETS:
            target = TARGETS[name](Path(folder))
            if arguments.case is not None:
                print(target.make(arguments.seed, arguments.case).run())
                continue
            report = fuzz_for(target, arguments.seed, arguments.first, 60 * arguments.minutes)
            explain(target, report, f"python tests/fuzz_files --target {name}", limit=target.seconds, most=10)
            for failure in report.failures:
                print(f"\n{failure.kind}: {failure.replay or failure.number}\n{failure.text}")
            _say(report.line())
            reports.append(report.to_json())
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(reports, indent=1) + "\n")
    return any(report["failures"] for report in reports)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
