# SPDX-License-Identifier: MIT
"""The paper's 16-bit formats, 1-6-9 and 0-6-10, as arrays of codes."""

from __future__ import annotations

import torch

from .. import _backend
from .._checks import check_tensor, shown
from . import op
from .reference import FORMATS, minifloat_decode_reference, minifloat_encode_reference


def _check_format(fmt: str) -> None:
    if not isinstance(fmt, str) or fmt not in FORMATS:
        raise ValueError(f"fmt: expected one of {', '.join(FORMATS)}, got {shown(fmt)}")


def minifloat_encode(x: torch.Tensor, fmt: str, *, backend: str = "auto") -> torch.Tensor:
    """Rounds numbers to a 16-bit format (paper section 2.4, appendix D).

    "1-6-9" is sign, 6 exponent bits, 9 significand bits; "0-6-10" has no sign. Bias 59: smallest normal 2^-58, largest
    finite 15.984375 and 15.9921875. Gradual underflow, round to nearest even, beyond the largest Inf, NaN stays NaN;
    "0-6-10" takes negative numbers to 0.

    Args:
        x: float32, any shape and strides; bfloat16, float16 and float64 are converted to it first.
        fmt: "1-6-9" or "0-6-10".
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        uint16 codes of the same shape. Not differentiable.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: unknown `fmt` or `backend`.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> minifloat_decode(minifloat_encode(torch.tensor([0.1, 20.0]), "1-6-9"), "1-6-9")
        tensor([0.1000,    inf])
    """
    check_tensor("x", x)
    _check_format(fmt)
    x = x.detach().float()
    if _backend.choose("minifloat", backend, x) == "reference":
        return minifloat_encode_reference(x, fmt)
    return op.minifloat_encode(x, fmt == "1-6-9")


def minifloat_decode(code: torch.Tensor, fmt: str, *, backend: str = "auto") -> torch.Tensor:
    """The numbers of 16-bit codes, exactly.

    Args:
        code: uint16, any shape and strides.
        fmt: "1-6-9" or "0-6-10".
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: `code` is not uint16.
        ValueError: unknown `fmt` or `backend`.
        RuntimeError: an explicit `backend` cannot run.
    """
    check_tensor("code", code, (torch.uint16,), "a uint16")
    _check_format(fmt)
    if _backend.choose("minifloat", backend, code) == "reference":
        return minifloat_decode_reference(code, fmt)
    return op.minifloat_decode(code, fmt == "1-6-9")
