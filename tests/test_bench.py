# SPDX-License-Identifier: MIT
"""The benchmark suite itself: what it reports is measured, checked, saved, compared and held against a record."""

from __future__ import annotations

import copy
import json
import time
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import tables
from dalle_fast import bench
from dalle_fast.bench import PEAKS, Peaks
from dalle_fast.bench.memory import peak_memory
from dalle_fast.bench.overhead import overhead_rows
from dalle_fast.bench.page import HEIGHT, WIDTH, chart
from dalle_fast.bench.rows import all_rooms, relative, room_row
from dalle_fast.bench.scaling import measure_curves
from dalle_fast.bench.steps import dalle_row, dvae_row
from dalle_fast.cli import main
from dalle_fast.ops import AttentionPattern, sparse_attention
from dalle_fast.ops.sparse_attention.peers import BLOCK_SIZES, column_by_column, flex_attention

EVEN = Peaks(dict.fromkeys(PEAKS, 1e10), "measured")


@pytest.fixture(autouse=True)
def no_slow_parts(monkeypatch):
    monkeypatch.setattr("dalle_fast.bench.table.peaks", lambda timer, fresh=False: EVEN)
    monkeypatch.setattr("dalle_fast.bench.timing._cache_bytes", lambda: 32 << 20)  # half a GB where cores are many


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
    both = [bench.load(path)] * 2
    assert "forward" in bench.summary(both[:1])
    level = both[0]["machine"]["cpu_level"]
    assert bench.summary(both).splitlines()[0].count(f"forward, {level}") == 2
    (line,) = (line for line in bench.side_by_side(both).splitlines() if "alert" in line)
    assert line.count(" peer |") == 2


def test_documents_are_of_the_newest_result():
    for document, made in tables.documents().items():
        text = document.read_text()
        assert tables.with_table(text, made) == text, f"{document.name}: run python -m benchmarks.tables"


def test_curves_and_calls_are_measured_and_drawn(tmp_path):
    curves = measure_curves(0.01, "^decode_attention|^AdamW16 threads", say=lambda line: None)
    assert [curve["unit"] for curve in curves] == ["samples", "threads"]
    assert [point["x"] for point in curves[0]["points"]] == [1, 4, 16, 64]
    calls = bench.measure_overheads("^null|^sparse|1 x 1$", say=lambda line: None)
    assert [call["name"] for call in calls] == ["null", "sparse_attention", "AdamW16 1 x 1"]
    for call in calls:
        assert 0.1 < call["ours_us"] < 1e5
        assert call["peers"]
    curves[0]["name"] = "<b>&"
    path = bench.save({"peaks": {}, "rows": []}, tmp_path, bench.machine(), scaling=curves, overhead=calls)
    page = path.with_suffix(".html").read_text()
    assert "<b>" not in page
    for curve in curves:
        figure = ElementTree.fromstring(chart(curve))
        assert len(figure.findall(".//{*}polyline")) == 1 + len(curve["points"][0]["peers"])
        for place in figure.findall(".//{*}circle"):
            assert 0 <= float(place.get("cx")) <= WIDTH
            assert 0 <= float(place.get("cy")) <= HEIGHT
    assert "call at the smallest size" in bench.markdown(bench.load(path))


def test_every_op_has_a_call_of_its_smallest_size():
    assert {name.split()[0] for name, _, _ in overhead_rows()} >= {room.name for room in all_rooms()} - {"adamw16"}


def test_the_floor_is_the_larger_of_bytes_and_products():
    machine = Peaks(dict(zip(PEAKS, (8e3, 1e4, 1e3), strict=True)), "measured")
    for flops, dtype, floor in ((0, torch.float32, 1.0), (20, torch.float32, 2.0), (20, torch.bfloat16, 2.0)):
        one = bench.Row("row", wait(0.001), lambda: 0.0, 1e-3, bytes=8, flops=flops, flop_dtype=dtype)
        assert bench.measure(one, bench.Timer("cpu", 0.1), machine)["floor_ms"] == pytest.approx(floor)
    room = next(room for room in all_rooms() if room.name == "sparse_attention")
    case = room.benchmarks[0]
    assert case.flops == 4 * 328_304 * 64 * 8
    assert case.backward_flops == case.flops * 5 // 2


def test_rows_with_products_count_them():
    without = {"adamw16", "dropout", "gumbel_softmax", "max_pool2d", "minifloat", "null"}
    for room in all_rooms():
        assert all((case.flops == 0) == (room.name in without) for case in room.benchmarks), room.name


def test_memory_is_that_of_the_call():
    def call():
        return torch.ones(4 << 20).add(1).sum()  # two of 16 MiB at a time

    call()
    memory = peak_memory(call, "cpu")
    if memory is None:
        pytest.skip("the system does not say")
    assert 30 << 20 < memory < 40 << 20


def test_cold_times_are_of_short_functions_only():
    timer = bench.Timer("cpu", 0.05)
    functions = {"short": wait(0.001), "long": wait(0.03)}
    assert set(timer.cold(functions, timer.compare(functions))) == {"short"}


