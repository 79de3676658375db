# SPDX-License-Identifier: MIT
"""The main job from end to end: dVAE, CLIP, transformer, samples, ranking, evaluation, one report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .errors import ConfigError
from .evaluate import EvaluationOptions, run_evaluation, write_report
from .presets import PRESETS, preset
from .sample import System
from .train import run

# Shares of the time; the rest is for sampling and evaluation. Shapes are easy to see and hard to combine.
_SHARES = {
    "emoji": {"dvae": 0.35, "clip": 0.07, "dalle": 0.48},
    "shapes": {"dvae": 0.20, "clip": 0.05, "dalle": 0.67},
}


def run_demo(
    minutes: float = 16.0, run_dir: Path | str = "runs/demo", data: str = "emoji", quiet: bool = False
) -> Path:
    """Trains the whole system in about `minutes` on this machine and writes `report.html`; a second call goes on.

    Args:
        minutes: of training and evaluation together.
        run_dir: folder of the three runs and the report.
        data: "emoji" or "shapes".
        quiet: print nothing.

    Returns:
        The report.

    Raises:
        ConfigError: bad arguments.
        Interrupted: Ctrl-C; the same call goes on.
    """
    if not 0 < minutes < 1e5:
        raise ConfigError(f"minutes: expected a positive number, got {minutes}")
    if data not in PRESETS["dalle"] or data.startswith("paper"):
        raise ConfigError(f"data: expected emoji or shapes, got {data!r}")
    run_dir = Path(run_dir)
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    started = time.monotonic()
    names = {
        "dvae": "1/4 dVAE: pictures to tokens and back",
        "clip": "2/4 CLIP: ranks pictures against captions",
        "dalle": "3/4 transformer: captions to tokens",
    }
    for stage, share in _SHARES[data].items():
        say(names[stage])
        result = run(preset(stage, data), run_dir / stage, minutes=minutes * share, quiet=quiet)
        shown = {k.removeprefix("eval/"): v for k, v in result.metrics.items() if k.startswith("eval/")}
        say(f"    {result.step} updates, " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))

    say("4/4 samples of captions never seen in training, ranked and evaluated")
    system = System.load(run_dir)
    count = 32 if minutes >= 8 else 8
    options = EvaluationOptions(num_captions=count, num_samples=8)
    evaluation = run_evaluation(system, data, options, progress=None if quiet else _Progress())
    paths = write_report(evaluation, run_dir, title=f"dalle_fast demo: {data}")
    say(_summary(evaluation.numbers))
    say(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Look at {paths['report']}\nNext:")
    caption = evaluation.samples.get("heldout", evaluation.samples["seen"])[0][0]
    say(f'  dalle-fast sample --run {run_dir} --caption "{caption}" --num-samples 16')
    say(f'  dalle-fast complete --run {run_dir} --caption "{caption}" --image YOUR.png --keep-rows 4')
    say("  dalle-fast train dvae --preset emoji --data YOUR_FOLDER --run runs/mine/dvae --minutes 30")
    return paths["report"]


def _summary(numbers: dict) -> str:
    lines = []
    for split, label in (("seen", "seen"), ("heldout", "held-out")):
        if split not in numbers:
            continue
        n = numbers[split]
        line = f"    {label}: reconstruction mse {n['mse']:.4f}, image-token loss {n['image_loss']:.3f}"
        if "accuracy_best_of" in n:
            line += f", exact-checker accuracy {list(n['accuracy_best_of'].values())[-1]:.2f}"
        lines.append(line)
    return "\n".join(lines)


class _Progress:
    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"    {what}: {done}/{total}", file=sys.stderr, flush=True)
