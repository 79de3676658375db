# SPDX-License-Identifier: MIT
"""Dropout whose mask is a function of (seed, offset, row, column): nothing random is stored."""

from __future__ import annotations

import torch

from .. import _backend
from .._checks import check_tensor
from .._noise import check_noise, check_probability
from . import op
from .reference import dropout_reference

_MAX_COLUMNS = 2**34  # a counter's word numbers fours of them


def dropout(
    x: torch.Tensor, p: float, *, seed: int, offset: int, row_offset: int = 0, backend: str = "auto"
) -> torch.Tensor:
    """Sets elements to 0 with probability `p` and multiplies the others by 1 / (1 - p).

    A row is a slice along the last dimension; rows are numbered row-major over all other dimensions. Element (row r,
    column c) is kept if and only if its word of Philox4x32-10, with key = seed and counter = (c // 4, row_offset + r,
    offset low, offset high), word c % 4, is >= p * 2^32. So the same call drops the same elements on any back end, at
    any number of threads, in a forward pass that is computed again; and a part of a batch drops what the whole batch
    would, by `row_offset`. One call uses one offset: give each call of a step its own (or its own seed); different
    offsets are independent. A CUDA graph replays the offset that it has recorded.

    No mask is stored: the gradient is the same op on the upstream gradient, and so is every further derivative. A
    dropped element is 0 even where it was NaN or Inf. The arithmetic is float32 for bfloat16 and float16; autocast
    changes nothing.

    Args:
        x: [..., C], float32, bfloat16 or float16, any strides; float64 runs on the reference. Fastest when its rows
            are dense and evenly spaced.
        p: probability of a zero, 0 <= p < 1. p = 0 returns the values unchanged.
        seed: 64 bits, signed or unsigned.
        offset: 64 bits, signed or unsigned.
        row_offset: number of the first row, >= 0; row_offset + rows may not pass 2^32.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        [..., C], contiguous, the dtype of `x`; never memory of `x`. Differentiable.

    Raises:
        TypeError: `x` is not a floating tensor, `p` is not a number, or a count is not an int.
        ValueError: `x` is a scalar or has more than 2^34 columns, `p`, `seed`, `offset` or `row_offset` is out of
            range, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> dropout(torch.ones(2, 6), 0.5, seed=1, offset=0)
        tensor([[2., 2., 2., 2., 2., 2.],
                [2., 0., 0., 0., 2., 2.]])
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    num_columns = x.shape[-1]
    if num_columns > _MAX_COLUMNS:
        raise ValueError(f"x: expected at most 2^34 columns, got shape {list(x.shape)}")
    check_probability(p)
    num_rows = x.numel() // num_columns if num_columns else 0
    seed, offset = check_noise(seed, offset, row_offset, num_rows, "x")

    supported = x.dtype in op.DTYPES
    chosen = _backend.choose("dropout", backend, x, supported=supported, reason=f"dtype {x.dtype} has no kernel")
    if chosen == "reference":
        return dropout_reference(x, p, seed=seed, offset=offset, row_offset=row_offset)
    return op.dropout(x, p, seed, offset, row_offset)
