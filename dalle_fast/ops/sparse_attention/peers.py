# SPDX-License-Identifier: MIT
"""What users would call in place of sparse_attention: scaled_dot_product_attention and FlexAttention at their best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from .._cases import Arguments
from ..pattern import AttentionPattern

BLOCK_SIZES = (128, 64, 32)
SWEEP_SECONDS = 30  # no further block size is compiled after this


@lru_cache(maxsize=8)
def _float_mask(pattern: AttentionPattern, length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~pattern.mask(length), -torch.inf)


def sdpa_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, **_: Any) -> torch.Tensor:
    """The mask is a bias, made once, outside of what is timed."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_float_mask(pattern, q.shape[2], q.dtype))


def sdpa_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, **_: Any) -> torch.Tensor:
    """All earlier keys: more pairs, but no mask."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex_mask(pattern: AttentionPattern) -> Callable[..., torch.Tensor]:
    """The pattern as FlexAttention's mask_mod; for column the image tokens lie column by column, each one run."""
    text, (height, width) = pattern.text_len, pattern.grid
    half, extent = pattern.kernel // 2, pattern.extent

    def image(q, k):  # k <= q
        if pattern.kind == "row":
            return q - k < extent
        if pattern.kind == "column":
            return q // height == k // height
        if pattern.kind == "conv":
            return q - k - width * torch.clamp((q - k + half) // width, max=half) <= half
        return q >= k

    return lambda b, h, q, k: (q >= k) & ((k < text) | image(q - text, k - text))


def column_by_column(t: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """[B, H, L, D] with the image tokens in the order that `flex_mask` expects of the column pattern."""
    text, (height, width) = pattern.text_len, pattern.grid
    image = t[:, :, text:].unflatten(2, (height, width)).transpose(2, 3).flatten(2, 3)
    return torch.cat((t[:, :, :text], image), 2).contiguous()


def _table_mask(pattern: AttentionPattern) -> Callable[..., torch.Tensor]:
    """`flex_mask` read from a table: no division, one compiled kernel for all patterns."""
    index = torch.arange(pattern.length)
    table = flex_mask(pattern)(0, 0, index[:, None], index[None, :])
    return lambda b, h, q, k: table[q, k]


def flex_attention(arguments: Arguments, backward: bool) -> Callable[..., torch.Tensor]:
    """Compiled FlexAttention on CPU, the fastest of its block sizes and of a mask that is computed or looked up.

    Masks and, for column, the order of tokens are made outside of what is timed.

    Raises:
        NotImplementedError: a backward pass is asked for: there is none on CPU.
    """
    if backward:
        raise NotImplementedError("FlexAttention has no backward pass on CPU")
    from torch.nn.attention import flex_attention as flex

    q, k, v, pattern = arguments[0]
    inputs = [t.detach() for t in (q, k, v)]
    if pattern.kind == "column":
        inputs = [column_by_column(t, pattern) for t in inputs]
    torch._dynamo.reset()  # it keeps eight compilations of a function, and what comes after them would run uncompiled
    began, candidates = time.perf_counter(), []
    with torch.no_grad():
        for mask in (_table_mask(pattern), flex_mask(pattern)):
            for size in BLOCK_SIZES:
                if candidates and time.perf_counter() - began > SWEEP_SECONDS:
                    break
                blocks = flex.create_block_mask(mask, None, None, *[pattern.length] * 2, device="cpu", BLOCK_SIZE=size)
                compiled = torch.compile(flex.flex_attention, dynamic=False)

                def run(*_: Any, compiled=compiled, blocks=blocks, **__: Any) -> torch.Tensor:
                    return compiled(*inputs, block_mask=blocks)

                run.note = f"BLOCK_SIZE {size}"
                run()
                candidates.append(run)
        rounds = [[_seconds(run) for run in candidates] for _ in range(7)]
    best = [min(times) for times in zip(*rounds, strict=True)]
    return candidates[best.index(min(best))]


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
