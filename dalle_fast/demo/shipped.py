# SPDX-License-Identifier: MIT
"""The system that ships in the package: a first sheet in seconds, and something to compare with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from ..data import open_dataset
from ..evaluate import Evaluation, EvaluationOptions, run_evaluation
from ..sample import SampleOptions, System, contact_sheet
from ..sample.pretrained import find

LABEL = "the system that ships, trained before and not by this demo"
_CAPTIONS, _SAMPLES = 6, 4  # of the first sheet
_SECONDS = 30.0  # for the comparison


class Shipped:
    """A trained system and how fast it draws here."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.seconds = 0.0
        """For the first sheet."""

    @classmethod
    def open(cls, name: str) -> Shipped | None:
        """The system of that name; None where none ships."""
        folder = find(name)
        return None if folder is None else cls(System.load(folder))

    def draw_sheet(self, run_dir: Path) -> Path:
        """Writes `pretrained.png`: held-out captions, originals and samples."""
        begin = time.monotonic()
        size = self.system.dvae.config.image_size
        dataset = open_dataset("emoji", "heldout", size)
        chosen = [dataset[i * len(dataset) // _CAPTIONS] for i in range(_CAPTIONS)]
        options = SampleOptions(num_samples=_SAMPLES, temperature=0.5)
        rows = [[s.image, *self.system.sample(s.caption, options).images] for s in chosen]
        headers = ["original"] + [f"sample {i + 1}" for i in range(_SAMPLES)]
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "pretrained.png"
        contact_sheet(rows, [s.caption for s in chosen], headers=headers).save(path)
        self.seconds = time.monotonic() - begin
        return path

    def _captions(self, options: EvaluationOptions) -> int:
        each = max(self.seconds, 1e-3) / _CAPTIONS * options.num_samples / _SAMPLES
        return min(max(int(_SECONDS / each), _CAPTIONS), options.num_captions)

    @property
    def evaluation_seconds(self) -> float:
        """What `evaluate` may take."""
        return _SECONDS

    def evaluate(
        self, data: str, options: EvaluationOptions, progress: Callable[[str, int, int], None] | None
    ) -> tuple[str, Evaluation]:
        """(what it is, its evaluation) on as many held-out captions as fit in half a minute."""
        options = dataclasses.replace(options, num_captions=self._captions(options), num_losses=64)
        return LABEL, run_evaluation(self.system, data, options, splits=("heldout",), progress=progress)
