# SPDX-License-Identifier: MIT
"""torch's view of conv2d: schema, allocation, autograd. Kept for the backward pass: x before its ReLU, nothing else."""

from __future__ import annotations

import torch

from ... import memory
from .._backend import _C
from .._register import no_second_derivative, register_op

# core/dispatch.h: the lowest level of a CPU that multiplies bfloat16. Below, its operands are multiplied in float32.
_BF16_LEVEL = 5


def _is_widened(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _C.cpu_level() < _BF16_LEVEL


def _operands(x, weight, *others):
    """What kernels read: dense but for the weight, which is float32 whatever `x` is, and then rounded to its dtype."""
    if _is_widened(x):
        x, weight, *others = (None if t is None else t.to(torch.bfloat16).float() for t in (x, weight, *others))
    return x.contiguous(), weight.float(), *(None if t is None else t.contiguous() for t in others)


def _workspace(x: torch.Tensor, weight: torch.Tensor, scale: int, backward: bool) -> torch.Tensor:
    num_out, num_in, kernel, _ = weight.shape
    size = _C.conv2d_workspace(x.shape[0], num_in, num_out, *x.shape[2:], kernel, scale, backward)
    return memory.empty(x, (size,), torch.float32)


def _forward(x, weight, bias, residual, gain, relu, scale):
    dtype = x.dtype
    x, weight, residual = _operands(x, weight, residual)
    out = _forward_fake(x, weight, bias, residual, gain, relu, scale)
    bias = bias.float().contiguous()
    _C.conv2d_forward(out, x, weight, bias, residual, _workspace(x, weight, scale, False), gain, relu, scale)
    return out.to(dtype)


def _forward_fake(x, weight, bias, residual, gain, relu, scale):
    return memory.empty(x, (x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3]))


def _gradients(dout, x, weight, gain, relu, scale, needs_x, needs_weight):
    dtype = x.dtype
    x, weight, dout = _operands(x, weight, dout)
    dx, dweight, dbias = _gradients_fake(dout, x, weight, gain, relu, scale, needs_x, needs_weight)
    results = (dx if needs_x else None, *((dweight, dbias) if needs_weight else (None, None)))
    _C.conv2d_backward(*results, dout, x, weight, _workspace(x, weight, scale, True), gain, relu, scale)
    return dx.to(dtype), dweight, dbias


def _gradients_fake(dout, x, weight, gain, relu, scale, needs_x, needs_weight):
    """Those of the weight and the bias are float32, the former in the weight's order of memory."""
    dx = memory.empty(x, x.shape if needs_x else (0,))
    if not needs_weight:
        return dx, dx.new_empty(0, dtype=torch.float32), dx.new_empty(0, dtype=torch.float32)
    dbias = weight.new_empty(weight.shape[0], dtype=torch.float32)
    return dx, torch.empty_like(weight, dtype=torch.float32), dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.gain, ctx.relu, ctx.scale = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout):
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    dx = dweight = dbias = None
    if needs_x or needs_weight or needs_bias:
        dx, dweight, dbias = conv2d_backward(
            dout, *ctx.saved_tensors, ctx.gain, ctx.relu, ctx.scale, needs_x, needs_weight or needs_bias
        )
    return (
        dx if needs_x else None,
        dweight.to(ctx.saved_tensors[1].dtype) if needs_weight else None,
        dbias.to(ctx.bias_dtype) if needs_bias else None,
        dout if needs_residual else None,
        None,
        None,
        None,
    )


conv2d_backward = register_op(
    "conv2d_backward",
    "(Tensor dout, Tensor x, Tensor weight, float gain, bool relu, int scale, bool needs_x, bool needs_weight) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)",
    _gradients,
    _gradients_fake,
    **no_second_derivative("conv2d"),
)
conv2d = register_op(
    "conv2d",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float gain, bool relu, int scale) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
