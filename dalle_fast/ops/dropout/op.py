# SPDX-License-Identifier: MIT
"""torch's view of dropout: schema, allocation, autograd. The gradient is the op itself, with the same numbers.

seed and offset are SymInt, so that torch.compile does not recompile at each step.
"""

from __future__ import annotations

import torch

from ... import memory
from .._backend import _C, stream_of
from .._register import register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _implementation(x: torch.Tensor, p: float, seed: int, offset: int, row_offset: int) -> torch.Tensor:
    if p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    out = memory.empty(x, x.shape)
    if x.numel() == 0:
        return out
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()  # the kernels read dense rows
    _C.dropout(out.view(rows.shape), rows, p, seed, offset, row_offset, stream_of(x))
    return out


def _fake(x, p, seed, offset, row_offset):
    return memory.empty(x, x.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, *ctx.draw = inputs


def _backward(ctx, dout: torch.Tensor):
    return dropout(dout, *ctx.draw), None, None, None, None


dropout = register_op(
    "dropout",
    "(Tensor x, float p, SymInt seed, SymInt offset, SymInt row_offset) -> Tensor",
    _implementation,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
