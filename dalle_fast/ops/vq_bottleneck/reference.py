# SPDX-License-Identifier: MIT
"""The discrete bottleneck of the dVAE in plain torch (paper section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..gumbel_softmax.reference import gumbel_noise, kl_to_uniform


def vq_bottleneck_reference(
    x: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    codebook: torch.Tensor,
    tau: float,
    seed: int = 0,
    offset: int = 0,
    *,
    codebook_bias: torch.Tensor | None = None,
    row_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin of `vq_bottleneck`; float64 computes in float64, other dtypes in float32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    cast = lambda t: None if t is None else t.to(compute)  # noqa: E731
    channels_last = x.movedim(1, -1)  # [B, h, w, C] or [N, C]
    logits = F.linear(cast(channels_last), cast(head_weight.flatten(1)), cast(head_bias))
    num_codes = logits.shape[-1]
    noise = gumbel_noise(
        logits.shape[:-1].numel(), num_codes, seed=seed, offset=offset, row_offset=row_offset, device=x.device
    )
    y = torch.softmax((logits + noise.to(compute).view(logits.shape)) / tau, -1)
    out = F.linear(y, cast(codebook.flatten(1)), cast(codebook_bias)).to(x.dtype)
    return out.movedim(-1, 1), kl_to_uniform(logits)
