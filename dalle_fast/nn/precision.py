# SPDX-License-Identifier: MIT
"""Where autocast must stay out, and the resblock in float16 with a gradient scale (paper section 2.4, appendix D).

    forward    x --+-- norm -- float16 -- branch -- float32 --+-- x + y        x, y, norm: float32
                   +------------------------------------------+
    backward   g + (norm' -- filter(. / s)) <-- float32 <-- branch' <-- float16 <-- filter(. * s) <-- g

`filter` turns Inf and NaN into 0: an overflow in one resblock does not reach the ones before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A region without autocast on the device of `x`: logits and codes are float32 (paper section 2.4)."""
    if x.device.type == "meta":  # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def scaled_branch(
    x: torch.Tensor,
    norm: Callable[[torch.Tensor], torch.Tensor],
    branch: Callable[[torch.Tensor], torch.Tensor],
    scale: torch.Tensor,
) -> torch.Tensor:
    """branch(norm(x)), the branch in float16 and its gradients times `scale` (figure 4 of the paper).

    Gradients of the parameters of `norm` and `branch` carry the factor `scale`, and are Inf or NaN where it is too
    large; the gradient of `x` does not and is always finite. `ResblockGradScaler` keeps the scales.

    Args:
        x: float32, the identity path.
        norm: works in float32.
        branch: takes and returns float16; its matrices are `Linear`.
        scale: float32 scalar tensor, read again in the backward pass.

    Returns:
        float32, to be added to `x`.
    """
    h = norm(_Leave.apply(x, scale)).to(torch.float16)
    return _Enter.apply(branch(h), scale)


def _filter(g: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)


class _Enter(torch.autograd.Function):
    """float16 -> float32; backward: the gradient of the identity path enters the branch."""

    @staticmethod
    def forward(ctx, y, scale):
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        return y.float()

    @staticmethod
    def backward(ctx, g):
        (scale,) = ctx.saved_tensors
        return _filter(g * scale).to(ctx.dtype), None  # what is beyond 65504 becomes Inf here, and is seen


class _Leave(torch.autograd.Function):
    """x; backward: the gradient leaves the branch for the identity path."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        (scale,) = ctx.saved_tensors
        return _filter(g / scale), None


class Linear(nn.Linear):
    """nn.Linear whose float32 parameters multiply float16 inputs in float16.

    Weights are rounded to float16 at each use and products summed in float32; outputs, and the gradients of inputs and
    weights, are rounded to float16 once, so they underflow and overflow as float16 does. The gradient of the bias is
    summed in float32: gains and biases stay 32-bit (section 2.4). Other inputs take the way of nn.Linear.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of `x` (or of autocast)."""
        if x.dtype == torch.float16 and self.weight.dtype == torch.float32:
            return _HalfLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class _HalfLinear(torch.autograd.Function):
    """The weight is saved as it is and rounded again: `fully_shard` can free it between forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _linear(x, weight.to(x.dtype), bias.to(x.dtype) if ctx.has_bias else None)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        rows = dout.flatten(0, -2)
        dx = _linear(dout, weight.to(x.dtype).t())
        dweight = _linear(rows.t(), x.flatten(0, -2).t())
        dbias = rows.sum(0, dtype=torch.float32) if ctx.has_bias else None
        return dx, dweight.to(weight.dtype), dbias


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear of float16 tensors.

    On CPU the product runs in float32: products of two float16 numbers are exact there, so with the one rounding at the
    end this is what tensor cores compute, and 50 times as fast as torch's own float16 product.
    """
    if x.device.type == "cpu":
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)
