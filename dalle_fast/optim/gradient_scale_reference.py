# SPDX-License-Identifier: MIT
"""The gradient scale of one resblock as the paper states it (appendix D), in Python floats: what tests compare with."""

from __future__ import annotations

import math


class ResblockScaleReference:
    """One scale.

    Args:
        num_replicas: M, the number of data-parallel replicas.
    """

    def __init__(self, num_replicas: int = 1) -> None:
        self.num_replicas = num_replicas
        self.scale = num_replicas * 2.0**13
        self.num_updates = 0
        self.divided_at: int | None = None

    def update(self, finite: bool) -> None:
        """Takes whether all parameter gradients of the resblock were finite in this update."""
        if finite:
            self.scale *= 2 ** (1 / 1000)
        elif self.divided_at is None or self.num_updates - self.divided_at >= 125:
            self.scale /= math.sqrt(2)
            self.divided_at = self.num_updates
        self.scale = min(max(self.scale, self.num_replicas * 2.0**7), self.num_replicas * 2.0**24)
        self.num_updates += 1
