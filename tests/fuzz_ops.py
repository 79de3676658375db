# SPDX-License-Identifier: MIT
"""make fuzz: random calls of every public op and of AdamW16, right and wrong."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz_ops.py", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, here, and say what came of it")
    parser.add_argument("--target", choices=("all", "ops", "adamw16"), default="all")
    parser.add_argument("--only", default="", help="a pattern of names of ops")
    parser.add_argument("--cpu", default="", help="portable, avx2, avx512, bf16 or amx: no more than that level")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a call may take")
    parser.add_argument("--most", type=int, default=200, help="end at so many failures")
    parser.add_argument("--plain", action="store_true", help="do not look for the shortest call")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # workers are forked: no pool of threads may be there before
    if options.cpu:
        os.environ["DALLE_FAST_CPU"] = options.cpu

    from fuzz.calls import OpTarget
    from fuzz.optimizer import OptimizerTarget
    from fuzz.runner import explain, fuzz

    targets = [OptimizerTarget() if options.target == "adamw16" else OpTarget(options.only)]
    if options.target == "all":
        targets = [OpTarget(options.only), OptimizerTarget()]
    if options.case is not None:
        call = targets[0].make(options.seed, options.case)
        print(call.describe(), flush=True)
        print(call.run())
        return 0
    reports = []
    for target, share in zip(targets, (1.0,) if len(targets) == 1 else (0.9, 0.1)):
        numbers = range(options.first, options.first + int(options.calls * share))
        say = lambda line: print(line, flush=True)  # noqa: E731
        rules = {"limit": options.limit, "most": options.most}
        report = fuzz(target, options.seed, numbers, jobs=options.jobs, say=say, **rules)
        if not options.plain:
            explain(target, report, f"python tests/fuzz_ops.py --target {target.name}", limit=options.limit)
        for failure in report.failures:
            print(f"\n{failure.kind}: {failure.call}\n  {failure.text[-1500:].strip()}\n  {failure.replay}")
        reports.append(report)
    for report in reports:
        print(report.line())
    if options.out:
        options.out.write_text(json.dumps([report.to_json() for report in reports], indent=1) + "\n")
    return 1 if any(report.failures for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
