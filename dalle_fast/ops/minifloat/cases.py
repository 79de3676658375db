# SPDX-License-Identifier: MIT
"""Round trips through both formats for the generic tests and benchmarks."""

from __future__ import annotations

import torch

from .._cases import Arguments, Case, Room, randn
from . import minifloat_decode, minifloat_encode
from .reference import minifloat_decode_reference, minifloat_encode_reference


def _round_trip(x: torch.Tensor, fmt: str, *, backend: str = "auto") -> torch.Tensor:
    return minifloat_decode(minifloat_encode(x, fmt, backend=backend), fmt, backend=backend)


def _reference(x: torch.Tensor, fmt: str) -> torch.Tensor:
    return minifloat_decode_reference(minifloat_encode_reference(x, fmt), fmt)


def _case(name: str, fmt: str, *shape: int) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        x = randn(generator, *shape, dtype=torch.float32, requires_grad=False)
        scale = torch.randint(-70, 5, shape, generator=generator)
        return (torch.ldexp(x, scale).to(dtype), fmt), {}

    return Case(name, build, (torch.float32,))


def _peer(x: torch.Tensor, fmt: str) -> torch.Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


ROOM = Room(
    name="minifloat",
    function=_round_trip,
    reference=_reference,
    cases=(
        _case("signed", "1-6-9", 37, 53),
        _case("unsigned", "0-6-10", 5, 7, 11),
        _case("one", "1-6-9", 1),
        _case("empty", "0-6-10", 0, 4),
        _case("chunks", "1-6-9", 40_001),
    ),
    tolerance={torch.float32: (0.0, 0.0)},  # rounding is exact by definition
    differentiable=False,
    benchmarks=(_case("1-6-9 16M", "1-6-9", 1 << 24), _case("0-6-10 16M", "0-6-10", 1 << 24)),
    peers={"to(bfloat16).to(float32)": _peer},
)
