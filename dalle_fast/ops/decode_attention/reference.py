# SPDX-License-Identifier: MIT
"""Decoding attention in plain torch: write the token into its slot, gather what it may see, one softmax."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import is_fake

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
    position: int | torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The plain twin of `decode_attention`; mutates the same caches. 16-bit inputs are computed in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(position, torch.Tensor) or is_fake(q):  # whose values nobody can look at
        position = torch.as_tensor(position, device=q.device).reshape(())
        return _at(q, k, v, text_k, text_v, image_k, image_v, pattern, position, scale)
    text_len, ring_len = pattern.text_len, image_k.shape[2]
    if position < text_len:
        text_k[:, :, position], text_v[:, :, position] = k, v
        return _attend(q, text_k[:, :, : position + 1], text_v[:, :, : position + 1], scale)
    raster = position - text_len
    image_k[:, :, raster % ring_len], image_v[:, :, raster % ring_len] = k, v
    slots = (pattern.mask()[position, text_len:].nonzero().flatten() % ring_len).to(q.device)
    share = q.shape[0] // max(text_k.shape[0], 1)
    keys = torch.cat((text_k.repeat_interleave(share, dim=0), image_k[:, :, slots]), dim=2)
    values = torch.cat((text_v.repeat_interleave(share, dim=0), image_v[:, :, slots]), dim=2)
    return _attend(q, keys, values, scale)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, H, D] over [B, Hkv, n, D]; `seen` [n] says which keys count."""
    compute = q.dtype if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // keys.shape[1]
    keys, values = (t.to(compute).repeat_interleave(group, dim=1) for t in (keys, values))  # [B, H, n, D]
    scores = (keys @ q.to(compute).unsqueeze(-1)).squeeze(-1) * scale
    if seen is not None:  # what is not seen may hold anything
        scores = scores.masked_fill(~seen, -torch.inf)
        values = values.masked_fill(~seen[:, None], 0)
    return (scores.softmax(dim=-1).unsqueeze(-2) @ values).squeeze(-2).to(q.dtype)


def _at(q, k, v, text_k, text_v, image_k, image_v, pattern, position, scale):
    """With the position on the device: all slots take part, under a mask, and nothing is read back to the host."""
    text_len, ring_len = pattern.text_len, image_k.shape[2]
    text_batch = text_k.shape[0]
    possible = (position >= (0 if text_batch == q.shape[0] else text_len)) & (position < pattern.length)
    is_text = position < text_len
    raster = position - text_len

    def write(cache: torch.Tensor, slot: torch.Tensor, new: torch.Tensor, wanted: torch.Tensor) -> None:
        old = cache.index_select(2, slot.reshape(1))
        cache.index_copy_(2, slot.reshape(1), torch.where(wanted, new.unsqueeze(2), old))

    for text, image, new in ((text_k, image_k, k), (text_v, image_v, v)):
        if text_batch == q.shape[0] and text_len:
            write(text, position.clamp(0, text_len - 1), new, possible & is_text)
        write(image, raster.remainder(ring_len), new, possible & ~is_text)
    text_seen = ~is_text | (torch.arange(text_len, device=q.device) <= position)
    back = (raster - torch.arange(ring_len, device=q.device)).remainder(ring_len)  # what a slot holds lies so far back
    seen = torch.cat((text_seen, ~is_text & (back <= raster) & _looks_back(pattern, raster, back)))
    share = q.shape[0] // max(text_batch, 1)
    keys = torch.cat((text_k.repeat_interleave(share, dim=0), image_k), dim=2)
    values = torch.cat((text_v.repeat_interleave(share, dim=0), image_v), dim=2)
    return torch.where(possible, _attend(q, keys, values, scale, seen), torch.nan)


def _looks_back(pattern: AttentionPattern, raster: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Whether the image token `raster` sees the one `back` >= 0 before it."""
    width, half = pattern.grid[1], pattern.kernel // 2
    if pattern.kind == "row":
        return back < pattern.extent
    if pattern.kind == "column":
        return back % width == 0
    if pattern.kind == "dense":
        return torch.ones_like(back, dtype=torch.bool)
    rows = torch.arange(half + 1, device=back.device)
    left = back[:, None] - width * rows  # columns to the left of the token, so many rows above it
    seen = left.abs() <= half
    if not pattern.wraparound:
        column = raster % width - left
        seen &= (column >= 0) & (column < width)
    return seen.any(1)