@pytest.mark.parametrize("room", all_rooms(), ids=lambda room: room.name)
def test_peers_compute_what_we_do(room):
    """Those that draw no noise of their own and round as we do, on the room's smallest benchmark."""
    if not room.benchmarks or room.name in ("dropout", "gumbel_softmax", "vq_bottleneck", "minifloat"):
        return
    case = min(room.benchmarks, key=lambda case: case.flops)
    made = [room_row(room, case, torch.float32, False) for _ in range(2)]
    for name in made[0].peers:
        if "compiled" in name or "all pairs" in name:
            continue
        ours, theirs = made[0].ours(), made[1].peers[name]()()  # of tensors of their own: some are mutated
        if room.name == "householder":  # the signs of columns are free
            ours, theirs = ([t @ t.mT for t in values] for values in (ours, theirs))
        bound = max(made[0].bound, 1e-2 if room.name == "powersgd" else 1e-4)
        assert relative(theirs[0] if room.name != "powersgd" else theirs[-1], ours[-1]) < bound, name


def test_flex_attention_is_the_fastest_of_its_block_sizes(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    pattern = AttentionPattern("column", 130, (5, 3))
    q, k, v = (torch.randn(1, 2, pattern.length, 16) for _ in range(3))
    peer = flex_attention(((q, k, v, pattern), {}), False)
    assert peer.note in [f"BLOCK_SIZE {size}" for size in BLOCK_SIZES]
    expected = column_by_column(sparse_attention(q, k, v, pattern), pattern)
    torch.testing.assert_close(peer(q, k, v, pattern), expected)


def test_flex_attention_without_a_compiler_or_gradient_is_left_out(monkeypatch):
    def no_compiler(function, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    room = next(room for room in all_rooms() if room.name == "sparse_attention")
    case = room.cases[0]
    for backward, reason in ((False, "RuntimeError: no C++ compiler"), (True, "FlexAttention has no backward pass")):
        one = bench.measure(room_row(room, case, torch.float32, backward), bench.Timer("cpu", 0.01), EVEN)
        assert reason in one["peers"]["FlexAttention compiled"]
        assert one["peers"]["SDPA with the mask"]["ratio"] > 0


def test_a_clone_that_is_not_there_is_a_peer_that_does_not_run(tmp_path):
    step = dalle_row(torch.float32, small=True, clone=str(tmp_path))
    names = [name for name in step.peers if name.startswith("DALLE-pytorch")]
    assert len(names) == 3
    with pytest.raises(FileNotFoundError, match="has no dalle_pytorch/"):
        step.peers[names[0]]()


def again(name):
    raise AssertionError(f"{name} was measured again")


def test_a_lost_ratio_is_found():
    now = report(table(row(peer=lambda: wait(0.004)))[0])
    record = copy.deepcopy(now)
    assert bench.check(now, [record], again) == []
    record["table"]["rows"][0]["peers"]["peer"]["best_ms"] *= 1 / 0.69
    tries = []
    (lost,) = bench.check(now, [record], lambda name: tries.append(name) or now["table"]["rows"][0])
    assert lost.startswith("sleeping against peer: ")
    assert tries == ["sleeping", "sleeping"]


def test_a_disturbed_row_is_measured_again_before_it_counts():
    record = report(table(row(peer=lambda: wait(0.004)))[0])
    disturbed = copy.deepcopy(record)
    disturbed["table"]["rows"][0]["best_ms"] *= 5
    said = []
    assert bench.check(disturbed, [record], lambda name: record["table"]["rows"][0], said.append) == []
    assert said[1:] == ["attempt 2: sleeping"]


def test_another_machine_is_held_to_no_record_but_to_the_peer():
    now = report(table(row(peer=lambda: wait(0.004)))[0])
    record = copy.deepcopy(now)
    record["machine"]["device"] = "another"
    record["table"]["rows"][0]["peers"]["peer"]["best_ms"] *= 10
    said = []
    assert bench.check(now, [record], again, said.append) == [], "20 there, 2 here"
    assert "no record of a machine like this" in said[0]
    now["table"]["rows"][0]["best_ms"] *= 4
    (lost,) = bench.check(now, [record], lambda name: now["table"]["rows"][0])
    assert "must be 0.70 or more" in lost
    record["table"]["rows"][0]["peers"]["peer"]["best_ms"] *= 0.01
    assert bench.check(now, [record], again) == [], "nobody has said that we lead"


def test_a_planted_slow_kernel_fails_the_check(tmp_path, monkeypatch, capsys):
    """The whole command; both sides sleep, so that a busy machine does not matter."""
    seconds = 0.005
    rows = [("kernel", lambda: row("kernel", seconds, peer=lambda: wait(0.02)))]
    monkeypatch.setattr(bench, "all_rows", lambda clone="": iter(rows))
    main(["bench", "--json", str(tmp_path)])
    main(["bench", "--check", str(tmp_path)])
    seconds = 0.05
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--check", str(tmp_path)])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "attempt 3: kernel" in printed.out
    assert "kernel against peer: 0." in printed.err


def test_nothing_to_check_is_an_error(tmp_path):
    now = report(table(row(peer=lambda: wait(0.001)))[0])
    other = report(table(row("another", peer=lambda: wait(0.001)))[0])
    with pytest.raises(bench.BenchError, match="nothing to check"):
        bench.check(now, [other], again)
    with pytest.raises(bench.BenchError, match="no benchmark result of a CPU in this folder"):
        bench.records(tmp_path)


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
        (["--ops", "("], "--ops: expected a regular expression"),
        (["--only", "nothing like this"], "no row matches"),
        (["--threads", "-1"], "--threads: expected"),
        (["--check", "/nowhere.json"], "not a benchmark result"),
        (["--table", "/nowhere.json"], "not a benchmark result"),
        (["--compare", "/nowhere.json", "/nowhere.json"], "not a benchmark result"),
    ],
)
def test_bad_flags_are_explained(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *a, **k: {"peaks": {}, "rows": []})
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
