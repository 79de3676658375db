# SPDX-License-Identifier: MIT
"""Calls of sparse_attention for the generic tests and benchmarks."""

from __future__ import annotations

import torch

from .._cases import Arguments, Case, Room, randn
from ..pattern import AttentionPattern
from . import sparse_attention
from .peers import flex_attention, sdpa_causal, sdpa_masked
from .reference import sparse_attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(
    name: str,
    pattern: AttentionPattern,
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 8,
    length: int | None = None,
    scale: float | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    length = pattern.length if length is None else length

    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        q = randn(generator, batch, heads, length, dim, dtype=dtype)
        k, v = (randn(generator, batch, kv_heads or heads, length, dim, dtype=dtype) for _ in range(2))
        return (q, k, v, pattern), {"scale": scale}

    # FLOPs of pairs that attend: q k and p v; backward these scores once more, and four products for three gradients
    flops = 4 * pattern.num_pairs(length) * dim * batch * heads
    peers = {"SDPA causal": sdpa_causal} if pattern.kind == "dense" else {}
    return Case(name, build, dtypes, flops=flops, backward_flops=flops * 5 // 2, peers=peers)


def _paper(kind: str, side: int = 32) -> Case:
    pattern = AttentionPattern(kind, text_len=256, grid=(side, side))
    return _case(f"{kind} 256+{side}x{side}", pattern, batch=1, heads=8, dim=64, dtypes=(torch.float32, torch.bfloat16))


def _small(kind: str) -> Case:
    pattern = AttentionPattern(kind, text_len=24, grid=(8, 8))
    return _case(f"{kind} 24+8x8", pattern, batch=32, heads=4, dim=64, dtypes=(torch.float32, torch.bfloat16))


ROOM = Room(
    name="sparse_attention",
    function=sparse_attention,
    reference=sparse_attention_reference,
    cases=(
        _case("row", AttentionPattern("row", 3, (3, 4)), batch=1),
        _case("column", AttentionPattern("column", 5, (4, 3)), kv_heads=1),
        _case("conv", AttentionPattern("conv", 2, (5, 4), kernel=3)),
        _case("conv_rows", AttentionPattern("conv", 4, (4, 6), kernel=5, wraparound=False), dim=20),
        _case("dense", AttentionPattern("dense", 4, (3, 3)), scale=0.3),
        _case("row_prefix", AttentionPattern("row", 7, (6, 7), extent=5), length=29, heads=4, kv_heads=2),
        _case("column_prefix", AttentionPattern("column", 7, (6, 7)), length=30, dim=3),
        _case("text_only", AttentionPattern("row", 40, (2, 2)), length=37),
        _case("no_text", AttentionPattern("row", 0, (7, 6))),
        _case("tiles", AttentionPattern("row", 33, (9, 9)), batch=1, dim=64),
        _case("column_tiles", AttentionPattern("column", 17, (70, 2)), batch=1, dim=24),
        _case("conv_tiles", AttentionPattern("conv", 65, (12, 11)), batch=1, dim=32),
        # whole tiles of 64 that need no mask
        _case("dense_interior", AttentionPattern("dense", 70, (10, 14)), batch=1, heads=2, kv_heads=1, dim=128),
        _case("row_interior", AttentionPattern("row", 3, (20, 10), extent=150), batch=1, heads=1, dim=40),
        _case("column_interior", AttentionPattern("column", 66, (140, 2)), batch=1, heads=1, dim=16, length=330),
        # warps that meet nothing of a tile, and pieces of 16 x 16 at every edge
        _case("row_narrow", AttentionPattern("row", 9, (13, 12), extent=3), batch=1, heads=1),
        _case("row_wide", AttentionPattern("row", 20, (13, 12), extent=70), batch=1, kv_heads=1, length=161),
        _case("conv_prefix", AttentionPattern("conv", 18, (9, 16), kernel=5), batch=1, kv_heads=1, length=149),
        _case("conv_wide", AttentionPattern("conv", 3, (23, 3), kernel=9), batch=1, heads=1),
        _case("conv_rows_wide", AttentionPattern("conv", 3, (9, 17), kernel=7, wraparound=False), batch=1, heads=1),
        # scores far apart: the softmax's shift has to follow
        _case("scale_one", AttentionPattern("dense", 37, (9, 9)), batch=1, heads=1, dim=16, scale=1.0),
        _case("scale_large", AttentionPattern("dense", 37, (9, 9)), batch=1, scale=2.0, dtypes=(torch.float32,)),
        _case("scale_negative", AttentionPattern("row", 37, (9, 9)), batch=1, heads=1, dim=16, scale=-0.5),
        _case("scale_zero", AttentionPattern("conv", 5, (5, 5), kernel=3), batch=1, heads=1, scale=0.0),
        _case("one", AttentionPattern("dense", 1, (1, 1)), batch=1, heads=1, dim=1, length=1),
        _case("empty_batch", AttentionPattern("row", 3, (2, 2)), batch=0),
        _case("empty_length", AttentionPattern("row", 3, (2, 2)), length=0),
    ),
    # float32: sums of products of a few hundred terms. 16-bit: inputs are exact, the output is rounded once.
    tolerance={torch.float32: (2e-5, 5e-6), torch.bfloat16: (1e-2, 4e-3), torch.float16: (2e-3, 5e-4)},
    # the backward pass reads the rounded output
    grad_tolerance={torch.float32: (1e-4, 3e-5), torch.bfloat16: (3e-2, 3e-2), torch.float16: (4e-3, 4e-3)},
    benchmarks=(
        _paper("row"),
        _paper("column"),
        _paper("conv"),
        _paper("dense"),
        _small("row"),
        _small("column"),
    ),
    peers={"SDPA with the mask": sdpa_masked, "SDPA causal, all pairs": sdpa_causal},
    prepared_peers={"FlexAttention compiled": flex_attention},
    curves={"tokens": {256 + side**2: _paper("row", side) for side in (8, 16, 32, 48)}},
)
