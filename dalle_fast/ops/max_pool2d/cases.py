# SPDX-License-Identifier: MIT
"""Calls of max_pool2d for the generic tests and benchmarks."""

from __future__ import annotations

import torch

from .._cases import Arguments, Case, Room
from . import max_pool2d
from .reference import max_pool2d_reference


def _case(name: str, *shape: int) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        # in float32 far enough from each other for finite differences
        values = torch.randperm(torch.Size(shape).numel(), generator=generator).view(shape) / 16
        return ((values - 4).to(dtype).requires_grad_(),), {}

    return Case(name, build)


ROOM = Room(
    name="max_pool2d",
    function=max_pool2d,
    reference=max_pool2d_reference,
    cases=(
        _case("grid", 2, 3, 4, 6),
        _case("wide", 1, 2, 6, 70),
        _case("one", 1, 1, 2, 2),
        _case("empty", 0, 3, 4, 4),
    ),
    tolerance=dict.fromkeys((torch.float32, torch.bfloat16), (0.0, 0.0)),  # a choice is exact
    benchmarks=(_case("32x24x32x32", 32, 24, 32, 32),),
    peers={"F.max_pool2d": max_pool2d_reference},
)
