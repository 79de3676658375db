# SPDX-License-Identifier: MIT
"""torch's view of conv2d: schema, allocation, autograd. Kept for the backward pass: x before its ReLU, nothing else."""

from __future__ import annotations

import torch

from .._backend import _C
from .._register import no_second_derivative, register_op


def _workspace(x: torch.Tensor, weight: torch.Tensor, scale: int, backward: bool) -> torch.Tensor:
    batch, num_in, height, width = x.shape
    size = _C.conv2d_workspace(batch, num_in, weight.shape[0], scale * height, scale * width, weight.shape[2], backward)
    return x.new_empty(size)


def _forward(x, weight, bias, residual, gain, relu, scale):
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = _forward_fake(x, weight, bias, residual, gain, relu, scale)
    _C.conv2d_forward(out, x, weight, bias, residual, _workspace(x, weight, scale, False), gain, relu, scale)
    return out


def _forward_fake(x, weight, bias, residual, gain, relu, scale):
    return x.new_empty(x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3])


def _gradients(dout, x, weight, gain, relu, scale, needs_x, needs_weight):
    dout, x, weight = dout.contiguous(), x.contiguous(), weight.contiguous()
    dx, dweight, dbias = grads = _gradients_fake(dout, x, weight, gain, relu, scale, needs_x, needs_weight)
    results = (dx if needs_x else None, *((dweight, dbias) if needs_weight else (None, None)))
    _C.conv2d_backward(*results, dout, x, weight, _workspace(x, weight, scale, True), gain, relu, scale)
    return grads


def _gradients_fake(dout, x, weight, gain, relu, scale, needs_x, needs_weight):
    dx = x.new_empty(x.shape if needs_x else (0,))
    return dx, x.new_empty(weight.shape if needs_weight else (0,)), x.new_empty(weight.shape[0] if needs_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, ctx.gain, ctx.relu, ctx.scale = inputs
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
        dweight if needs_weight else None,
        dbias if needs_bias else None,
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
