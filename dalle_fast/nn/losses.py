# SPDX-License-Identifier: MIT
"""The dVAE's pixel map, reconstruction likelihood and KL term (paper appendix A.2, A.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

PIXEL_EPS = 0.1


def map_pixels(x: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] -> (1 - 2 eps) x + eps with eps = 0.1: away from the poles of the logit (appendix A.3)."""
    return (1 - 2 * PIXEL_EPS) * x + PIXEL_EPS


def unmap_pixels(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `map_pixels`, clamped to [0, 1]."""
    return ((x - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)).clamp(0, 1)


def logit_laplace_nll(stats: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of mapped pixels under the logit-Laplace distribution (appendix A.3).

    -ln f(x | mu, b) = ln 2 + ln b + ln x + ln(1 - x) + |logit(x) - mu| / b.

    Args:
        stats: [B, 2 C, H, W], mu in the first C channels and ln b in the others.
        x: [B, C, H, W] in (0, 1), from `map_pixels`.

    Returns:
        [B, C, H, W] float32, in nats.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if stats.dim() != 4 or x.dim() != 4 or stats.shape[1] != 2 * x.shape[1] or stats.shape[2:] != x.shape[2:]:
        raise ValueError(f"stats: expected [B, 2 C, H, W] for x of {list(x.shape)}, got {list(stats.shape)}")
    mu, log_b = stats.float().chunk(2, dim=1)
    x = x.float()
    log_x, log_1mx = x.log(), (1 - x).log()
    return math.log(2) + log_b + log_x + log_1mx + (log_x - log_1mx - mu).abs() * torch.exp(-log_b)


def categorical_kl(logits: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """KL(softmax(logits) || uniform) in nats per cell: sum q ln q + ln V, from the unrelaxed logits (section 2.1).

    Args:
        logits: any shape; `dim` holds the V codes.

    Returns:
        `logits` without `dim`, float32.
    """
    log_q = F.log_softmax(logits.float(), dim=dim)
    return (log_q.exp() * log_q).sum(dim) + math.log(logits.shape[dim])
