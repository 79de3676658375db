# SPDX-License-Identifier: MIT
"""torch's view of sparse_attention: schema, allocation, autograd. The pattern crosses as seven integers."""

from __future__ import annotations

import torch

from ... import memory
from .._backend import _C, stream_of
from .._register import no_second_derivative, register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PATTERN = "int kind, int text_len, int height, int width, int extent, int kernel, int wraparound"


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _forward(q, k, v, scale, *pattern):
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    out, lse = _forward_fake(q, k, v, scale, *pattern)
    _C.sparse_attention_forward(out, lse, q, k, v, scale, pattern, stream_of(q))
    return out, lse


def _forward_fake(q, k, v, scale, *pattern):
    return _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward_kernel(dout, out, lse, q, k, v, scale, *pattern):
    q, k, v, dout = _rows_dense(q), _rows_dense(k), _rows_dense(v), _rows_dense(dout)
    dq, dk, dv = _backward_fake(dout, out, lse, q, k, v, scale, *pattern)
    terms = lse.new_empty(*lse.shape, 2)  # between the two CUDA kernels
    _C.sparse_attention_backward(dq, dk, dv, terms, dout, out, lse, q, k, v, scale, pattern, stream_of(q))
    return dq, dk, dv


def _like(x):
    """[B, L, H, D] in memory: what the projections read."""
    batch, num_heads, length, head_dim = x.shape
    return memory.empty(x, (batch, length, num_heads, head_dim)).transpose(1, 2)


def _backward_fake(dout, out, lse, q, k, v, scale, *pattern):
    return _like(q), _like(k), _like(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, *ctx.pattern = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, dout, _):
    q, k, v, out, lse = ctx.saved_tensors
    grads = sparse_attention_backward(dout.to(q.dtype), out, lse, q, k, v, ctx.scale, *ctx.pattern)
    return (*grads, None, *([None] * len(ctx.pattern)))


sparse_attention_backward = register_op(
    "sparse_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, float scale, {_PATTERN}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _backward_kernel,
    _backward_fake,
    **no_second_derivative("sparse_attention"),
)
sparse_attention = register_op(
    "sparse_attention",
    f"(Tensor q, Tensor k, Tensor v, float scale, {_PATTERN}) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def kernel_mask(pattern: tuple[int, ...], length: int) -> torch.Tensor:
    """Bool [length, length] from csrc/scalar/pattern.h, for the test against AttentionPattern.mask()."""
    mask = torch.empty(length, length, dtype=torch.bool)
    _C.sparse_attention_mask(mask, pattern)
    return mask
