# SPDX-License-Identifier: MIT
"""What is on its way in one backward pass of PowerSGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from .matrices import Entry, Matrix


class Verdict(NamedTuple):
    """In how many ranks a part of a matrix's step was not finite, and whether E was so here."""

    grad: float
    error: float
    p: float
    r: float
    error_here: float


@dataclass
class Plain:
    """Uncompressed gradients on their way, float32 in one dimension."""

    gradients: list[tuple[Entry, torch.Tensor]]
    flat: torch.Tensor
    work: dist.Work | None

    def parts(self) -> list[torch.Tensor]:
        return list(self.flat.split([grad.numel() for _, grad in self.gradients]))


@dataclass
class Block:
    """Gradients that became ready together."""

    gradients: list[tuple[Entry, torch.Tensor]]  # of the parameters' local shapes; written in the end
    when_done: Callable[[], None] | None
    matrices: list[Matrix] = field(default_factory=list)
    plain: list[Plain] = field(default_factory=list)
    bases: list[torch.Tensor] = field(default_factory=list)  # P, orthonormal
    factors: list[torch.Tensor] = field(default_factory=list)  # R = E^T P, averaged
    norm: torch.Tensor | None = None  # of all R
    failed: torch.Tensor | None = None  # [matrices, 4]: 1 where gradient, E, P, R is not finite here
    verdicts: list[Verdict] = field(default_factory=list)  # one a matrix
