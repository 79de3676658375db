# SPDX-License-Identifier: MIT
"""Max-pooling of two by two pixels for CPUs, where width is the innermost dimension."""

from __future__ import annotations

import torch

from .. import _backend
from .._checks import check_tensor
from . import op
from .reference import max_pool2d_reference


def max_pool2d(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """F.max_pool2d(x, 2): between the groups of the dVAE's encoder (paper appendix A.1).

    "auto" takes torch's op for a channels_last `x`, where that is fast.

    Args:
        x: [B, C, H, W] floating, any size may be 0; the kernel takes float32 and bfloat16, H and W even.
        backend: "auto", "cpu" or "reference".

    Returns:
        [B, C, H // 2, W // 2], the dtype of `x`. The first of equals gets the gradient.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` has not four dimensions, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> max_pool2d(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[[[3.]]]])
    """
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [B, C, H, W], got {list(x.shape)}")
    supported = x.dtype in op.DTYPES and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    reason = "it takes float32 and bfloat16, height and width even"
    chosen = _backend.choose("max_pool2d", backend, x, supported=supported, reason=reason)
    if chosen == "reference" or (backend == "auto" and not x.is_contiguous()):
        return max_pool2d_reference(x)
    return op.max_pool2d(x)
