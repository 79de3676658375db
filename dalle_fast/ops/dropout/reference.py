# SPDX-License-Identifier: MIT
"""Dropout in plain torch, its mask a function of (seed, offset, row, column)."""

from __future__ import annotations

import math

import torch

from ..philox import words


def keep_mask(
    shape: torch.Size, p: float, *, seed: int, offset: int, row_offset: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """Bool of `shape` [..., C]: whether the element's Philox word is >= p * 2^32 (float64 holds both sides exactly)."""
    drawn = words(seed, offset, math.prod(shape[:-1]), shape[-1], row_offset, device)
    return (drawn.double() >= p * 2.0**32).reshape(shape)


def dropout_reference(x: torch.Tensor, p: float, *, seed: int, offset: int, row_offset: int = 0) -> torch.Tensor:
    """The plain twin of `dropout`; float64 computes in float64, other dtypes in float32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    keep = keep_mask(x.shape, p, seed=seed, offset=offset, row_offset=row_offset, device=x.device)
    return torch.where(keep, x.to(compute) * (1 / (1 - p)), 0.0).to(x.dtype).contiguous()
