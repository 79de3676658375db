# SPDX-License-Identifier: MIT
"""What is left in the folder of a run: logs, locks, plots, folders where files should be."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from dalle_fast import cli
from dalle_fast.errors import UserError
from dalle_fast.models import store
from dalle_fast.train import RECIPES, load_config, run
from dalle_fast.train.report import read_lines

from .base import FileTarget, tiny_system
from .guard import WATCH
from .mutate import damaged, json_value, odd_value, replace_entry

NAMES = (
    "metrics.jsonl",
    "config.toml",
    ".lock",
    "samples",
    "tensorboard",
    "gradients.png",
    "replaced.jsonl",
    "checkpoints",
)


class LogTarget(FileTarget):
    """A run goes on among leftovers, or says what is in its way; its checkpoints are there afterwards."""

    name = "leftovers"
    seconds = 10.0

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        tiny_system(self.root)
        counts = {"first": -20, "counts": [[1, 5, 2], [0, 3, 1]], "zeros": [0, 1], "not_finite": [0, 0]}
        self.lines: list[Any] = [
            {"step": 1, "loss": 1.0, "time": 0.0},
            {"step": 1, "histograms": {"activations": counts, "parameters": counts}, "log2_scales": [3.0, 4.5]},
            {"step": 2, "loss": 0.5, "histograms": {"activations": counts, "parameters": counts}},
        ]

    def case(self, rng: Random, folder: Path) -> str | None:
        kind = rng.choice(["dvae", "dalle"])
        target = folder / kind
        if rng.random() < 0.5:
            target.mkdir()
            self._write_log(rng, target / "metrics.jsonl")
            return self._histograms(target)
        shutil.copytree(self.root / kind, target)
        with WATCH.off():
            os.symlink(self.root / "dvae", folder / ("dvae" if kind == "dalle" else "other"))
        self._write_log(rng, target / "metrics.jsonl")
        for _ in range(rng.choice([0, 1, 2])):
            self._leave(rng, target)
        return self._go_on(rng, kind, target)

    def _write_log(self, rng: Random, file: Path) -> None:
        lines = json_value(rng, self.lines) if rng.random() < 0.8 else self.lines
        lines = lines if isinstance(lines, list) else [lines]
        rng.shuffle(lines)
        text = "\n".join(json.dumps(line) for line in lines) + rng.choice(["\n", "", "\n\n", '\n{"step": 3, "lo'])
        content = text.encode("utf-8", "surrogatepass")
        file.write_bytes(damaged(rng, content) if rng.random() < 0.3 else content)
        if rng.random() < 0.05:
            replace_entry(rng, file)

    def _histograms(self, target: Path) -> str | None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli._histograms(["--run", str(target)])
        if not (target / "gradients.png").exists():
            return "no plot"
        return None if "constant" in out.getvalue() else "no table"

    def _leave(self, rng: Random, target: Path) -> None:
        path = target / rng.choice(NAMES)
        if rng.random() < 0.4:
            replace_entry(rng, path)
        elif rng.random() < 0.5 and (target / "checkpoints").is_dir():
            odd = rng.choice(
                ["step-zzz", "step-00000009", "step--1", ".step-00000003.tmp", "latest", "step-", "step-1"]
            )
            made = target / "checkpoints" / odd
            replace_entry(rng, made)
        elif path.is_file():
            path.write_bytes(damaged(rng, path.read_bytes()))
        elif not os.path.lexists(path):
            path.write_text(str(odd_value(rng)).encode("utf-8", "replace").decode())

    def _go_on(self, rng: Random, kind: str, target: Path) -> str | None:
        config = load_config(RECIPES[kind][0], self.root / kind / "config.toml")
        loop = dataclasses.replace(config.loop, steps=rng.choice([2, 3]), log_every=1, sample_every=rng.choice([0, 3]))
        config = dataclasses.replace(config, loop=loop)
        good = {p.name for p in _steps(target) if _is_good(p)}
        logged = _whole_lines(target / "metrics.jsonl")
        try:
            result = run(config, target, quiet=True)
        except UserError:
            lost = good - {p.name for p in _steps(target) if _is_good(p)}
            if lost:
                return f"refused, and {sorted(lost)} lost"
            raise
        now = {p.name for p in _steps(target) if _is_good(p)}
        if result.checkpoint.name not in now or len(now) < min(2, len(good | {result.checkpoint.name})):
            return f"of {sorted(good)} and {result.checkpoint.name} only {sorted(now)} are whole"
        after = read_lines(target / "metrics.jsonl")
        missing = [line for line in logged if line["step"] <= 2 and line not in after]
        return f"the log lost {missing[:3]}" if missing and good else None


def _steps(target: Path) -> list[Path]:
    return [p for p in (target / "checkpoints").glob("step-*") if p.is_dir()]


def _is_good(folder: Path) -> bool:
    try:
        store.verify(folder)
    except store.CheckpointError:
        return False
    return True


def _whole_lines(file: Path) -> list[dict]:
    """The lines that any reader of a log accepts."""
    if not file.is_file() or file.stat().st_size > 1 << 20:
        return []
    lines = []
    for line in file.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and type(value.get("step")) is int and value == value and value["step"] >= 0:
                lines.append(value)
    return lines
