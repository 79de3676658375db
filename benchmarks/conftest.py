# SPDX-License-Identifier: MIT
"""Prints the ratios at the end: each op beside its peer, both timed in this run."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    groups: dict[str, dict[str, float]] = {}
    for bench in session.benchmarks:
        groups.setdefault(bench.group, {})[bench.extra_info["who"]] = bench.stats.min
    terminalreporter.section("ratio to the peer (minimum of each; above 1 we are faster)")
    for group, times in groups.items():
        ours = times.pop("dalle_fast", None)
        if ours is None:
            continue
        for peer, seconds in times.items():
            line = f"{seconds / ours:6.2f}x  {ours * 1e3:9.3f} ms vs {seconds * 1e3:9.3f} ms  {group}  ({peer})"
            terminalreporter.write_line(line)
