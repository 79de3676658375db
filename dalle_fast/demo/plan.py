# SPDX-License-Identifier: MIT
"""What the demo does in the time that it has: all updates of the presets if they fit, else the same share of each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..files import parse_json, read_bytes
from ..models.store import write_atomic

STAGES = ("dvae", "clip", "dalle")
NAMES = {"dvae": "dVAE", "clip": "CLIP", "dalle": "transformer"}
MINUTES = 25.0  # allowed where nothing else is said
LOOKS = 4  # at held-out losses and pictures, in each stage
_MIN_STEPS = 10
_CAPTIONS = 64  # of each split, sampled and judged at the end
_MIN_CAPTIONS = 4
_SAMPLING_SHARE = 0.12  # of the time, where not everything fits
_REPORT = 5.0  # seconds for losses, judge, charts and the report


@dataclass(frozen=True)
class StageCost:
    """What a stage costs on this machine, in seconds."""

    setup: float
    """Before the second update: weights, data, and what is computed once."""
    update: float
    """Each update."""
    look: float
    """Held-out losses and pictures, once."""
    batch_size: int
    """Samples in an update."""

    def seconds(self, steps: int) -> float:
        """Of so many updates."""
        return self.setup + steps * self.update + LOOKS * self.look


@dataclass(frozen=True)
class Plan:
    """What is done, what it will take and what it has taken so far; kept as plan.json in the demo's folder."""

    data: str
    minutes: float
    """Allowed in all."""
    updates: dict[str, int]
    """stage -> updates of the presets, which are meant to reach the quality."""
    costs: dict[str, StageCost]
    caption_seconds: float
    """For sampling one caption."""
    reserved: float = 0.0
    """Seconds for what comes before and after: measuring, the system that ships."""
    steps: dict[str, int] = field(default_factory=dict)
    """stage -> updates to do."""
    num_captions: int = _CAPTIONS
    """Captions of each split to sample at the end."""
    spent: dict[str, float] = field(default_factory=dict)
    """stage -> seconds of training so far."""

    @property
    def share(self) -> float:
        """Of the presets' updates, the least over the stages."""
        return min(self.steps[stage] / self.updates[stage] for stage in STAGES)

    def expected(self, slower: float = 1.0) -> dict[str, float]:
        """stage, "samples" and "other" -> seconds."""
        times = {stage: slower * self.costs[stage].seconds(self.steps[stage]) for stage in STAGES}
        return {**times, "samples": slower * self._sampling() + _REPORT, "other": self.reserved}

    def minutes_for_all(self) -> float:
        """What every update would take on this machine."""
        whole = dataclasses.replace(self, steps=dict(self.updates), num_captions=_CAPTIONS)
        return sum(whole.expected().values()) / 60

    def _sampling(self) -> float:
        return 2 * self.num_captions * self.caption_seconds

    def fitted(self, done: frozenset[str] | set[str] = frozenset()) -> Plan:
        """The plan with the updates that fit, for the stages that have not begun.

        Never more than those of the presets. Stages that took longer than expected leave less to the others:
        they are taken to be as much slower.

        Args:
            done: stages whose updates are fixed, since they have begun.
        """
        left = [stage for stage in STAGES if stage not in done]
        known = [stage for stage in done if stage in self.spent]
        used = sum(self.spent[stage] for stage in known)
        predicted = sum(self.costs[stage].seconds(self.steps[stage]) for stage in known)
        slower = max(1.0, used / predicted) if known else 1.0
        room = self.minutes * 60 - used - self.reserved - _REPORT
        captions = self.num_captions
        if not done:
            captions = _CAPTIONS
            if room < 2 * captions * self.caption_seconds + sum(self.costs[s].seconds(self.updates[s]) for s in left):
                fit = int(_SAMPLING_SHARE * room / (2 * max(self.caption_seconds, 1e-9)))
                captions = min(max(fit, _MIN_CAPTIONS), _CAPTIONS)
        room = room / slower - 2 * captions * self.caption_seconds
        room -= sum(self.costs[stage].seconds(0) for stage in left)
        wanted = sum(self.updates[stage] * self.costs[stage].update for stage in left)
        share = min(1.0, max(room, 0.0) / max(wanted, 1e-9))
        least = {stage: min(_MIN_STEPS, self.updates[stage]) for stage in left}
        steps = {stage: max(least[stage], math.floor(self.updates[stage] * share + 1e-9)) for stage in left}
        return dataclasses.replace(self, steps={**self.steps, **steps}, num_captions=captions)

    def describe(self) -> str:
        """The measured rates and the expected time, in two lines or three."""
        rates = []
        for stage, what in (("dvae", "pictures"), ("clip", "pairs"), ("dalle", "pairs")):
            rates.append(f"{NAMES[stage]} {self.costs[stage].batch_size / self.costs[stage].update:.0f} {what}/s")
        times = self.expected()
        parts = [f"{NAMES.get(stage, stage)} {_minutes(seconds)}" for stage, seconds in times.items() if seconds >= 0.5]
        text = f"This machine: {', '.join(rates)}.\n"
        text += f"Expect {_minutes(sum(times.values()))} minutes: {', '.join(parts)}."
        if self.share < 0.999:
            text += (
                f"\n{self.minutes:g} minutes are allowed (--minutes): enough for {_percent(self.share)} of the updates "
                f"of the presets. All of them take about {math.ceil(self.minutes_for_all())} minutes here."
            )
        return text

    def save(self, folder: Path) -> None:
        """Writes plan.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "plan.json", json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """Reads plan.json; None where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = folder / "plan.json"
        if not path.exists():
            return None
        try:
            values = parse_json(read_bytes(path))
            costs = {stage: StageCost(**cost) for stage, cost in values.pop("costs").items()}
            plan = cls(costs=costs, **values)
            if any(stage not in table for stage in STAGES for table in (plan.updates, plan.costs, plan.steps)):
                raise KeyError("stage")
            return plan
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as the plan of a demo ({error}); remove the folder"
            ) from error


def make_plan(
    data: str,
    minutes: float,
    updates: Mapping[str, int],
    costs: Mapping[str, StageCost],
    caption_seconds: float,
    reserved: float = 0.0,
) -> Plan:
    """The plan of a machine with these costs; see `Plan`."""
    plan = Plan(data, minutes, dict(updates), dict(costs), caption_seconds, reserved, dict(updates))
    return plan.fitted()


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


def _minutes(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f}" if minutes >= 9.95 else f"{minutes:.1f}"
