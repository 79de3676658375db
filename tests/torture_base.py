# SPDX-License-Identifier: MIT
"""What all tortures share: forked children, undisturbed runs to compare with, and the table."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from test_train import configured, final_state, log_of
from tiny import small_system

from dalle_fast.errors import UserError
from dalle_fast.train import run
from dalle_fast.train.loop import Loop

STEPS, SAVE_EVERY = 40, 7


class Child:
    """A forked process that runs a function; its output goes to a file."""

    def __init__(self, function: Callable[[], object], log: Path) -> None:
        self.log = log
        self.code: int | None = None
        """Exit code; minus the signal's number where one ended it; None while it runs."""
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            function()
            code = 0
        except BaseException as error:
            traceback.print_exc()
            number = getattr(error, "signal_number", None)
            code = 2 if isinstance(error, UserError) else 128 + number if number else 1
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self) -> int:
        """Exit code, when it has ended."""
        self._take(0)
        return self.code

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        self._take(os.WNOHANG)
        return self.code

    def _take(self, flags: int) -> None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, flags)
            self.code = os.waitstatus_to_exitcode(status) if pid else None

    def kill(self, number: int) -> None:
        """Sends a signal, unless it is known to have ended."""
        if self.code is None:
            os.kill(self.pid, number)


def train(
    config,
    run_dir: Path,
    on_phase: Callable[[str], None] | None = None,
    change: Callable[[Loop], None] = lambda _: None,
) -> Callable[[], object]:
    """A function that trains, or goes on, in a child, with a change to its loop before it runs."""

    def start() -> None:
        torch.set_num_threads(1)
        whole = Loop.run

        def changed(loop: Loop):
            change(loop)
            return whole(loop)

        Loop.run = changed  # of this process only
        run(config, run_dir, on_phase=on_phase)

    return start


def dying_at(count: int) -> Callable[[str], None]:
    """Kills its process at the count-th phase of its saves."""
    left = [count]

    def phase(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return phase


class Whole(NamedTuple):
    """What a run that nobody disturbed has left."""

    files: dict[str, bytes]
    log: list[dict]
    seconds: float

    @classmethod
    def of(cls, run_dir: Path, seconds: float) -> Whole:
        return cls(final_state(run_dir), log_of(run_dir), seconds)

    def check(self, run_dir: Path) -> str:
        """Empty, or what differs in another run."""
        found = final_state(run_dir)
        wrong = sorted(name for name in self.files.keys() | found.keys() if found.get(name) != self.files.get(name))
        if log_of(run_dir) != self.log:
            wrong.append("metrics.jsonl")
        return ", ".join(wrong)


class Base:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        small_system(folder / "base")
        self.dvae = folder / "base" / "dvae"
        self.rows: list[dict] = []
        self.whole: dict[str, Whole] = {}

    def config(self, kind: str, **changes):
        return configured(kind, STEPS, self.dvae, **{"save_every": SAVE_EVERY, "sample_every": 10, **changes})

    def undisturbed(self, kind: str) -> Whole:
        """The run of one process that nobody disturbs."""
        if kind not in self.whole:
            run_dir = self.folder / f"whole-{kind}"
            begin = time.monotonic()
            child = Child(train(self.config(kind), run_dir), self.folder / "whole.log")
            if child.wait():
                raise RuntimeError(child.log.read_text())
            self.whole[kind] = Whole.of(run_dir, time.monotonic() - begin)
        return self.whole[kind]

    def check(self, kind: str, run_dir: Path) -> str:
        """Empty, or what differs from the undisturbed run."""
        return self.undisturbed(kind).check(run_dir)

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        path = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def note(self, what: str, good: int, of: int, detail: str, problems: list[str]) -> None:
        self.rows.append({"what": what, "good": good, "of": of, "detail": detail, "problems": problems})
        print(f"{what}: {good} of {of}; {detail}", flush=True)
        for problem in problems[:5]:
            print(f"    {problem}", flush=True)
