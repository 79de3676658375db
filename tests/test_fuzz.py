# SPDX-License-Identifier: MIT
"""A tenth of `make fuzz`, always the same calls; and bugs that are planted, all of which have to be noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dalle_fast.ops import _backend

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


def run(*arguments: str) -> subprocess.CompletedProcess:
    """In a process without threads, because workers are forked."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("part", range(4))
def test_random_calls_are_right_or_refused_by_name(part):
    """2,500 calls each: no death, no hang, no raw error, no wrong value."""
    result = run("tests/fuzz_ops.py", "--calls", "2500", "--first", str(2500 * part), "--seed", "1", "--most", "5")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_every_planted_bug_is_noticed():
    script = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads before the forks
sys.path.insert(0, "tests")
from fuzz.controls import PLANTED, PlantedTarget
from fuzz.runner import fuzz
for kind, (_, expected) in PLANTED.items():
    report = fuzz(PlantedTarget(kind), 0, range(60), limit=0.5 if expected == "hang" else 5.0, most=1)
    found = {failure.kind for failure in report.failures}
    assert expected in found, (kind, expected, report.line())
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
