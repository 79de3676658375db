# SPDX-License-Identifier: MIT
"""torch's view of gumbel_softmax: schema, allocation, autograd.

The kernels see [outer, V, inner]: inner = 1 when the codes are innermost in memory, otherwise the tensor is contiguous
and `inner` is what follows `dim`. seed and offset are SymInt, so that torch.compile does not recompile at each step.
"""

from __future__ import annotations

import math

import torch

from .._backend import _C, stream_of
from .._register import no_second_derivative, register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _codes_innermost(x: torch.Tensor, dim: int) -> bool:
    return x.movedim(dim, -1).is_contiguous()


def _dense(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` in one of the two layouts the kernels read."""
    return x if _codes_innermost(x, dim) else x.contiguous()


def _empty(x: torch.Tensor, dim: int) -> torch.Tensor:
    """An empty twin of `_dense(x, dim)`, with its strides."""
    if _codes_innermost(x, dim):
        return x.new_empty(x.movedim(dim, -1).shape).movedim(-1, dim)
    return x.new_empty(x.shape)


def _view3(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[outer, V, inner] over the memory of a dense `x`."""
    num_codes = x.shape[dim]
    if _codes_innermost(x, dim):
        return x.movedim(dim, -1).view(-1 if num_codes else 0, num_codes, 1)
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    return x.view(outer, num_codes, inner)


def _softmax(logits: torch.Tensor, tau: float, dim: int, seed: int, offset: int, row_offset: int) -> torch.Tensor:
    logits = _dense(logits, dim)
    y = _empty(logits, dim)
    _C.gumbel_softmax_forward(_view3(y, dim), _view3(logits, dim), tau, seed, offset, row_offset, stream_of(logits))
    return y


def _softmax_fake(logits, tau, dim, seed, offset, row_offset):
    return _empty(logits, dim)


def _softmax_backward(y: torch.Tensor, dy: torch.Tensor, tau: float, dim: int) -> torch.Tensor:
    dlogits = _empty(y, dim)
    if _codes_innermost(y, dim) != _codes_innermost(dy, dim) or not _codes_innermost(dy, dim):
        # y came from _empty, so it is dense; dy may be anything (an expanded sum, a slice)
        dy = dy.movedim(dim, -1).contiguous().movedim(-1, dim) if _codes_innermost(y, dim) else dy.contiguous()
    _C.gumbel_softmax_backward(_view3(dlogits, dim), _view3(y, dim), _view3(dy, dim), tau, stream_of(y))
    return dlogits


def _softmax_backward_fake(y, dy, tau, dim):
    return _empty(y, dim)


def _argmax(logits: torch.Tensor, dim: int, seed: int, offset: int, row_offset: int) -> torch.Tensor:
    logits = _dense(logits, dim)
    index = logits.new_empty(logits.shape[:dim] + logits.shape[dim + 1 :], dtype=torch.int64)
    _C.gumbel_softmax_argmax(index.view(-1), _view3(logits, dim), seed, offset, row_offset, stream_of(logits))
    return index


def _argmax_fake(logits, dim, seed, offset, row_offset):
    return logits.new_empty(logits.shape[:dim] + logits.shape[dim + 1 :], dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.tau, ctx.dim, *_ = inputs
    ctx.save_for_backward(output)


def _backward(ctx, dy: torch.Tensor):
    (y,) = ctx.saved_tensors
    return gumbel_softmax_backward(y, dy, ctx.tau, ctx.dim), None, None, None, None, None


gumbel_softmax_backward = register_op(
    "gumbel_softmax_backward",
    "(Tensor y, Tensor dy, float tau, int dim) -> Tensor",
    _softmax_backward,
    _softmax_backward_fake,
    **no_second_derivative("gumbel_softmax"),
)
gumbel_softmax = register_op(
    "gumbel_softmax",
    "(Tensor logits, float tau, int dim, SymInt seed, SymInt offset, SymInt row_offset) -> Tensor",
    _softmax,
    _softmax_fake,
    setup_context=_setup_context,
    backward=_backward,
)
gumbel_argmax = register_op(
    "gumbel_argmax",
    "(Tensor logits, int dim, SymInt seed, SymInt offset, SymInt row_offset) -> Tensor",
    _argmax,
    _argmax_fake,
)
