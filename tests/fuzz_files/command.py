# SPDX-License-Identifier: MIT
"""Right and wrong command lines of every command: done, or one line that names what is wrong and exit code 2."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from dalle_fast import bench, cli, demo
from dalle_fast.errors import UserError
from dalle_fast.sample import system

from .base import FileTarget, tiny_system
from .configs import Reached, first_update_only
from .guard import WATCH
from .mutate import NUMBERS, TEXTS

MOST_SAMPLES = 16
"""More of them are real work."""
STAGES = ("dvae", "clip", "dalle")
WORDS = (*map(str, NUMBERS[:17]), "nan", "inf", "-inf", "1e400", "0x10", "1_000", " 3 ", "3.5", "true", "emoji",
         "shapes", "cpu", "cuda", "auto", ".", "..", "system", "mine.png", "none", "-", "--", "(", "[a-", "\u0663",
         *TEXTS)  # fmt: skip


class CommandTarget(FileTarget):
    """`main(argv)` in a process of its own kind, among files that must be there afterwards."""

    name = "command"
    seconds = 20.0

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        tiny_system(self.root)
        peer = {"median_ms": 3.0, "best_ms": 3.0, "ratio": 3.0}
        row = {"name": "dropout", "median_ms": 1.0, "best_ms": 1.0, "floor_ms": 0.5, "share": 0.5, "error": 0.0,
               "bound": 1.0, "bytes": 4, "flops": 0, "peers": {"torch": peer}}  # fmt: skip
        self.table = {"peaks": {}, "rows": [row]}
        self.facts = facts = {"device": "a CPU", "cpu_level": "AVX2", "threads": 1, "commit": "0" * 40}
        (self.root / "bench.json").write_text(json.dumps({"date": "2026-01-01", "machine": facts, "table": self.table}))
        (self.root / "bad.json").write_text("[" * 10_000)
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(self.root / "mine.png")
        self.flags = {name: _flags_of(name) for name in cli.COMMANDS}

    def names(self, text: str, folder: Path) -> bool:
        return True  # judged by `_verdict`

    def case(self, rng: Random, folder: Path) -> str | None:
        with WATCH.off():
            self._lay_out(folder)
        argv = self._argv(rng)
        before = _contents(folder)
        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), self._little_work():
            try:
                cli.main(argv)
            except SystemExit as stop:
                code = stop.code or 0
            except Reached:
                code = 0
            finally:
                torch.set_num_threads(1)
        lost = {path: text for path, text in before.items() if _contents(folder).get(path) != text}
        if lost and (code or not _may_write(argv, lost)):
            return f"{argv!r}: changed {sorted(lost)[:3]}"
        return self._verdict(argv, code, err.getvalue())

    def _verdict(self, argv: list[str], code: Any, error: str) -> str | None:
        if "Traceback" in error:
            return f"{argv!r}: {error[-800:]}"
        if code == 0:
            return None
        if code != 2:
            return f"{argv!r}: exit code {code!r}: {error[-300:]}"
        lines = error.strip().splitlines()
        if not argv:  # prints the help
            return None
        if len(lines) != 1 or not lines[0].startswith("dalle-fast: error: ") or len(lines[0]) > 6000:
            return f"{argv!r}: {len(lines)} lines: {error[:600]}"
        raise UserError(lines[0])

    def _lay_out(self, folder: Path) -> None:
        (folder / "system").mkdir()
        for stage in STAGES:
            os.symlink(self.root / stage, folder / "system" / stage)
        for name in ("pictures", "bench.json", "bad.json", "mine.png"):
            os.symlink(self.root / name, folder / name)
        counts = {"first": -20, "counts": [[1, 5], [0, 3]], "zeros": [0, 1], "not_finite": [0, 0]}
        line = {"step": 1, "histograms": {"activations": counts, "parameters": counts}}
        (folder / "counted").mkdir()
        (folder / "counted" / "metrics.jsonl").write_text(json.dumps(line))
        (folder / "precious.txt").write_text("nobody named this file")

    def _argv(self, rng: Random) -> list[str]:
        command = rng.choice([*cli.COMMANDS, "train", "train"])
        argv = [command, *self._right(rng, command)]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            argv = self._changed(rng, command, argv)
        return argv

    def _right(self, rng: Random, command: str) -> list[str]:
        draw = ["--run", "system", "--caption", "a red house", "--num-samples", "1", "--output", "out"]
        stage = rng.choice(STAGES)
        config = ["--config", str(self.root / stage / "config.toml")]
        choices = {
            "sample": [draw],
            "complete": [[*draw, "--image", "mine.png", "--keep-rows", "2"]],
            "evaluate": [["--run", "system", "--num-losses", "2", "--num-captions", "1", "--num-samples", "1"]],
            "tokenize": [["--run", "system/dvae", "--data", "pictures", "--output", "tokens.safetensors"]],
            "train": [[stage, *config, "--run", f"new/{stage}", "--loop.steps", "1"],
                      [stage, *config, "--dry-run"], [stage, "--preset", "shapes", "--dry-run"]],
            "plan": [["--gpus", "8", "--link", "25Gbit"], ["--gpus", "64", "--link", "1Gbit", "--json"]],
            "bench": [["--list"], ["--table", "bench.json"], ["--compare", "bench.json", "bench.json"], [],
                      ["--check", "bench.json"], ["--json", "results"]],
            "histograms": [["--run", "counted"]],
            "doctor": [[], ["--json"]],
            "demo": [["--minutes", "1", "--run", "demo"]],
        }  # fmt: skip
        return list(rng.choice(choices.get(command, [[]])))

    def _changed(self, rng: Random, command: str, argv: list[str]) -> list[str]:
        argv = list(argv)
        at = rng.randrange(len(argv)) if argv else 0
        if not argv:
            return [rng.choice(WORDS)]
        way = rng.randrange(10)
        if way == 0:
            del argv[at]
        elif way == 1:
            argv.insert(at, argv[rng.randrange(len(argv))])
        elif way < 5:
            argv[at] = rng.choice(WORDS)
        elif way == 5:
            argv[at] = _mistyped(rng, argv[at])
        elif way == 6:
            argv.append(rng.choice(["-h", "--help", "--version", "--", "-x", "extra", "", "--=", "--run=", "---"]))
        elif way == 7 and argv[at].startswith("--") and at + 1 < len(argv):
            argv[at : at + 2] = [f"{argv[at]}={argv[at + 1]}"]
        else:
            flags = self.flags.get(command) or ["--help"]
            argv += [_mistyped(rng, rng.choice(flags)) if rng.random() < 0.2 else rng.choice(flags), rng.choice(WORDS)]
            if rng.random() < 0.2:
                argv.pop()
        return argv

    @contextlib.contextmanager
    def _little_work(self) -> Iterator[None]:
        """Stops where minutes of work would begin."""
        draw = system.generate_tokens

        def few(model: Any, text: Any, options: Any, **more: Any) -> Any:
            if options.num_samples > MOST_SAMPLES:
                raise Reached
            return draw(model, text, options, **more)

        def reached(*_: Any, **__: Any) -> Any:
            raise Reached

        with contextlib.ExitStack() as stack:
            stack.enter_context(first_update_only())
            stack.enter_context(mock.patch.object(system, "generate_tokens", few))
            stack.enter_context(mock.patch.object(demo, "run", reached))
            for name, value in (("run", self.table), ("show", ""), ("machine", self.facts)):
                stack.enter_context(mock.patch.object(bench, name, return_value=value))
            for name in ("measure", "measure_curves", "measure_overheads"):
                stack.enter_context(mock.patch.object(bench, name, reached))
            yield


def _flags_of(command: str) -> list[str]:
    """Every flag that the help of a command names."""
    found: set[str] = set()
    for argv in [[command, stage, "--help"] for stage in STAGES] if command == "train" else [[command, "--help"]]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main(argv)
        found |= set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", out.getvalue()))
    return sorted(found)


def _mistyped(rng: Random, word: str) -> str:
    if len(word) < 2:
        return word + "x"
    at = rng.randrange(len(word) - 1)
    return rng.choice([word[:at] + word[at + 1 :], word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                       word[:at] + rng.choice("aexz-.") + word[at:], word.upper(), word + "s"])  # fmt: skip


def _contents(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, links and what they lead to included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 1 << 20:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _may_write(argv: list[str], changed: dict[str, bytes]) -> bool:
    """Files that a right command line was told to write, by any of its words."""
    words = [word.split("=", 1)[-1] for word in argv]
    return all(any(word and path.startswith(os.path.normpath(word)) for word in words) for path in changed)
