# SPDX-License-Identifier: MIT
"""Attention at the paper's sizes on a GPU: training and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module  # of optional peers: the error of a missing one becomes its row's reason

import torch
import torch.nn.functional as F

from dalle_fast.bench.rows import Call, Row, relative, size_of
from dalle_fast.ops import AttentionPattern, decode_attention, sparse_attention
from dalle_fast.ops.decode_attention.reference import decode_attention_reference
from dalle_fast.ops.sparse_attention.peers import column_by_column, flex_mask
from dalle_fast.ops.sparse_attention.reference import sparse_attention_reference

# ---- sparse_attention


def _flex(pattern: AttentionPattern, block: int, device: str) -> Callable[..., torch.Tensor]:
    flex = import_module("torch.nn.attention.flex_attention")
    length = pattern.length
    mask = flex.create_block_mask(flex_mask(pattern), None, None, length, length, device=device, BLOCK_SIZE=block)
    compiled = torch.compile(flex.flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _sdpa(backend: str, **options) -> Callable[..., torch.Tensor]:
    attention = import_module("torch.nn.attention")

    def run(q, k, v):
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


def _sparse_row(device: str, pattern: AttentionPattern, qkvd: list[torch.Tensor], backward: bool) -> Row:
    torch._dynamo.reset()  # it keeps eight compilations of a function; FlexAttention's ninth would run uncompiled
    *qkv, dout = qkvd
    dtype, dim = dout.dtype, dout.shape[3]
    flops = 4 * pattern.num_pairs() * dim * dout.shape[0] * dout.shape[1]
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5

    def call(function) -> Call:
        if backward:
            return lambda: torch.autograd.grad(function(*qkv), qkv, dout)

        def forward():
            with torch.no_grad():
                return function(*qkv)

        return forward

    def ours(q, k, v):
        return sparse_attention(q, k, v, pattern)

    def flex(block):
        function = _flex(pattern, block, device)
        if pattern.kind != "column":
            return call(function)
        moved = [column_by_column(t.detach(), pattern) for t in qkv]  # not timed
        return call(lambda *_: function(*moved))

    def error():
        part = [t[:1, :1].detach().double().requires_grad_() for t in qkv]
        expected = sparse_attention_reference(*part, pattern)
        if not backward:
            return relative(call(ours)()[:1, :1], expected)
        grads = torch.autograd.grad(expected, part, dout[:1, :1].double())
        return max(relative(a[:1, :1], e) for a, e in zip(call(ours)(), grads, strict=True))

    peers = {}
    if device == "cuda":
        peers["FlexAttention 128"] = lambda: flex(128)
        peers["FlexAttention 64"] = lambda: flex(64)
        if dtype == torch.bfloat16:
            peers["SDPA cuDNN causal"] = lambda: call(_sdpa("CUDNN_ATTENTION", is_causal=True))
            peers["SDPA flash causal"] = lambda: call(_sdpa("FLASH_ATTENTION", is_causal=True))
            peers["FlashAttention-3 causal"] = lambda: call(_flash3())
        peers["SDPA efficient causal"] = lambda: call(_sdpa("EFFICIENT_ATTENTION", is_causal=True))
    mask = torch.zeros(pattern.length, pattern.length, device=device, dtype=dtype)
    mask.masked_fill_(~pattern.mask().to(device), -torch.inf)
    backend = "EFFICIENT_ATTENTION" if device == "cuda" else "MATH"
    peers["SDPA with the mask"] = lambda: call(_sdpa(backend, attn_mask=mask))
    moved = size_of(*qkvd)  # q, k, v, out
    return Row(
        f"sparse_attention {pattern.kind} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}",
        call(ours),
        error,
        2 * bound if backward else bound,
        3 * moved if backward else moved,
        flops * 7 // 2 if backward else flops,
        peers,
    )


def sparse_rows(device: str, small: bool) -> Iterator[Row]:
    batch, heads, dim = (1, 2, 16) if small else (8, 62, 64)
    text, side = (16, 4) if small else (256, 32)
    for kind in ("row", "column", "conv", "dense"):
        for dtype in (torch.bfloat16, torch.float32):
            pattern = AttentionPattern(kind, text, (side, side), kernel=3 if small else 11)
            shape = (batch, pattern.length, heads, dim)
            qkvd = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)]
            for t in qkvd[:3]:
                t.requires_grad_()
            yield _sparse_row(device, pattern, qkvd, False)
            if kind in ("row", "conv"):
                yield _sparse_row(device, pattern, qkvd, True)


def _flash3():
    function = import_module("flash_attn_interface").flash_attn_func

    def run(q, k, v):
        return function(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)

    return run


# ---- decode_attention


def decode_rows(device: str, small: bool) -> Iterator[Row]:
    batch, heads, dim = (4, 2, 16) if small else (512, 62, 64)
    text, side = (16, 4) if small else (256, 32)
    dtype = torch.bfloat16
    for kind in ("row", "column", "conv"):
        pattern = AttentionPattern(kind, text, (side, side), kernel=3 if small else 11)
        position, ring = text + side * side * 2 // 3, pattern.image_cache_len

        def draw(*shape):
            return torch.randn(*shape, device=device, dtype=dtype)

        new = [draw(batch, heads, dim) for _ in range(3)]
        texts = [draw(1, heads, text, dim) for _ in range(2)]
        images = [draw(batch, heads, ring, dim) for _ in range(2)]
        raster = position - text
        slots = (pattern.mask()[position][text:].nonzero().flatten() % ring).to(device)
        at = torch.tensor([position], device=device)

        def ours(new=new, texts=texts, images=images, pattern=pattern, at=at):
            return decode_attention(*new, *texts, *images, pattern, at)

        def gathered(new=new, texts=texts, images=images, slots=slots, raster=raster, ring=ring):
            q, k, v = new
            images[0][:, :, raster % ring], images[1][:, :, raster % ring] = k, v
            keys, values = (
                torch.cat((t.expand(batch, -1, -1, -1), i[:, :, slots]), 2) for t, i in zip(texts, images, strict=True)
            )
            return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values)

        def error(new=new, texts=texts, images=images, pattern=pattern, position=position, ours=ours):
            part = [t[:2].double() for t in new] + [t.double() for t in texts] + [t[:2].double() for t in images]
            return relative(ours()[:2], decode_attention_reference(*part, pattern, position))

        seen = len(slots)
        moved = 4 * size_of(new[0]) + size_of(*texts) + 2 * batch * heads * seen * dim * 2
        flops = 4 * batch * heads * (text + seen) * dim
        yield Row(
            f"decode_attention {kind} {batch} samples", ours, error, 1e-2, moved, flops,
            {"gather + SDPA": lambda gathered=gathered: gathered}, graph=True,
        )  # fmt: skip
