# SPDX-License-Identifier: MIT
"""One timer and one table for the session; at the end the table, its files, and what has lost against a record."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dalle_fast import bench

SECONDS = 1000  # rows that begin later are timed without their peers


class Suite:
    """What the session has measured."""

    def __init__(self) -> None:
        self.timer = bench.Timer("cpu", budget=3.0)
        self.roof = bench.roofs(self.timer)
        self.deadline = time.monotonic() + SECONDS
        self.rows: list[dict] = []

    def measure(self, row: bench.Row) -> dict:
        self.rows.append(bench.measure(row, self.timer, self.roof, deadline=self.deadline))
        return self.rows[-1]


_suite: Suite | None = None


@pytest.fixture(scope="session")
def suite() -> Suite:
    global _suite
    _suite = Suite()
    return _suite


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default="", help="folder for JSON and HTML")
    parser.addoption("--record", default="", help="JSON of an earlier run: fail where a ratio fell under 0.7 of it")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_LOSSES] = []
    if _suite is None or not _suite.rows:
        return
    report = {"machine": bench.machine(), "table": {"roofs": _suite.roof, "rows": _suite.rows}}
    record = session.config.getoption("--record")
    if record:
        session.config.stash[_LOSSES] = bench.losses(bench.load(record), report)
        if session.config.stash[_LOSSES]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


_LOSSES = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if _suite is None or not _suite.rows:
        return
    table = {"roofs": _suite.roof, "rows": _suite.rows}
    terminalreporter.section("each row beside the best of its peers")
    terminalreporter.write_line(bench.show(table))
    if folder := config.getoption("--results"):
        terminalreporter.write_line(f"written to {bench.save(table, Path(folder), bench.machine())}")
    for loss in config.stash[_LOSSES]:
        terminalreporter.write_line(f"LOST: {loss}")
