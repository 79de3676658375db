# SPDX-License-Identifier: MIT
"""Gumbel-softmax in plain torch (paper section 2.1): y = softmax((logits + g) / tau), g = -ln(-ln u).

The noise is a pure function of (seed, offset, row, code), so it can be drawn anywhere, in any order, again and again.
"""

from __future__ import annotations

import math

import torch

from ..philox import uniform

_LEAST_LOG = -100.0  # of a probability: 0 * -Inf would not be 0


def gumbel_noise(
    num_rows: int, num_codes: int, *, seed: int, offset: int, row_offset: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """Standard Gumbel draws, exact to float64.

    Row r, code c takes word c % 4 of Philox4x32-10 with key = seed (low, high word) and counter =
    (c // 4, row_offset + r, low and high word of offset); u = (word >> 8 + 0.5) * 2^-24, open at both ends.

    Args:
        num_rows: rows R.
        num_codes: codes V.
        seed: 64 bits, signed or unsigned.
        offset: 64 bits, signed or unsigned.
        row_offset: number of the first row; rows are counted modulo 2^32.
        device: where to put them.

    Returns:
        [R, V], float64.
    """
    # In float64 both u and 1 - u are exact, so -ln u keeps its accuracy near u = 1.
    return -torch.log(-torch.log(uniform(seed, offset, num_rows, num_codes, row_offset, device)))


def kl_to_uniform(logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) || uniform) = sum q ln q + ln V over the last dimension, in nats."""
    log_q = torch.log_softmax(logits, -1)
    return (log_q.exp() * log_q.clamp_min(_LEAST_LOG)).sum(-1) + math.log(logits.shape[-1])


def gumbel_softmax_reference(
    logits: torch.Tensor,
    tau: float,
    dim: int = 1,
    seed: int = 0,
    offset: int = 0,
    hard: bool = False,
    *,
    return_kl: bool = False,
    row_offset: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The plain twin of `gumbel_softmax`; float64 computes in float64, other dtypes in float32."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    last = logits.movedim(dim, -1)  # [..., V], rows in logical order
    num_codes = last.shape[-1]
    if (hard or return_kl) and num_codes == 0:
        raise ValueError(f"logits: expected at least one code in dim {dim}, got shape {list(logits.shape)}")
    num_rows = last.numel() // max(num_codes, 1)
    noise = gumbel_noise(num_rows, num_codes, seed=seed, offset=offset, row_offset=row_offset, device=logits.device).to(
        compute
    )
    perturbed = last.to(compute) + noise.reshape(last.shape)
    if hard:
        sample = perturbed.argmax(-1)
    else:
        sample = torch.softmax(perturbed / tau, -1).to(logits.dtype).movedim(-1, dim)
    return (sample, kl_to_uniform(last.to(compute))) if return_kl else sample
