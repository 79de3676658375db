# SPDX-License-Identifier: MIT
"""torch's view of gumbel_softmax: schema, allocation, autograd.

The kernels see [outer, V, inner]: inner = 1 when the codes are innermost in memory, otherwise the tensor is contiguous
and `inner` is what follows `dim`. seed and offset are SymInt, so that torch.compile does not recompile at each step.
"""

from __future__ import annotations

import math

import torch

from ... import memory
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
        return memory.empty(x, x.movedim(dim, -1).shape).movedim(-1, dim)
    return memory.empty(x, x.shape)


def _view3(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[outer, V, inner] over the memory of a dense `x`."""
    num_codes = x.shape[dim]
    if _codes_innermost(x, dim):
        return x.movedim(dim, -1).view(-1 if num_codes else 0, num_codes, 1)
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    return x.view(outer, num_codes, inner)


def _like(x: torch.Tensor, dense: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` in the layout of `dense`; a gradient may be anything, an expanded sum or a slice."""
    if not _codes_innermost(dense, dim):
        return x.contiguous()
    return x if _codes_innermost(x, dim) else x.movedim(dim, -1).contiguous().movedim(-1, dim)


def _rows(x: torch.Tensor, dim: int) -> torch.Size:
    return x.shape[:dim] + x.shape[dim + 1 :]


def _softmax(logits: torch.Tensor, tau: float, dim: int, seed: int, offset: int, row_offset: int) -> torch.Tensor:
    logits = _dense(logits, dim)
    y = _empty(logits, dim)
    noise = (seed, offset, row_offset)
    _C.gumbel_softmax_forward(_view3(y, dim), None, None, _view3(logits, dim), tau, *noise, stream_of(logits))
    return y


def _softmax_fake(logits, tau, dim, seed, offset, row_offset):
    return _empty(logits, dim)


def _softmax_backward(y: torch.Tensor, dy: torch.Tensor, tau: float, dim: int) -> torch.Tensor:
    dlogits = _empty(y, dim)
    y3, dy3 = _view3(y, dim), _view3(_like(dy, y, dim), dim)
    _C.gumbel_softmax_backward(_view3(dlogits, dim), y3, dy3, None, None, None, None, tau, stream_of(y))
    return dlogits


def _softmax_backward_fake(y, dy, tau, dim):
    return _empty(y, dim)


def _argmax(logits: torch.Tensor, dim: int, seed: int, offset: int, row_offset: int) -> torch.Tensor:
    logits = _dense(logits, dim)
    index = logits.new_empty(_rows(logits, dim), dtype=torch.int64)
    noise = (seed, offset, row_offset)
    _C.gumbel_softmax_argmax(index.view(-1), None, None, _view3(logits, dim), *noise, stream_of(logits))
    return index


def _argmax_fake(logits, dim, seed, offset, row_offset):
    return logits.new_empty(_rows(logits, dim), dtype=torch.int64)


# ---- with the KL


def _empty_kl(logits: torch.Tensor, dim: int, hard: bool) -> tuple[torch.Tensor, ...]:
    """The sample, kl, and the two numbers a row that say what the softmax without noise was."""
    rows = _rows(logits, dim)
    sample = logits.new_empty(rows, dtype=torch.int64) if hard else _empty(logits, dim)
    return sample, logits.new_empty(rows, dtype=torch.float32), logits.new_empty(2 * rows.numel(), dtype=torch.float32)


def _sample_kl(
    logits: torch.Tensor, tau: float, dim: int, seed: int, offset: int, row_offset: int, hard: bool
) -> tuple[torch.Tensor, ...]:
    logits = _dense(logits, dim)
    sample, kl, stats = _empty_kl(logits, dim, hard)
    arguments = (kl.view(-1), stats, _view3(logits, dim))
    noise = (seed, offset, row_offset, stream_of(logits))
    if hard:
        _C.gumbel_softmax_argmax(sample.view(-1), *arguments, *noise)
    else:
        _C.gumbel_softmax_forward(_view3(sample, dim), *arguments, tau, *noise)
    return sample, kl, stats


def _sample_kl_fake(logits, tau, dim, seed, offset, row_offset, hard):
    return _empty_kl(logits, dim, hard)


def _sample_kl_backward(
    logits: torch.Tensor,
    kl: torch.Tensor,
    stats: torch.Tensor,
    dkl: torch.Tensor,
    y: torch.Tensor | None,
    dy: torch.Tensor | None,
    tau: float,
    dim: int,
) -> torch.Tensor:
    logits = _dense(logits, dim)
    dlogits = _empty(logits, dim)
    relaxed = (None, None) if dy is None else (_view3(y, dim), _view3(_like(dy, logits, dim), dim))
    of_rows = (kl.reshape(-1), stats, dkl.reshape(-1).contiguous())
    _C.gumbel_softmax_backward(_view3(dlogits, dim), *relaxed, _view3(logits, dim), *of_rows, tau, stream_of(logits))
    return dlogits


def _sample_kl_backward_fake(logits, kl, stats, dkl, y, dy, tau, dim):
    return _empty(logits, dim)


# ---- autograd


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.tau, ctx.dim, *_ = inputs
    ctx.save_for_backward(output)


def _backward(ctx, dy: torch.Tensor):
    (y,) = ctx.saved_tensors
    return gumbel_softmax_backward(y, dy, ctx.tau, ctx.dim), None, None, None, None, None


def _setup_context_kl(ctx, inputs, output) -> None:
    logits, ctx.tau, ctx.dim, *_, hard = inputs
    sample, kl, stats = output
    ctx.set_materialize_grads(False)  # None for what no loss has used
    ctx.mark_non_differentiable(*((sample, stats) if hard else (stats,)))
    ctx.save_for_backward(logits, kl, stats, None if hard else sample)


def _backward_kl(ctx, dy: torch.Tensor | None, dkl: torch.Tensor | None, _):
    logits, kl, stats, y = ctx.saved_tensors
    dlogits = None
    if dkl is not None:
        dlogits = gumbel_softmax_kl_backward(logits, kl, stats, dkl, y, dy, ctx.tau, ctx.dim)
    elif dy is not None:
        dlogits = gumbel_softmax_backward(y, dy, ctx.tau, ctx.dim)
    return dlogits, None, None, None, None, None, None


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
gumbel_softmax_kl_backward = register_op(
    "gumbel_softmax_kl_backward",
    "(Tensor logits, Tensor kl, Tensor stats, Tensor dkl, Tensor? y, Tensor? dy, float tau, int dim) -> Tensor",
    _sample_kl_backward,
    _sample_kl_backward_fake,
    **no_second_derivative("gumbel_softmax"),
)
gumbel_softmax_kl = register_op(
    "gumbel_softmax_kl",
    "(Tensor logits, float tau, int dim, SymInt seed, SymInt offset, SymInt row_offset, bool hard) -> "
    "(Tensor sample, Tensor kl, Tensor stats)",
    _sample_kl,
    _sample_kl_fake,
    setup_context=_setup_context_kl,
    backward=_backward_kl,
)
