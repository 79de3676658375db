# SPDX-License-Identifier: MIT
"""Values that change with the update (paper appendix A.2, B.2). Updates count from 0; functions are pure."""

from __future__ import annotations

import math
from typing import Any


def cosine(step: int, start: float, end: float, num_steps: int) -> float:
    """Half a cosine from `start` at update 0 to `end` at update `num_steps`, constant from there on.

    Raises:
        ValueError: `num_steps` is not positive or `step` is negative.
    """
    if num_steps < 1 or step < 0:
        raise ValueError(f"step, num_steps: expected >= 0 and >= 1, got {step}, {num_steps}")
    if step >= num_steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2


def warmup_linear(step: int, peak: float, num_steps: int) -> float:
    """Linear from peak / num_steps at update 0 to `peak` at update num_steps - 1, constant from there on.

    Raises:
        ValueError: `num_steps` is not positive or `step` is negative.
    """
    if num_steps < 1 or step < 0:
        raise ValueError(f"step, num_steps: expected >= 0 and >= 1, got {step}, {num_steps}")
    return peak * min(1.0, (step + 1) / num_steps)


class PlateauHalving:
    """Halves a factor when the training loss has stopped falling, at most five times (appendix B.2: peak / 32).

    The loss is averaged over windows; a plateau is `patience` windows in a row that do not improve on the best by
    `threshold`. The paper says no more than "plateau": these three are ours.

    Args:
        window: updates of a window.
        patience: windows without improvement.
        threshold: relative improvement that counts.
        max_halvings: how often at most.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, window: int = 1000, patience: int = 5, threshold: float = 1e-3, max_halvings: int = 5) -> None:
        if window < 1 or patience < 1 or max_halvings < 0 or not 0 <= threshold < 1:
            raise ValueError(
                "window, patience, max_halvings, threshold: expected >= 1, >= 1, >= 0 and [0, 1), got "
                f"{window}, {patience}, {max_halvings}, {threshold}"
            )
        self.window, self.patience, self.threshold, self.max_halvings = window, patience, threshold, max_halvings
        self._state: dict[str, Any] = {"halvings": 0, "best": math.inf, "bad": 0, "sum": 0.0, "count": 0}

    @property
    def factor(self) -> float:
        """2^-halvings: what the step size is multiplied by."""
        return 0.5 ** self._state["halvings"]

    def update(self, loss: float) -> bool:
        """Takes the loss of one update; True when it halved. A loss that is not finite is passed over."""
        state = self._state
        if not math.isfinite(loss):
            return False
        state["sum"] += loss
        state["count"] += 1
        if state["count"] < self.window:
            return False
        mean = state["sum"] / state["count"]
        state["sum"], state["count"] = 0.0, 0
        if mean < state["best"] - abs(state["best"]) * self.threshold or math.isinf(state["best"]):
            state["best"], state["bad"] = mean, 0
            return False
        state["bad"] += 1
        if state["bad"] < self.patience or state["halvings"] >= self.max_halvings:
            return False
        state["halvings"] += 1
        state["bad"] = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON values that `load_state_dict` takes back."""
        state = dict(self._state)
        state["best"] = None if math.isinf(state["best"]) else state["best"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        missing = set(self._state) - set(state)
        if missing:
            raise ValueError(f"state: expected the keys {sorted(self._state)}, {sorted(missing)} are missing")
        self._state = {**state, "best": math.inf if state["best"] is None else state["best"]}
