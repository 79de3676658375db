# SPDX-License-Identifier: MIT
"""One timer and one table for the session; at the end the table, its files, and what has lost against a record."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle_fast import bench

SECONDS = 900  # rows that begin later are timed without their peers


class Suite:
    """What the session has measured."""

    def __init__(self) -> None:
        self.timer = bench.Timer("cpu", budget=3.0)
        self.peaks = bench.peaks(self.timer, fresh=True)  # what is recorded is of one run
        self.deadline = time.monotonic() + SECONDS
        self.facts = bench.machine()
        self.makers: dict[str, Callable[[], bench.Row]] = {}
        self.table: dict = {"peaks": self.peaks.rates, "peaks_source": self.peaks.source, "rows": []}
        self.more: dict[str, list[dict]] = {}

    def measure(self, make: Callable[[], bench.Row]) -> tuple[bench.Row, dict]:
        row = make()
        self.makers[row.name] = make
        self.table["rows"].append(bench.measure(row, self.timer, self.peaks, deadline=self.deadline))
        return row, self.table["rows"][-1]

    def again(self, name: str) -> dict:
        return bench.measure(self.makers[name](), self.timer, self.peaks)


_suite: Suite | None = None


@pytest.fixture(scope="session")
def suite() -> Suite:
    global _suite
    _suite = Suite()
    return _suite


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default="", help="folder for JSON and HTML")
    parser.addoption(
        "--record", default="", help="JSON of an earlier run, or a folder of them: fail where a ratio fell"
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_LOSSES] = []
    if _suite is None or not _suite.table["rows"]:
        return
    if record := session.config.getoption("--record"):
        report = {"machine": _suite.facts, "table": _suite.table}
        session.config.stash[_LOSSES] = bench.check(report, bench.records(record), _suite.again)
        if session.config.stash[_LOSSES]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


_LOSSES = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if _suite is None or not (_suite.table["rows"] or _suite.more):
        return
    terminalreporter.section("each row beside the best of its peers")
    terminalreporter.write_line(bench.show(_suite.table))
    if folder := config.getoption("--results"):
        whole = len(_suite.table["rows"]) == len(list(bench.all_rows())) and len(_suite.more) == 2
        path = bench.save(_suite.table, Path(folder), _suite.facts, whole=whole, **_suite.more)
        terminalreporter.write_line(f"written to {path}")
        if whole:
            terminalreporter.write_line("python -m benchmarks.tables puts it into README.md and docs/benchmarks.md")
    for loss in config.stash[_LOSSES]:
        terminalreporter.write_line(f"LOST: {loss}")
