# SPDX-License-Identifier: MIT
"""The demo: its plan on fast and slow machines, and a run as short as it gets; a second call goes on."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny import clip_config, dalle_config, dvae_config, small_system

from dalle_fast import demo
from dalle_fast.demo import run_demo
from dalle_fast.demo.measure import measure
from dalle_fast.demo.plan import STAGES, Plan, StageCost, make_plan
from dalle_fast.demo.shipped import Shipped
from dalle_fast.errors import CheckpointError, ConfigError
from dalle_fast.sample import SampleOptions

UPDATES = {"dvae": 1200, "clip": 300, "dalle": 1200}


def _costs(speed: float = 1.0) -> dict[str, StageCost]:
    """Of a machine `speed` times as fast as two old cores."""
    slow = {"dvae": (2.0, 0.17, 0.5, 32), "clip": (1.0, 0.4, 0.5, 128), "dalle": (5.0, 0.73, 5.0, 32)}
    return {s: StageCost(a / speed, u / speed, k / speed, batch) for s, (a, u, k, batch) in slow.items()}


def _plan(speed: float = 1.0, minutes: float = 25.0, reserved: float = 20.0) -> Plan:
    return make_plan("emoji", minutes, UPDATES, _costs(speed), 0.8 / speed, reserved)


@pytest.mark.parametrize("speed", [1.0, 3.0, 100.0])
def test_a_machine_that_can_do_all_updates_does_exactly_those(speed):
    plan = _plan(speed)
    assert plan.steps == UPDATES
    assert plan.num_captions == 64
    assert plan.share == 1
    assert sum(plan.expected().values()) <= 25 * 60
    assert "allowed" not in plan.describe()


def test_a_faster_machine_is_done_sooner():
    times = [sum(_plan(speed).expected().values()) for speed in (1.0, 2.0, 8.0)]
    assert times[0] > times[1] > times[2]
    assert times[2] < 5 * 60


@pytest.mark.parametrize("minutes", [3.0, 10.0, 18.0])
def test_the_cap_scales_all_stages_alike(minutes):
    plan = _plan(minutes=minutes)
    shares = [plan.steps[stage] / UPDATES[stage] for stage in STAGES]
    assert max(shares) < 1
    assert max(shares) - min(shares) < 0.01
    assert 0.95 * minutes * 60 < sum(plan.expected().values()) <= minutes * 60
    assert plan.minutes_for_all() == pytest.approx(sum(_plan(minutes=1e4).expected().values()) / 60)
    text = plan.describe()
    assert f"{minutes:g} minutes are allowed" in text
    assert f"{plan.share:.0%} of the updates" in text


def test_a_very_slow_machine_still_gets_a_plan():
    plan = _plan(speed=0.01)
    assert all(steps >= 10 for steps in plan.steps.values())
    assert plan.num_captions == 4


def test_the_plan_says_what_it_expects():
    text = _plan().describe()
    assert "This machine: dVAE 188 pictures/s, CLIP 320 pairs/s, transformer 44 pairs/s." in text
    assert "Expect 23 minutes: dVAE 3.5, CLIP 2.0, transformer 15, samples 1.8, other 0.3" in text


def test_a_stage_that_was_slower_than_expected_leaves_less_to_the_others():
    plan = _plan()
    spent = {"dvae": 2 * plan.costs["dvae"].seconds(plan.steps["dvae"])}
    late = dataclasses.replace(plan, spent=spent).fitted({"dvae"})
    assert late.steps["dvae"] == plan.steps["dvae"]
    assert late.steps["dalle"] < plan.steps["dalle"]
    assert late.num_captions == plan.num_captions
    rest = late.expected(slower=2.0)
    assert spent["dvae"] + rest["clip"] + rest["dalle"] + rest["samples"] + rest["other"] <= 25 * 60
    early = dataclasses.replace(plan, spent={"dvae": 1.0}).fitted({"dvae"})
    assert early.steps == plan.steps  # never more than what reaches the quality


def test_the_plan_is_kept(tmp_path):
    plan = dataclasses.replace(_plan(), spent={"dvae": 3.5})
    assert Plan.load(tmp_path) is None
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    for damage in ("", "[]", "{}", json.dumps({**json.loads((tmp_path / "plan.json").read_text()), "steps": {}})):
        (tmp_path / "plan.json").write_text(damage)
        with pytest.raises(CheckpointError, match="plan.json: cannot be read as the plan of a demo"):
            Plan.load(tmp_path)


def test_stage_configs_have_the_plans_updates():
    plan = _plan(minutes=10.0)
    for stage in STAGES:
        config = demo.stage_config(plan, stage)
        assert config.loop.steps == plan.steps[stage]
        assert 4 * config.loop.sample_every >= config.loop.steps > 3 * config.loop.sample_every - 12


@pytest.fixture
def tiny_presets(monkeypatch):
    tiny = {"dvae": dvae_config(6), "clip": clip_config(4), "dalle": dalle_config(5)}
    monkeypatch.setattr(demo, "preset", lambda stage, data: tiny[stage])
    monkeypatch.setattr("dalle_fast.demo.plan._CAPTIONS", 4)
    return tiny


def test_costs_are_measured_on_copies(tiny_presets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    costs, caption = measure(tiny_presets, SampleOptions(num_samples=2), limit=0.01)
    assert set(costs) == set(STAGES)
    for stage, cost in costs.items():
        assert cost.batch_size == tiny_presets[stage].loop.batch_size
        assert 0 < cost.update < 60
        assert cost.setup > 0
        assert cost.look > 0
    assert caption > 0
    assert not list(tmp_path.iterdir())


def test_the_demo_ends_with_a_report_and_repeats(tiny_presets, tmp_path, capsys):
    report = run_demo(0.5, tmp_path / "demo")
    out = capsys.readouterr().out
    assert report.stat().st_size > 30_000
    assert str(report) in out
    assert out.count("dalle-fast ") >= 3  # the next commands to try
    assert "This machine: dVAE" in out
    assert "Expect " in out
    assert "skin tone" in out
    assert "ceiling" in out
    assert "(asked for: 0.6)" in out
    assert "not reached" in out
    plan = Plan.load(tmp_path / "demo")
    logs = {stage: (tmp_path / "demo" / stage / "metrics.jsonl").read_text() for stage in STAGES}
    again = run_demo(None, tmp_path / "demo", quiet=True)
    assert again == report
    for stage, text in logs.items():
        assert (tmp_path / "demo" / stage / "metrics.jsonl").read_text() == text
    assert Plan.load(tmp_path / "demo").steps == plan.steps
    with pytest.raises(ConfigError, match="minutes: the demo in .* was planned with 0.5, now 3 is asked for"):
        run_demo(3, tmp_path / "demo")
    with pytest.raises(ConfigError, match="data: the demo in .* was planned with 'emoji', now 'shapes' is asked for"):
        run_demo(None, tmp_path / "demo", data="shapes")


def test_an_interrupted_demo_goes_on_with_its_plan(tiny_presets, tmp_path, monkeypatch, capsys):
    real = demo.run

    def interrupted(config, run_dir, **options):
        if run_dir.name == "clip":
            raise KeyboardInterrupt
        return real(config, run_dir, **options)

    monkeypatch.setattr(demo, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(0.5, tmp_path / "demo", quiet=True)
    plan = Plan.load(tmp_path / "demo")
    assert set(plan.spent) == {"dvae", "clip"}
    monkeypatch.setattr(demo, "run", real)
    monkeypatch.setattr(demo, "measure", lambda *a, **k: pytest.fail("the plan is there already"))
    report = run_demo(None, tmp_path / "demo")
    assert report.exists()
    assert "Goes on in" in capsys.readouterr().out
    after = Plan.load(tmp_path / "demo")
    assert after.steps["dvae"] == plan.steps["dvae"]
    assert after.costs == plan.costs


def test_a_system_that_ships_draws_first_and_is_compared_under_its_own_name(
    tiny_presets, tmp_path, monkeypatch, capsys
):
    from dalle_fast.demo import shipped

    folder = small_system(tmp_path / "shipped")
    monkeypatch.setattr(shipped, "find", lambda name: folder if name == "emoji" else None)
    assert Shipped.open("shapes") is None
    monkeypatch.setattr(shipped, "_CAPTIONS", 2)
    report = run_demo(5, tmp_path / "demo")
    out = capsys.readouterr().out
    assert (tmp_path / "demo" / "pretrained.png").stat().st_size > 1000
    assert out.index("the system that ships") < out.index("Measuring")
    assert f"The same by {shipped.LABEL}" in out
    page = report.read_text()
    assert f"For comparison: {shipped.LABEL}" in page


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match="minutes: expected a positive number"):
        run_demo(0, tmp_path)
    with pytest.raises(ConfigError, match="data: expected emoji or shapes, got 'paper'"):
        run_demo(1, tmp_path, data="paper")
