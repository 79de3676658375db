# SPDX-License-Identifier: MIT
"""The 16-bit formats in plain torch, by arithmetic on values rather than on bits."""

from __future__ import annotations

import torch

FORMATS = {"1-6-9": (True, 9), "0-6-10": (False, 10)}
BIAS = 59


def minifloat_encode_reference(x: torch.Tensor, fmt: str, bias: int = BIAS) -> torch.Tensor:
    """Nearest even code of each number, uint16."""
    has_sign, bits = FORMATS[fmt]
    inf = 63 << bits
    x = x.double()
    magnitude = x.abs()
    finite = magnitude.isfinite()
    safe = torch.where(finite & (magnitude > 0), magnitude, 1.0)
    exponent = torch.frexp(safe).exponent.long() - 1  # safe = f * 2^exponent, 1 <= f < 2
    exponent = exponent.clamp(min=1 - bias)
    step = torch.ldexp(torch.ones_like(safe), exponent - bits)
    steps = torch.round(torch.where(finite, magnitude, 0.0) / step).long()  # torch.round: ties to even
    # a normal number has 2^bits <= steps; one more exponent code for each power above the smallest normal
    code = steps + ((exponent + bias - 1) << bits)
    code = torch.where(magnitude == 0, 0, code.clamp(max=inf))
    code = torch.where(x.isinf(), inf, code)
    negative = torch.signbit(x)
    if not has_sign:
        code = torch.where(negative, 0, code)
    nan = inf | 1 << (bits - 1)
    code = torch.where(x.isnan(), nan, code)
    if has_sign:
        code = code | negative.long() << 15
    return code.to(torch.uint16)


def minifloat_decode_reference(code: torch.Tensor, fmt: str, bias: int = BIAS) -> torch.Tensor:
    """The number of each code, float32."""
    has_sign, bits = FORMATS[fmt]
    value = code.to(torch.int64)
    sign = torch.where(value >> 15 == 1, -1.0, 1.0) if has_sign else torch.ones((), device=code.device)
    value = value & 0x7FFF if has_sign else value
    exponent, fraction = value >> bits, value & ((1 << bits) - 1)
    significand = torch.where(exponent > 0, fraction + (1 << bits), fraction).double()
    number = torch.ldexp(significand, exponent.clamp(min=1) - bias - bits)
    number = torch.where(exponent == 63, torch.where(fraction == 0, torch.inf, torch.nan), number)
    return (number * sign).float()
