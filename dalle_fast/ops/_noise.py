# SPDX-License-Identifier: MIT
"""Arguments that say which random words an op draws, and at which temperature or probability."""

from __future__ import annotations

from ._checks import check_int, check_number, shown

_MAX_ROWS = 2**32
_LEAST_TAU = 1e-30  # its inverse is a float32


def check_tau(tau: float) -> float:
    """`tau` as a float; raises TypeError or ValueError for what is no temperature."""
    check_number("tau", tau)
    if not _LEAST_TAU <= tau <= 1 / _LEAST_TAU:
        limits = f"at least {_LEAST_TAU:g}, at most {1 / _LEAST_TAU:g}"
        raise ValueError(f"tau: expected a finite temperature > 0 ({limits}), got {shown(tau)}")
    return float(tau)


def check_probability(p: float) -> None:
    """Raises TypeError or ValueError for what is no probability below 1."""
    check_number("p", p)
    if not 0 <= p < 1:
        raise ValueError(f"p: expected 0 <= p < 1, got {shown(p)}")


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
        check_int(name, value)
    if row_offset < 0 or row_offset + num_rows > _MAX_ROWS:
        raise ValueError(f"row_offset: expected 0..2^32 - {num_rows} (the rows of {rows_of}), got {shown(row_offset)}")
    return _signed64("seed", seed), _signed64("offset", offset)


def _signed64(name: str, value: int) -> int:
    if value < -(2**63) or value >= 2**64:
        raise ValueError(f"{name}: expected a 64-bit integer, got {shown(value)}")
    return value - 2**64 if value >= 2**63 else value
