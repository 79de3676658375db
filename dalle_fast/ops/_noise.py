# SPDX-License-Identifier: MIT
"""Arguments that say which random words an op draws, and at which temperature or probability."""

from __future__ import annotations

import math

import torch

_MAX_ROWS = 2**32
_LEAST_TAU = 1e-30  # its inverse is a float32


def check_tau(tau: float) -> None:
    """Raises TypeError or ValueError for what is no temperature."""
    if not isinstance(tau, (int, float)):
        raise TypeError(f"tau: expected a number, got {tau!r}")
    if not _LEAST_TAU <= tau < math.inf:
        raise ValueError(f"tau: expected a finite temperature > 0 (at least {_LEAST_TAU:g}), got {tau}")


def check_probability(p: float) -> None:
    """Raises TypeError or ValueError for what is no probability below 1."""
    if not isinstance(p, (int, float)):
        raise TypeError(f"p: expected a number, got {p!r}")
    if not 0 <= p < 1:
        raise ValueError(f"p: expected 0 <= p < 1, got {p}")


def check_noise(seed: int, offset: int, row_offset: int, num_rows: int, rows_of: str) -> tuple[int, int]:
    """Seed and offset as the signed integers that torch's dispatcher can carry.

    Args:
        seed: 64 bits, signed or unsigned.
        offset: 64 bits, signed or unsigned.
        row_offset: number of the first row.
        num_rows: how many there are.
        rows_of: the name of the argument they come from.

    Raises:
        TypeError: one of the three is not an int.
        ValueError: one is out of range.
    """
    for name, value in (("seed", seed), ("offset", offset), ("row_offset", row_offset)):
        if not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an int, got {value!r}")
    if row_offset < 0 or row_offset + num_rows > _MAX_ROWS:
        raise ValueError(f"row_offset: expected 0..2^32 - {num_rows} (the rows of {rows_of}), got {row_offset}")
    return _signed64("seed", seed), _signed64("offset", offset)


def _signed64(name: str, value: int) -> int:
    if value < -(2**63) or value >= 2**64:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    return value - 2**64 if value >= 2**63 else value
