# SPDX-License-Identifier: MIT
"""Ops that multiply matrices take their operands in the dtype that torch.autocast asks for, as F.linear does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: torch.Tensor, others: dict[str, torch.Tensor | None]) -> torch.dtype:
    """The dtype of the operands: that of `x`, or autocast's.

    Args:
        x: the first operand.
        others: further operands by their names; None for one that is absent.

    Raises:
        TypeError: autocast is off and the dtypes differ, or it is on and some are float64, which it does not round.
    """
    if is_autocast(x):  # which leaves float64 alone
        wide = x.dtype == torch.float64
        for name, tensor in others.items():
            if tensor is not None and (tensor.dtype == torch.float64) != wide:
                expected = "float64, as x has," if wide else f"no float64 beside x ({x.dtype})"
                raise TypeError(f"{name}: expected {expected} under autocast, got {tensor.dtype}")
        return x.dtype if wide else torch.get_autocast_dtype(x.device.type)
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x ({x.dtype}), got {tensor.dtype}")
    return x.dtype


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation(x, ...)` in a region without autocast: its operands are cast already, or stay as they are."""

    def run(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if is_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return implementation(x, *args, **options)
        return implementation(x, *args, **options)

    return run
