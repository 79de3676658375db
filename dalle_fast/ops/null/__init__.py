# SPDX-License-Identifier: MIT
"""The template room: a copy. Copy this folder and csrc/null to begin an op (CONTRIBUTING.md walks through it).

`__init__.py` is what users see: argument checks in their words, the choice of back end, the docstring.
"""

from __future__ import annotations

import torch

from .. import _backend
from .._checks import check_tensor
from . import op
from .reference import null_reference


def null(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Copies a matrix.

    Args:
        x: [N, M], float32, bfloat16 or float16, any strides; float64 runs on the reference.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        [N, M], contiguous, the dtype of `x`. Differentiable.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` has not two dimensions, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> null(torch.ones(2, 3)).sum()
        tensor(6.)
    """
    check_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [N, M], got {list(x.shape)}")
    supported = x.dtype in op.DTYPES
    chosen = _backend.choose("null", backend, x, supported=supported, reason=f"dtype {x.dtype} has no kernel")
    return null_reference(x) if chosen == "reference" else op.null(x)
