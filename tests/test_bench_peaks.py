# SPDX-License-Identifier: MIT
"""Rates of the machine are measured in little time and kept; what would take minutes here is not run and says why."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dalle_fast import bench
from dalle_fast.bench import PEAKS, Peaks, guard, peak_rates
from dalle_fast.bench.guard import SlowProductGuard, TooSlow
from dalle_fast.ops import _backend

RATES = dict(zip(PEAKS, (1e10, 1e11, 3e8), strict=True))


class SimulatedTimer:
    """A machine with this rate and its clock."""

    device = "cpu"

    def __init__(self, rate, delay=0.0):
        self.rate, self.delay, self.clock = rate, delay, 0.0

    def monotonic(self):
        return self.clock

    def once(self, call):
        seconds, self.delay = 2 * call() ** 3 / self.rate + self.delay, 0.0
        self.clock += seconds
        return seconds


def sizes(monkeypatch, timer):
    monkeypatch.setattr(peak_rates, "time", timer)
    return peak_rates._growing(timer, lambda size: lambda: size, 64, 2048, 8)


@pytest.mark.parametrize(
    ("rate", "side"), [(1e7, 64), (2.5e8, 256), (1e9, 256), (3e10, 1024), (1e11, 2048), (1e15, 2048)]
)
def test_the_time_for_a_rate_does_not_depend_on_the_rate(monkeypatch, rate, side):
    found = sizes(monkeypatch, timer := SimulatedTimer(rate))
    assert found[-1][0] == side
    assert timer.clock <= peak_rates.SECONDS
    for size, seconds in found:
        assert 2 * size**3 / seconds == pytest.approx(rate)


def test_a_first_call_that_takes_long_hides_nothing(monkeypatch):
    assert sizes(monkeypatch, SimulatedTimer(1e11, delay=0.3))[-1][0] == 1024


def test_rates_of_this_machine_are_measured():
    found = peak_rates.measured(bench.Timer("cpu"))
    assert list(found) == list(PEAKS)
    assert all(1e6 < rate < 1e16 for rate in found.values())


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """How often the rates are measured; they are kept below tmp_path."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peak_rates, "measured", lambda timer: calls.append(timer) or dict(RATES))
    monkeypatch.setattr(peak_rates, "_is_busy", lambda: False)
    return calls


def test_rates_are_kept_for_the_machine(measured, monkeypatch):
    timer = bench.Timer("cpu")
    assert bench.peaks(timer) == Peaks(RATES, "measured")
    kept = bench.peaks(timer)
    assert kept.rates == RATES
    assert kept.source.startswith("kept since 2")
    assert len(measured) == 1
    assert bench.peaks(timer, fresh=True).source == "measured"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert bench.peaks(timer).source == "measured", "it is another machine"
    assert len(measured) == 3
    assert len(json.loads(peak_rates.cache_file().read_text())) == 2
    assert [path.name for path in peak_rates.cache_file().parent.iterdir()] == ["peaks.json"]


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"KEY": 1}', '{"KEY": {"rates": [], "date": "2026"}}', "\0"])
def test_a_damaged_file_is_measured_over(measured, damage):
    timer, file = bench.Timer("cpu"), peak_rates.cache_file()
    file.parent.mkdir(parents=True)
    file.write_text(damage.replace("KEY", peak_rates.machine_key("cpu").replace("\\", "\\\\").replace('"', '\\"')))
    assert bench.peaks(timer).source == "measured"
    assert bench.peaks(timer).source != "measured"


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan"), "1e9", None])
def test_rates_that_are_none_are_measured_over(measured, rate):
    timer = bench.Timer("cpu")
    peak_rates._keep(peak_rates.machine_key("cpu"), {"rates": {**RATES, PEAKS[1]: rate}, "date": "2026-01-01"})
    assert bench.peaks(timer).rates == RATES


