# SPDX-License-Identifier: MIT
"""Runs numbered cases in forked workers, so that a death or a hang is one more outcome, with its case and its trace.

A target makes case `number` of `seed` from these two numbers alone. Workers take blocks of cases, and a new one goes on
behind a case that has killed its worker. A case hangs when it takes more than `limit` seconds of processor time, or
`WALL` times as long without it, as a deadlock does: on a busy machine a case may have to wait.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

GOOD = ("right", "refused")
BLOCK = 1000
WALL = 6
MEMORY = 4 << 30  # bytes that a worker may have beyond what it was forked with
_BOARD = struct.Struct("<qdqq")  # case, processor time when it began, how many were right, how many refused
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    kind: str
    """"right", "refused", or the name of what is wrong: "raw", "value", ..."""
    text: str = ""


class Call(Protocol):
    """A case, made and not yet run."""

    num_parts: int
    """Decorations that the target can leave out, to find the one that matters."""

    def describe(self) -> str:
        """One line or some, for people."""

    def run(self) -> Outcome: ...


class Target(Protocol):
    """What is fuzzed."""

    name: str

    def make(self, seed: int, number: int, without: frozenset[int] = frozenset()) -> Call | None:
        """The case, without some of its decorations; None for a number that stands for nothing."""


@dataclass
class Failure:
    """A case that must not be."""

    number: int
    kind: str
    text: str
    block: int
    """Where its worker began: a case may need what was before it."""
    call: str = ""
    replay: str = ""


@dataclass
class Report:
    """Of a run."""

    target: str
    seed: int
    counts: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_cases(self) -> int:
        return sum(self.counts.values())

    def line(self) -> str:
        names = [*GOOD, *sorted({"death", "hang", "raw", *self.counts} - set(GOOD))]
        parts = ", ".join(f"{self.counts[name]} {name}" for name in names)
        return f"{self.target}: {self.num_cases} cases of seed {self.seed} in {self.seconds:.0f} s: {parts}"

    def to_json(self) -> dict:
        return {**asdict(self), "counts": dict(self.counts), "seconds": round(self.seconds, 1)}


class _Worker:
    """A forked process that runs cases [begin, end)."""

    def __init__(self, target: Target, seed: int, begin: int, end: int, folder: Path) -> None:
        self.begin, self.end = begin, end
        self.board = mmap.mmap(-1, _BOARD.size)
        self.board[:] = _BOARD.pack(begin, 0.0, 0, 0)
        self.log, self.trace = folder / f"{begin}.jsonl", folder / f"{begin}.trace"
        self.watched, self.seen, self.at = 0.0, time.monotonic(), begin
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                self._work(target, seed)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)

    def _work(self, target: Target, seed: int) -> None:
        trace = os.open(self.trace, os.O_CREAT | os.O_WRONLY)
        os.dup2(trace, 1)
        os.dup2(trace, 2)
        faulthandler.enable(file=trace)
        faulthandler.register(signal.SIGUSR1, file=trace)
        _limit_memory()
        warnings.simplefilter("ignore")
        counts = Counter()
        with open(self.log, "w") as log:
            for number in range(self.begin, self.end):
                self.board[:] = _BOARD.pack(number, time.process_time(), *(counts[kind] for kind in GOOD))
                outcome = _outcome(target, seed, number)
                if outcome is None:
                    continue
                counts[outcome.kind] += 1
                if outcome.kind not in GOOD:
                    json.dump({"number": number, "kind": outcome.kind, "text": outcome.text}, log)
                    log.write("\n")
                    log.flush()
        self.board[:] = _BOARD.pack(self.end, time.process_time(), *(counts[kind] for kind in GOOD))

    def case(self) -> int:
        return _BOARD.unpack(self.board[:])[0]

    def hangs(self, limit: float) -> bool:
        """Whether its case has taken too long."""
        number, begin, *_ = _BOARD.unpack(self.board[:])
        now = time.monotonic()
        self.watched += min(now - self.seen, 0.1)  # while this process was stopped, so was the worker
        self.seen = now
        if number != self.at:
            self.at, self.watched = number, 0.0
        if self.watched < limit:
            return False
        return _processor_time(self.pid) - begin > limit or self.watched > WALL * limit

    def kill(self) -> None:
        """With a trace of all threads first."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.2)
            os.kill(self.pid, signal.SIGKILL)

    def failures(self) -> list[Failure]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [Failure(**json.loads(line), block=self.begin) for line in lines]

    def count(self) -> Counter:
        return Counter(dict(zip(GOOD, _BOARD.unpack(self.board[:])[2:])))

    def last_words(self) -> str:
        return self.trace.read_text(errors="replace")[-3000:] if self.trace.exists() else ""


