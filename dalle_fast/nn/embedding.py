# SPDX-License-Identifier: MIT
"""Embedding of a large vocabulary."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .. import memory


class Embedding(nn.Embedding):
    """nn.Embedding; on CPU its gradient, as large as the vocabulary, lies in memory that is kept between steps."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """[...] codes -> [..., width]."""
        ours = self.weight.device.type == "cpu" and self.weight.dtype in (
            torch.float32,
            torch.float64,
        )  # others: summed in float32
        if not ours or torch.compiler.is_compiling():
            return super().forward(index)
        return _Embed.apply(index, self.weight)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, weight):
        ctx.save_for_backward(index)
        ctx.shape = weight.shape
        return nn.functional.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (index,) = ctx.saved_tensors
        dweight = memory.empty(dout, ctx.shape).zero_()
        return None, dweight.index_add_(0, index.flatten(), dout.flatten(0, -2))
