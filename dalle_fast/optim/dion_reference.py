# SPDX-License-Identifier: MIT
"""One update of a matrix by Dion (Ahn et al. 2025, algorithm 1) in float64: what tests compare with."""

from __future__ import annotations

import torch


def dion_reference(
    weight: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    basis: torch.Tensor,
    *,
    lr: float,
    decay: float = 0.95,
    weight_decay: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight [m, n], momentum [m, n] and basis [n, r] after an update; all float64, none changed in place."""
    total = momentum + grad
    p = torch.linalg.qr(total @ basis).Q
    r = total.t() @ p
    after = total - (1 - decay) * p @ r.t()
    v = r / r.norm(dim=0)
    size = lr * 0.2 * max(weight.shape) ** 0.5
    return (1 - lr * weight_decay) * weight - size * p @ v.t(), after, v