def _outcome(target: Target, seed: int, number: int) -> Outcome | None:
    try:
        call = target.make(seed, number)
        return None if call is None else call.run()
    except Exception:
        return Outcome("fuzzer", traceback.format_exc())


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _processor_time(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _signal_name(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit {os.waitstatus_to_exitcode(status)}"


def fuzz(
    target: Target,
    seed: int,
    numbers: range,
    *,
    jobs: int = 1,
    limit: float = 5.0,
    most: int = 200,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Runs the cases `numbers` (a range of step 1).

    Args:
        target: what is fuzzed. Forked processes run it: in this one no threads may run, nor may OpenMP have any to hand
            (OMP_NUM_THREADS=1 before torch is imported).
        seed: of all cases.
        numbers: which cases.
        jobs: processes at a time.
        limit: seconds of processor time that a case may take.
        most: ends the run early at so many failures.
        say: gets a line for each failure and each tenth of the run.
    """
    report, begin = Report(target.name, seed), time.monotonic()
    waiting = [(i, min(i + BLOCK, numbers.stop)) for i in range(numbers.start, numbers.stop, BLOCK)][::-1]
    running: list[_Worker] = []
    told = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or running) and len(report.failures) < most:
                while waiting and len(running) < jobs:
                    running.append(_Worker(target, seed, *waiting.pop(), Path(folder)))
                time.sleep(0.02)
                for worker in list(running):
                    ended = _ended(worker, limit)
                    if ended is None:
                        continue
                    running.remove(worker)
                    _collect(report, worker, ended, say)
                    if worker.case() + 1 < worker.end:
                        waiting.append((worker.case() + 1, worker.end))
                done = 10 * report.num_cases // max(len(numbers), 1)
                if done > told:
                    told = done
                    report.seconds = time.monotonic() - begin
                    say(report.line())
        finally:
            for worker in running:
                worker.kill()
                os.waitpid(worker.pid, 0)
    report.seconds = time.monotonic() - begin
    return report


def _ended(worker: _Worker, limit: float) -> Failure | str | None:
    """None while it runs; "" when all is done; else how it died."""
    pid, status = os.waitpid(worker.pid, os.WNOHANG)
    if pid:
        if status == 0:
            return ""
        kind = "death"
        text = f"{_signal_name(status)}\n{worker.last_words()}"
    elif worker.hangs(limit):
        worker.kill()
        os.waitpid(worker.pid, 0)
        kind, text = "hang", worker.last_words()
    else:
        return None
    return Failure(worker.case(), kind, text, worker.begin)


def _collect(report: Report, worker: _Worker, ended: Failure | str, say: Callable[[str], None]) -> None:
    found = worker.failures() + ([ended] if isinstance(ended, Failure) else [])
    report.counts.update(worker.count())
    for failure in found:
        report.counts[failure.kind] += 1
        report.failures.append(failure)
        say(f"{failure.kind} in case {failure.number}: {failure.text[-300:].strip()}")


def explain(target: Target, report: Report, command: str, *, limit: float = 5.0, most: int = 20) -> None:
    """Adds the call, without the decorations that do not matter, and the line that repeats it."""
    for failure in report.failures[:most]:
        without: frozenset[int] = frozenset()
        call = target.make(report.seed, failure.number)
        for part in range(call.num_parts):
            fewer = without | {part}
            again = run_one(target, report.seed, failure.number, fewer, limit=limit)
            if again.kind == failure.kind:
                without = fewer
        alone = run_one(target, report.seed, failure.number, without, limit=limit)
        failure.call = target.make(report.seed, failure.number, without).describe()
        failure.replay = f"{command} --seed {report.seed} --case {failure.number}"
        if alone.kind != failure.kind:  # it needs what was before it
            failure.replay = f"{command} --seed {report.seed} --first {failure.block} --calls " + str(
                failure.number - failure.block + 1
            )


class _Without:
    """A target whose cases lack some decorations."""

    def __init__(self, target: Target, without: Iterable[int]) -> None:
        self.name, self.target, self.without = target.name, target, frozenset(without)

    def make(self, seed: int, number: int, without: frozenset[int] = frozenset()) -> Call | None:
        return self.target.make(seed, number, self.without | without)


def run_one(target: Target, seed: int, number: int, without: Iterable[int] = (), *, limit: float = 5.0) -> Outcome:
    """One case in a process of its own."""
    report = fuzz(_Without(target, without), seed, range(number, number + 1), limit=limit)
    if report.failures:
        return Outcome(report.failures[0].kind, report.failures[0].text)
    return Outcome(next(iter(+report.counts), "right"))
