# SPDX-License-Identifier: MIT
"""The benchmark suite itself: what it reports is measured, checked, saved, compared and held against a record."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch

from dalle_fast import bench
from dalle_fast.bench.rows import relative
from dalle_fast.bench.steps import dalle_row, dvae_row
from dalle_fast.cli import main


def wait(seconds):
    def run():
        time.sleep(seconds)

    return run


def row(name="sleeping", ours=0.002, error=0.0, **peers):
    return bench.Row(name, wait(ours), lambda: error, 1e-3, bytes=8, peers=peers)


def table(*rows, **options):
    said = []
    made = [(r.name, lambda r=r: r) for r in rows]
    return bench.run(made, bench.Timer("cpu", 0.2), say=said.append, **options), said


def report(measured):
    return {"date": "2026-01-02T00:00:00", "machine": {**bench.machine(), "device": "Test CPU"}, "table": measured}


def test_ratios_are_of_times_in_one_run():
    measured, said = table(row(slow=lambda: wait(0.006), fast=lambda: wait(0.001)))
    (only,) = measured["rows"]
    assert 1.9 < only["median_ms"] < 20
    assert only["peers"]["slow"]["ratio"] > 1.5
    assert only["peers"]["fast"]["ratio"] < 0.9
    assert "fast" in said[0], "the line shows the best peer"
    assert bench.failures(measured) == []


def test_a_peer_that_does_not_run_is_named_with_its_reason():
    def missing():
        raise ImportError("no module named liger")

    def broken():
        def call():
            raise NotImplementedError("backward")

        return call

    measured, _ = table(row(missing=missing, broken=broken))
    assert measured["rows"][0]["peers"] == {
        "missing": "not run: ImportError: no module named liger",
        "broken": "not run: NotImplementedError: backward",
    }


def test_late_rows_are_timed_without_peers():
    measured, _ = table(row(peer=lambda: wait(0.001)), seconds=0.0)
    assert measured["rows"][0]["peers"] == {"peer": "not run: out of time"}
    assert measured["rows"][0]["median_ms"] > 0


def test_patterns_choose_rows_and_peers():
    measured, _ = table(row("one", a=lambda: wait(0), b=lambda: wait(0)), row("two"), only="one", peers="^b")
    assert [r["name"] for r in measured["rows"]] == ["one"]
    assert list(measured["rows"][0]["peers"]) == ["b"]


def test_files_are_whole_and_safe(tmp_path):
    measured, _ = table(row("<script>alert(1)</script>", error=1.0, peer=lambda: wait(0.001)))
    path = bench.save(measured, tmp_path, {**bench.machine(), "device": "Test CPU"})
    assert bench.load(path)["table"] == json.loads(json.dumps(measured))
    page = path.with_suffix(".html").read_text()
    assert "<script>" not in page
    assert "wrong" in page
    assert "http" not in page, "the page needs no other file"
    assert "| peer |" in bench.markdown(bench.load(path))


def test_a_lost_ratio_is_found_on_the_same_machine_only():
    measured, _ = table(row(peer=lambda: wait(0.004)))
    now = report(measured)
    record = copy.deepcopy(now)
    assert bench.losses(record, now) == []
    record["table"]["rows"][0]["peers"]["peer"]["ratio"] *= 1 / 0.69
    assert "recorded" in bench.losses(record, now)[0]
    record["machine"]["device"] = "another"
    with pytest.raises(bench.BenchError, match="ratios cannot be compared"):
        bench.losses(record, now)


def test_compare_shows_both(tmp_path, capsys):
    measured, _ = table(row(peer=lambda: wait(0.004)))
    path = bench.save(measured, tmp_path, bench.machine())
    main(["bench", "--compare", str(path), str(path)])
    printed = capsys.readouterr().out
    assert "1.00x" in printed
    assert "sleeping" in printed
    main(["bench", "--table", str(path)])
    assert "| sleeping | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "("], "--only: expected a regular expression"),
        (["--only", "nothing like this"], "no row matches"),
        (["--threads", "-1"], "--threads: expected"),
        (["--check", "/nowhere.json"], "not a benchmark result"),
        (["--table", "/nowhere.json"], "not a benchmark result"),
        (["--compare", "/nowhere.json", "/nowhere.json"], "not a benchmark result"),
    ],
)
def test_bad_flags_are_explained(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *a, **k: {"roofs": {}, "rows": []})
    with pytest.raises(SystemExit) as stop:
        main(["bench", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_list_has_every_room(capsys):
    main(["bench", "--list"])
    names = capsys.readouterr().out.splitlines()
    for word in ("sparse_attention", "decode_attention", "gumbel_softmax", "householder", "AdamW16", "DALLE", "dVAE"):
        assert any(name.startswith(word) for name in names), word
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("make", [dalle_row, dvae_row])
def test_training_steps_compute_what_the_plain_model_does(make):
    for dtype in (torch.float32, torch.bfloat16):
        tiny = make(dtype, small=True)
        assert tiny.error() <= tiny.bound
        (peer,) = tiny.peers.values()
        assert relative(peer()(), tiny.ours()) < (0.2 if make is dvae_row else 0.02)  # its noise is another


def test_the_reference_implementation_is_a_row_only_where_a_clone_is_given(tmp_path, capsys):
    assert not any("reference implementation" in name for name, _ in bench.all_rows())
    with pytest.raises(SystemExit):
        main(["bench", "--list", "--dalle-pytorch", str(tmp_path)])
    assert "--dalle-pytorch: expected a clone" in capsys.readouterr().err
    (tmp_path / "dalle_pytorch").mkdir()
    (tmp_path / "dalle_pytorch" / "dalle_pytorch.py").write_text("raise ImportError('no einops')")
    main(["bench", "--list", "--dalle-pytorch", str(tmp_path)])
    assert "reference implementation" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_joint_vocabulary_computes_the_same_loss_gradients(dtype):
    tiny = bench.vocabulary_row(dtype, text=(6, 20), image=(10, 12), width=8)
    assert tiny.error() <= tiny.bound
    for peer in tiny.peers.values():
        for a, b in zip(peer()(), tiny.ours(), strict=True):
            assert relative(a, b) < tiny.bound


def test_relative_error():
    x = torch.tensor([3.0, float("nan"), 4.0])
    assert relative(x, x) == 0.0
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative(torch.tensor([float("nan")]), torch.tensor([1.0])) != relative(x, x)
    codes = torch.tensor([60000], dtype=torch.uint16)
    assert relative(codes, codes) == 0.0
