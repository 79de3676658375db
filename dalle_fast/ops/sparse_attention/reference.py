# SPDX-License-Identifier: MIT
"""Sparse attention in plain torch: the full score matrix, masked."""

from __future__ import annotations

import torch

from ..pattern import AttentionPattern


def sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The plain twin of `sparse_attention`; 16-bit inputs are computed in float32."""
    compute = q.dtype if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (t.to(compute).repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.to(compute) @ keys.transpose(-1, -2) * scale
    mask = pattern.mask(q.shape[2]).to(q.device)
    return (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ values).to(q.dtype)
