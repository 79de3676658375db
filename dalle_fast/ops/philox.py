# SPDX-License-Identifier: MIT
"""Philox4x32-10 (Salmon et al., SC 2011) in plain torch: the numbers that every kernel has to draw."""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul(multiplier: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of multiplier * x. int64 has no unsigned product, so x goes in two halves."""
    low = multiplier * (x & 0xFFFF)  # < 2^48
    high = multiplier * (x >> 16)
    middle = high + (low >> 16)  # < 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: torch.Tensor, key: tuple[int, int], rounds: int = 10) -> torch.Tensor:
    """Four random words for each counter.

    Args:
        counter: [..., 4] int64, each word in [0, 2^32).
        key: two 32-bit words (the low and the high half of a seed).
        rounds: 10 as published.

    Returns:
        [..., 4] int64 words in [0, 2^32).

    Raises:
        ValueError: the last dimension of `counter` is not 4.
    """
    if counter.dim() == 0 or counter.shape[-1] != 4:
        raise ValueError(f"counter: expected shape [..., 4], got {list(counter.shape)}")
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key[0] & _WORD, key[1] & _WORD
    for _ in range(rounds):
        high0, low0 = _mul(_MULTIPLIERS[0], c0)
        high1, low1 = _mul(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(
    seed: int, offset: int, num_rows: int, num_columns: int, row_offset: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """Int64 [num_rows, num_columns] in [0, 2^32).

    Element (r, c) is word c % 4 of counter (c // 4, row_offset + r, offset low, offset high) under the seed's two
    halves as key. One call uses one offset: pass the step.
    """
    blocks = (num_columns + 3) // 4
    counter = torch.empty(num_rows, blocks, 4, dtype=torch.int64, device=device)
    counter[..., 0] = torch.arange(blocks, device=device)
    counter[..., 1] = (torch.arange(num_rows, device=device) + row_offset)[:, None] & _WORD
    counter[..., 2] = offset & _WORD
    counter[..., 3] = (offset >> 32) & _WORD
    return philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD)).reshape(num_rows, blocks * 4)[:, :num_columns]


def uniform(
    seed: int, offset: int, num_rows: int, num_columns: int, row_offset: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """Float64 [num_rows, num_columns] in (0, 1), both ends open: u = (word >> 8 + 0.5) * 2^-24 of `words`."""
    return ((words(seed, offset, num_rows, num_columns, row_offset, device) >> 8).double() + 0.5) * 2.0**-24
