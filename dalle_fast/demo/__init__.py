# SPDX-License-Identifier: MIT
"""The main job from end to end: dVAE, CLIP, transformer, samples, ranking, evaluation, one report."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluate import Evaluation, EvaluationOptions, judge_lines, run_evaluation, write_report
from ..presets import preset
from ..sample import SampleOptions, System
from ..train import run
from ..train.config import with_steps
from .measure import measure
from .plan import LOOKS, MINUTES, NAMES, STAGES, Plan, make_plan
from .shipped import Shipped

QUALITY = {"kind": 0.6, "tone": 0.9}
"""Shares of held-out captions, best of eight by CLIP, that the updates of the presets are meant to reach."""
_SAMPLES = SampleOptions(num_samples=8, temperature=0.5, guidance_scale=1.5)
"""The presets' transformers learn from pairs without captions too: guidance is right in more kinds."""
_RULES = {
    "dvae": "pictures to tokens and back",
    "clip": "ranks pictures against captions",
    "dalle": "captions to tokens",
}


def run_demo(
    minutes: float | None = None, run_dir: Path | str = "runs/demo", data: str = "emoji", quiet: bool = False
) -> Path:
    """Trains the whole system to a quality, and writes `report.html`; a second call goes on.

    The presets say how many updates are meant to reach the quality. A few updates of each stage are timed first; where
    all do not fit into `minutes`, each stage gets the same share of them. Nothing looks at the held-out captions to
    decide when to stop.

    Args:
        minutes: allowed for everything together; None: 25, or what the folder's demo was planned for.
        run_dir: folder of the plan, the three runs and the report.
        data: "emoji" or "shapes".
        quiet: print nothing.

    Returns:
        The report.

    Raises:
        ConfigError: bad arguments, or the folder holds another demo.
        Interrupted: Ctrl-C; the same call goes on.
    """
    if minutes is not None and not 0 < minutes < 1e5:
        raise ConfigError(f"minutes: expected a positive number, got {minutes}")
    if data not in ("emoji", "shapes"):
        raise ConfigError(f"data: expected emoji or shapes, got {data!r}")
    run_dir = Path(run_dir)
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    started = time.monotonic()
    shipped = Shipped.open(data)
    if shipped is not None:
        path = shipped.draw_sheet(run_dir)
        say(f"Drawn in {shipped.seconds:.0f} s by the system that ships, trained before: {path}")
    plan = _planned(run_dir, data, minutes, started, shipped, say)
    say(plan.describe())
    for stage in STAGES:
        plan = _train(stage, plan, run_dir, say, quiet)
    say("4/4 samples of seen captions and of ones never in training, ranked and judged")
    progress = None if quiet else _Progress()
    options = EvaluationOptions(
        num_captions=plan.num_captions,
        num_samples=_SAMPLES.num_samples,
        temperature=_SAMPLES.temperature,
        guidance_scale=_SAMPLES.guidance_scale,
    )
    evaluation = run_evaluation(System.load(run_dir), data, options, progress=progress)
    beside = None if shipped is None or plan.minutes < 4 else shipped.evaluate(data, options, progress)
    paths = write_report(evaluation, run_dir, title=f"dalle_fast demo: {data}", beside=beside)
    say(summary(evaluation, plan, beside))
    say(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Look at {paths['report']}\nNext:")
    caption = evaluation.samples.get("heldout", evaluation.samples["seen"])[0][0]
    say(f'  dalle-fast sample --run {run_dir} --caption "{caption}" --num-samples 16')
    say(f'  dalle-fast complete --run {run_dir} --caption "{caption}" --image YOUR.png --keep-rows 4')
    say("  dalle-fast train dvae --preset emoji --data YOUR_FOLDER --run runs/mine/dvae --minutes 30")
    return paths["report"]


def _planned(
    run_dir: Path,
    data: str,
    minutes: float | None,
    started: float,
    shipped: Shipped | None,
    say: Callable[[str], None],
) -> Plan:
    """The folder's plan, or a new one for what is measured here."""
    plan = Plan.load(run_dir)
    if plan is not None:
        for name, asked, stored in (("data", data, plan.data), ("minutes", minutes or plan.minutes, plan.minutes)):
            if asked != stored:
                raise ConfigError(
                    f"{name}: the demo in {run_dir} was planned with {stored!r}, now {asked!r} is asked for; "
                    "choose another --run folder or the old value"
                )
        say(f"Goes on in {run_dir}.")
        return plan
    say("Measuring a few updates of each stage ...")
    configs = {stage: preset(stage, data) for stage in STAGES}
    allowed = minutes or MINUTES
    costs, caption_seconds = measure(configs, _SAMPLES, limit=min(2.0, 0.6 * allowed))
    updates = {stage: config.loop.steps for stage, config in configs.items()}
    reserved = time.monotonic() - started + (0.0 if shipped is None else shipped.evaluation_seconds)
    plan = make_plan(data, allowed, updates, costs, caption_seconds, reserved)
    plan.save(run_dir)
    return plan


def stage_config(plan: Plan, stage: str) -> Any:
    """The train config of a stage with the plan's updates."""
    config = with_steps(preset(stage, plan.data), plan.steps[stage])
    every = -(-plan.steps[stage] // LOOKS)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, sample_every=every))


def _train(stage: str, plan: Plan, run_dir: Path, say: Callable[[str], None], quiet: bool) -> Plan:
    """Trains a stage, or goes on; the plan with what it took."""
    say(f"{STAGES.index(stage) + 1}/4 {NAMES[stage]}: {_RULES[stage]}")
    begun = {name for name in STAGES if (run_dir / name / "config.toml").exists()}
    if stage not in begun:
        fitted = plan.fitted(begun)
        if fitted.steps != plan.steps:
            say(f"    {plan.steps[stage]} updates were planned; {fitted.steps[stage]} fit in what is left")
        plan = fitted
        plan.save(run_dir)
    begin = time.monotonic()
    try:
        result = run(stage_config(plan, stage), run_dir / stage, quiet=quiet)
    finally:
        taken = plan.spent.get(stage, 0.0) + time.monotonic() - begin
        plan = dataclasses.replace(plan, spent={**plan.spent, stage: taken})
        plan.save(run_dir)
    shown = {k.removeprefix("eval/"): v for k, v in result.metrics.items() if k.startswith("eval/")}
    say(f"    {result.step} updates, " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    return plan


def summary(evaluation: Evaluation, plan: Plan, beside: tuple[str, Evaluation] | None = None) -> str:
    """What the terminal shows at the end: losses, the judge's table, and whether the quality was reached."""
    numbers = evaluation.numbers
    lines = []
    for split, label in (("seen", "seen"), ("heldout", "held out")):
        if split not in numbers:
            continue
        n = numbers[split]
        line = f"    {label}: reconstruction mse {n['mse']:.4f}, image-token loss {n['image_loss']:.3f}"
        if "accuracy_best_of" in n:
            line += f", exact-checker accuracy {list(n['accuracy_best_of'].values())[-1]:.2f}"
        lines.append(line)
    lines += judge_lines(numbers)
    if beside is not None:
        lines += ["", f"    The same by {beside[0]}:", *judge_lines(beside[1].numbers)]
    lines += _verdict(numbers.get("heldout", {}), plan)
    return "\n".join(lines)


def _verdict(heldout: dict[str, Any], plan: Plan) -> list[str]:
    """Whether the quality was reached, in numbers, and what would reach it."""
    shares = {
        label: list(heldout[f"{label}_best_of"].values())[-1] for label in QUALITY if f"{label}_best_of" in heldout
    }
    if not shares:
        return []
    text = ", ".join(f"{label} {share:.2f} (asked for: {QUALITY[label]})" for label, share in shares.items())
    if all(share >= QUALITY[label] for label, share in shares.items()):
        return ["", f"    Held out: {text}: reached."]
    lines = ["", f"    Held out: {text}: not reached."]
    if plan.share < 0.999:
        lines.append(
            f"    This run had {plan.share:.1%} of the updates. All of them: "
            f"dalle-fast demo --minutes {-(-plan.minutes_for_all() // 1):.0f} --run runs/longer"
        )
    else:
        error = (0.25 / plan.num_captions) ** 0.5
        lines.append(f"    All updates were done; {plan.num_captions} captions tell shares to about {error:.2f}.")
    return lines


class _Progress:
    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"    {what}: {done}/{total}", file=sys.stderr, flush=True)