def test_without_a_place_to_keep_them_they_are_measured(measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert bench.peaks(bench.Timer("cpu")).source == "measured"


def test_a_busy_machine_is_not_what_is_kept(measured, monkeypatch):
    monkeypatch.setattr(peak_rates, "_is_busy", lambda: True)
    for _ in range(2):
        assert bench.peaks(bench.Timer("cpu")).source == "measured"


# ---- products without a fast path


def slow_guard(rate=1e6):
    return SlowProductGuard((torch.bfloat16, torch.float16), 1.0, lambda kind, dtype: rate)


def products(dtype):
    x, w = (torch.randn(256, 256, dtype=dtype, requires_grad=True) for _ in range(2))
    picture, kernel = torch.randn(2, 32, 32, 32, dtype=dtype), torch.randn(32, 32, 3, 3, dtype=dtype)
    q = torch.randn(1, 2, 128, 64, dtype=dtype, requires_grad=True)
    batched = torch.randn(4, 128, 128, dtype=dtype)
    return {
        "products": [lambda: x @ w, lambda: F.linear(x, w, x[0]), lambda: batched @ batched],
        "convolution": [lambda: F.conv2d(picture, kernel)],
        "attention": [lambda: F.scaled_dot_product_attention(q, q, q)],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["products", "convolution", "attention"])
def test_a_slow_product_is_refused_before_it_runs(kind, dtype):
    for call in products(dtype)[kind]:
        reason = rf"not run: {str(dtype)[6:]} {kind} at 0.001 GFLOP/s here, would take \d+ s"
        with pytest.raises(TooSlow, match=reason), slow_guard():
            call()
        with slow_guard(rate=1e15):
            call()
    for call in products(torch.float32)[kind]:
        with slow_guard():
            call()


def test_a_slow_backward_pass_is_refused():
    for call in (products(torch.bfloat16)[kind][0] for kind in ("products", "attention")):
        out = call()
        with pytest.raises(TooSlow), slow_guard():
            out.sum().backward()


def test_many_small_products_are_refused_when_the_time_is_over(monkeypatch):
    x = torch.randn(128, 128, dtype=torch.bfloat16)
    watch = SlowProductGuard((torch.bfloat16,), 10.0, lambda kind, dtype: 1e9)
    with watch:
        x @ x
        watch.begin -= 10.0  # as if ten seconds had passed
        with pytest.raises(TooSlow):
            x @ x


def test_flops_are_those_of_the_shapes():
    mm, convolution = torch.ops.aten.mm.default, torch.ops.aten.convolution.default
    assert guard.flops_of(mm, (torch.empty(3, 5), torch.empty(5, 7)), {}) == 2 * 3 * 5 * 7
    args = (torch.empty(2, 3, 8, 8), torch.empty(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert guard.flops_of(convolution, args, {}) == 2 * 2 * 8 * 8 * 3 * 4 * 9


@pytest.mark.parametrize("kind", ["products", "convolution", "attention"])
@pytest.mark.parametrize("backward", ["", " backward"])
def test_small_products_have_a_rate(kind, backward):
    assert 1e6 < guard.small_rate(kind + backward, torch.float32) < 1e15


def test_a_dtype_is_slow_beside_float32():
    assert guard.slow_dtypes(Peaks(RATES, "measured")) == (torch.bfloat16, torch.float16)
    assert guard.slow_dtypes(Peaks({**RATES, PEAKS[2]: 2e11}, "measured")) == ()


def measure(monkeypatch, ours, peers, flops=0):
    monkeypatch.setattr(guard, "small_rate", lambda kind, dtype: 1e6)
    monkeypatch.setattr("dalle_fast.bench.table.small_rate", guard.small_rate)
    row = bench.Row("row bfloat16", ours, lambda: 0.0, 1e-3, bytes=8, flops=flops, peers=peers)
    return bench.measure(row, bench.Timer("cpu", 0.01), Peaks(RATES, "measured"))


def test_a_slow_peer_is_a_line_of_the_table(monkeypatch):
    slow, fast = (products(dtype)["products"][0] for dtype in (torch.bfloat16, torch.float32))
    peers = {"slow": lambda: slow, "fast": lambda: fast, "slow compiled": lambda: slow}
    row = measure(monkeypatch, fast, peers, flops=1 << 25)
    for name in ("slow", "slow compiled"):
        assert row["peers"][name] == "not run: bfloat16 products at 0.001 GFLOP/s here, would take 34 s or more"
    assert row["peers"]["fast"]["ratio"] > 0


def test_a_slow_row_is_skipped_and_no_failure(monkeypatch, tmp_path):
    row = measure(monkeypatch, products(torch.bfloat16)["products"][0], {})
    table = {"peaks": RATES, "peaks_source": "measured", "rows": [row]}
    assert bench.failures(table) == []
    path = bench.save(table, tmp_path, bench.machine())
    report = bench.load(path)
    for text in (bench.show(table), bench.markdown(report), path.with_suffix(".html").read_text()):
        assert "not run: bfloat16 products" in text
    assert "`row`" not in bench.summary([report])


def test_a_function_slower_than_its_budget_is_called_once():
    calls = []
    timer = bench.Timer("cpu", budget=10.0)
    timer.once = lambda function: calls.append(function()) or {"slow": 11.0, "fast": 4.0}[calls[-1]]
    timings = timer.compare({"slow": lambda: "slow", "fast": lambda: "fast"})
    assert timings["slow"].median == 11.0
    assert calls.count("slow") == 1
    assert calls.count("fast") == 4


def test_results_of_before_are_read(tmp_path):
    old = {"date": "2026-01-02", "machine": {"device": "x"}, "table": {"roofs": RATES, "rows": []}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert bench.load(tmp_path / "old.json")["table"]["peaks"] == RATES


def test_every_level_is_timed_and_held_to_the_bound():
    (result,) = bench.measure_levels(0.01, "^null$", say=lambda line: None)
    names = [name for name, number in _backend.CPU_LEVELS.items() if number in _backend.usable_cpu_levels()]
    assert list(result["ms"]) == list(result["error"]) == names
    assert bench.wrong_levels([result]) == []
    result["error"][names[0]] = float("nan")
    (line,) = bench.wrong_levels([result])
    assert f"at {names[0]}: error nan" in line
