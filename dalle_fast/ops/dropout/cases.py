# SPDX-License-Identifier: MIT
"""Calls of dropout for the generic tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._cases import Arguments, Case, Room, randn
from . import dropout
from .reference import dropout_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(name: str, *shape: int, p: float = 0.1, **options: Any) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        return (randn(generator, *shape, dtype=dtype), p), {"seed": 7, "offset": 3, **options}

    return Case(name, build, DTYPES)


def _peer(x: torch.Tensor, p: float, **_: Any) -> torch.Tensor:
    return F.dropout(x, p)


ROOM = Room(
    name="dropout",
    function=dropout,
    reference=dropout_reference,
    cases=(
        _case("odd", 3, 5, 37),
        _case("pieces", 6, 64, p=0.5),
        _case("vector", 131, p=0.3),
        _case("one", 1, 1),
        _case("columns_of_one", 9, 1, p=0.5),
        _case("empty", 0, 4),
        _case("no_columns", 3, 0),
        _case("nothing_dropped", 4, 9, p=0.0),
        _case("almost_all_dropped", 5, 70, p=0.99),
        _case("big_numbers", 2, 3, 24, seed=2**63 + 5, offset=2**40 + 1, row_offset=2**32 - 6),
        _case("long_rows", 3, 4100, row_offset=11),  # CPU: a row is several tasks
        _case("trips", 18, 1000, p=0.2),  # CUDA: more pieces than the executor has threads
    ),
    # One rounding of 1 / (1 - p) and one of the product, in float32; 16 bits: and the result's, subnormal or not.
    tolerance={torch.float32: (1.3e-7, 0.0), torch.bfloat16: (4e-3, 0.0), torch.float16: (5e-4, 3e-8)},
    benchmarks=(_case("64x88x256", 64, 88, 256), _case("8x1280x512", 8, 1280, 512)),
    peers={"F.dropout": _peer},
)
