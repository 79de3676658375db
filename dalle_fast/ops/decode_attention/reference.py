# SPDX-License-Identifier: MIT
"""Decoding attention in plain torch: write the token into its slot, gather what it may see, one softmax."""

from __future__ import annotations

import torch

from ..pattern import AttentionPattern


def decode_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    pattern: AttentionPattern,
    position: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The plain twin of `decode_attention`; mutates the same caches. 16-bit inputs are computed in float32."""
    position = int(position)
    compute = q.dtype if q.dtype == torch.float64 else torch.float32
    batch, num_heads, head_dim = q.shape
    text_len, ring_len = pattern.text_len, image_k.shape[2]
    allowed = pattern.mask()[position]
    if position < text_len:
        text_k[:, :, position], text_v[:, :, position] = k, v
        keys, values = text_k[:, :, : position + 1], text_v[:, :, : position + 1]
    else:
        raster = position - text_len
        image_k[:, :, raster % ring_len], image_v[:, :, raster % ring_len] = k, v
        slots = (allowed[text_len:].nonzero().flatten() % ring_len).to(q.device)
        share = batch // max(text_k.shape[0], 1)
        keys = torch.cat((text_k.repeat_interleave(share, dim=0), image_k[:, :, slots]), dim=2)
        values = torch.cat((text_v.repeat_interleave(share, dim=0), image_v[:, :, slots]), dim=2)
    group = num_heads // k.shape[1]
    keys, values = (t.to(compute).repeat_interleave(group, dim=1) for t in (keys, values))  # [B, H, n, D]
    scale = head_dim**-0.5 if scale is None else scale
    weights = ((keys @ q.to(compute).unsqueeze(-1)).squeeze(-1) * scale).softmax(dim=-1)
    return (weights.unsqueeze(-2) @ values).squeeze(-2).to(q.dtype)
