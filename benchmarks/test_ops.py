# SPDX-License-Identifier: MIT
"""Every op, the optimizer and whole training steps beside their peers, curves, costs of a call: `make bench`.

A row is measured by `dalle_fast.bench` (interleaved with its peers, checked against float64); pytest-benchmark then
times ours alone, so that its own statistics, storage and comparisons work as everywhere.
"""

from __future__ import annotations

import pytest

from dalle_fast import bench
from dalle_fast.ops import _backend

ROWS = [pytest.param(make, id=name) for name, make in bench.all_rows()]


pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


@pytest.mark.parametrize("make", ROWS)
def test_row(benchmark, suite, make):
    row, result = suite.measure(make)
    assert "failed" not in result, result["failed"]
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert result["error"] <= result["bound"]
    benchmark.group = row.name
    benchmark.extra_info.update(result)
    benchmark.pedantic(row.ours, rounds=3)


def test_curves(suite):
    suite.more["scaling"] = bench.measure_curves()


def test_overheads(suite):
    suite.more["overhead"] = bench.measure_overheads()
