# SPDX-License-Identifier: MIT
"""Calls of decode_attention for the generic tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .._cases import Arguments, Case, Room, randn
from ..pattern import AttentionPattern
from . import decode_attention
from .reference import decode_attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(
    name: str,
    pattern: AttentionPattern,
    position: int,
    *,
    batch: int = 4,
    text_batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 8,
    spare: int = 0,
    on_device: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    kv = kv_heads or heads

    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        def draw(*shape: int) -> torch.Tensor:
            return randn(generator, *shape, dtype=dtype, requires_grad=False)

        slots = pattern.image_cache_len + spare
        text = [draw(text_batch, kv, pattern.text_len, dim) for _ in range(2)]
        image = [draw(batch, kv, slots, dim) for _ in range(2)]
        new = (draw(batch, heads, dim), draw(batch, kv, dim), draw(batch, kv, dim))
        at = torch.tensor([position]) if on_device else position
        return (*new, *text, *image, pattern, at), {}

    text, seen = pattern.text_len, int(pattern.mask()[min(position, pattern.length - 1), pattern.text_len :].sum())
    # q, out, the new k and v into their slots, the text once for all samples, the keys seen of each ring
    elements = batch * dim * (2 * heads + 4 * kv + 2 * kv * seen) + 2 * text_batch * kv * text * dim
    return Case(name, build, dtypes, flops=4 * batch * heads * (text + seen) * dim, elements=elements)


def _gathered(arguments: Arguments, backward: bool) -> Callable[..., torch.Tensor]:
    """scaled_dot_product_attention on keys in one piece: each sample's text copied there before, the few image keys
    that the pattern sees at each call."""
    q, _, _, text_k, text_v, image_k, _, pattern, position = arguments[0]
    raster, ring, text = position - pattern.text_len, image_k.shape[2], pattern.text_len
    slots = pattern.mask()[position, text:].nonzero().flatten() % ring
    spare = text_k.new_empty(q.shape[0], text_k.shape[1], len(slots), q.shape[2])
    share = q.shape[0] // text_k.shape[0]
    keys, values = (torch.cat((t.repeat_interleave(share, 0), spare), 2) for t in (text_k, text_v))

    def run(q, k, v, text_k, text_v, image_k, image_v, *_: Any) -> torch.Tensor:
        image_k[:, :, raster % ring], image_v[:, :, raster % ring] = k, v
        keys[:, :, text:], values[:, :, text:] = image_k[:, :, slots], image_v[:, :, slots]
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values).squeeze(2)

    return run


def _paper(kind: str, batch: int = 16) -> Case:
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    return _case(f"{kind} 256+32x32 x{batch}", pattern, 256 + 700, batch=batch, text_batch=1, heads=8, dim=64,
                 dtypes=(torch.float32, torch.bfloat16))  # fmt: skip


ROOM = Room(
    name="decode_attention",
    function=decode_attention,
    reference=decode_attention_reference,
    cases=(
        _case("row", AttentionPattern("row", 3, (3, 4)), 3 + 9),
        _case("row_start", AttentionPattern("row", 3, (3, 4)), 3),
        _case("column", AttentionPattern("column", 5, (4, 3)), 5 + 8, heads=4, kv_heads=2, dim=20),
        _case("conv", AttentionPattern("conv", 2, (5, 4), kernel=3), 2 + 14, spare=3),
        _case("conv_rows", AttentionPattern("conv", 2, (5, 4), kernel=3, wraparound=False), 2 + 12),
        _case("dense", AttentionPattern("dense", 4, (3, 3)), 4 + 8, text_batch=1, dim=3),
        _case("text", AttentionPattern("row", 6, (2, 2)), 4, text_batch=4),
        _case("no_text", AttentionPattern("row", 0, (4, 4)), 11),
        _case("one", AttentionPattern("dense", 1, (1, 1)), 1, batch=1, text_batch=1, heads=1, dim=1),
        _case("empty", AttentionPattern("row", 3, (2, 2)), 4, batch=0, text_batch=1),
        _case("many", AttentionPattern("row", 40, (8, 8)), 40 + 60, batch=8, text_batch=1, heads=4, dim=64),
        _case("few", AttentionPattern("row", 70, (8, 8)), 70 + 50, batch=3, text_batch=1, heads=1, dim=64),
        _case("captions", AttentionPattern("row", 70, (3, 4)), 70 + 9, batch=40, on_device=True),
        _case("tiles", AttentionPattern("conv", 35, (4, 4), kernel=3), 46, batch=24, text_batch=1, heads=6, kv_heads=2),
        _case("wide_heads", AttentionPattern("column", 33, (4, 2)), 33 + 6, batch=3, text_batch=1, dim=72),
        _case("wider_heads", AttentionPattern("dense", 9, (4, 4)), 9 + 14, batch=2, text_batch=1, heads=1, dim=128),
        _case("widest_heads", AttentionPattern("dense", 20, (2, 3)), 20 + 5, batch=5, text_batch=1, heads=1, dim=256),
        _case("batches", AttentionPattern("dense", 3, (6, 6)), 3 + 35, batch=17, text_batch=1, heads=3, dim=4),
        _case("wide_window", AttentionPattern("conv", 2, (3, 4), kernel=5), 12, batch=2, text_batch=1, on_device=True),
        _case("text_at", AttentionPattern("dense", 7, (2, 2)), 5, text_batch=4, heads=4, kv_heads=2, on_device=True),
        _case("nowhere", AttentionPattern("row", 3, (2, 2)), 7, on_device=True),
        _case("text_of_many", AttentionPattern("row", 3, (2, 2)), 1, on_device=True),
    ),
    # float32: sums over a few hundred keys; 16-bit: the output is rounded once
    tolerance={torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-2, 4e-3), torch.float16: (2e-3, 5e-4)},
    differentiable=False,
    benchmarks=(_paper("row"), _paper("column"), _paper("conv"), _paper("dense"), _paper("row", 64)),
    prepared_peers={"SDPA on gathered keys": _gathered},
    curves={"samples": {count: _paper("row", count) for count in (1, 4, 16, 64)}},
)
