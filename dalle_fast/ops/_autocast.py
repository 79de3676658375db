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
        TypeError: autocast is off and the dtypes differ.
    """
    if is_autocast(x):
        return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x ({x.dtype}), got {tensor.dtype}")
    return x.dtype


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation(x, ...)` of a registered op in a region without autocast: its operands are cast already."""

    def run(x: torch.Tensor, *args: Any) -> Any:
        if is_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return implementation(x, *args)
        return implementation(x, *args)

    return run
