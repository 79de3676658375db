# SPDX-License-Identifier: MIT
"""Puts the numbers and pictures of a finished demo into docs:   python -m benchmarks.demo_page runs/demo"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from dalle_fast.bench.peak_rates import cpu_name
from dalle_fast.demo.plan import NAMES, STAGES, Plan
from dalle_fast.evaluate import judge_table
from dalle_fast.train.report import read_lines

DOCS = Path(__file__).parent.parent / "docs"
BEGIN = "<!-- from a run of the demo: python -m benchmarks.demo_page runs/demo -->"
END = "<!-- end of what the command writes -->"


def _table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _losses(numbers: dict[str, Any]) -> list[list[str]]:
    splits = [split for split in ("seen", "heldout") if split in numbers]
    wanted = {
        "mse": ("reconstruction, mean squared error", ".4f"),
        "variance_of_pixels": ("variance of the pixels", ".3f"),
        "codes_used": ("codes in use", "d"),
        "image_loss": ("image-token loss, nats per token", ".3f"),
        "clip_best_of": ("CLIP score of the best of 1, 2, 4, 8", ".2f"),
        "clip_of_originals": ("CLIP score of the originals", ".2f"),
    }
    rows = [["", *(split.replace("heldout", "held out") for split in splits)]]
    for key, (label, form) in wanted.items():
        if key not in numbers[splits[0]]:
            continue
        values = [numbers[split][key] for split in splits]
        lists = [list(v.values()) if isinstance(v, dict) else [v] for v in values]
        rows.append([label, *(" ".join(format(x, form) for x in each) for each in lists)])
    return rows


def page(run_dir: Path, machine: str) -> str:
    """What stands between the two marks of docs/demo.md."""
    plan = Plan.load(run_dir)
    if plan is None:
        raise SystemExit(f"{run_dir}: no plan.json; run `dalle-fast demo --run {run_dir}` first")
    numbers = json.loads((run_dir / "evaluation.json").read_text())
    lines = [f"{machine}. Before it began it said:", "", "```", plan.describe(), "```", ""]
    stages = [["stage", "updates", "samples in an update", "samples a second", "minutes"]]
    for stage in STAGES:
        last = [line for line in read_lines(run_dir / stage / "metrics.jsonl") if "images_per_second" in line][-1]
        batch = plan.costs[stage].batch_size
        rate = f"{last['images_per_second']:.0f}"
        stages.append([NAMES[stage], f"{plan.steps[stage]:,}", str(batch), rate, f"{plan.spent[stage] / 60:.1f}"])
    lines += _table(stages)
    judged = judge_table(numbers)
    if judged:
        lines += ["", "Share of captions whose sample is right, as the judge below says:", "", *_table(judged)]
    lines += ["", *_table(_losses(numbers))]
    return "\n".join(lines)


def main(run_dir: Path) -> None:
    """Rewrites docs/demo.md between the marks, and its pictures."""
    document = DOCS / "demo.md"
    before, mark, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{document}: expected the lines {BEGIN!r} and {END!r}")
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{cpu_name()} ({capability}), {threads} threads, torch {torch.__version__.partition('+')[0]}"
    document.write_text(f"{before}{BEGIN}\n{page(run_dir, machine)}\n{END}{after}")
    for name in ("heldout.png", "reconstructions.png"):
        shutil.copy(run_dir / name, DOCS / name)
    print(f"{document}, heldout.png and reconstructions.png are those of {run_dir}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
