# SPDX-License-Identifier: MIT
"""torch's view of max_pool2d: schema, allocation, autograd. Kept for the backward pass: x."""

from __future__ import annotations

import torch

from ... import memory
from .._backend import _C
from .._register import no_second_derivative, register_op

DTYPES = (torch.float32, torch.bfloat16)


def _forward(x):
    out = _forward_fake(x)
    _C.max_pool2d_forward(out, x.contiguous())
    return out


def _forward_fake(x):
    return memory.empty(x, (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))


def _gradient(dout, x):
    dx = _gradient_fake(dout, x)
    _C.max_pool2d_backward(dx, dout.contiguous(), x.contiguous())
    return dx


def _gradient_fake(dout, x):
    return memory.empty(x, x.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return max_pool2d_backward(dout, *ctx.saved_tensors)


max_pool2d_backward = register_op(
    "max_pool2d_backward",
    "(Tensor dout, Tensor x) -> Tensor",
    _gradient,
    _gradient_fake,
    **no_second_derivative("max_pool2d"),
)
max_pool2d = register_op(
    "max_pool2d", "(Tensor x) -> Tensor", _forward, _forward_fake, setup_context=_setup_context, backward=_backward
)
