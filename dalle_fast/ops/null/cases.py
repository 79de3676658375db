# SPDX-License-Identifier: MIT
"""Calls of the template room for the generic tests and benchmarks."""

from __future__ import annotations

import torch

from .._cases import Case, Room, randn
from . import null
from .reference import null_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _shape(name: str, *shape: int) -> Case:
    return Case(name, lambda generator, dtype: ((randn(generator, *shape, dtype=dtype),), {}), DTYPES)


ROOM = Room(
    name="null",
    function=null,
    reference=null_reference,
    cases=(_shape("odd", 37, 53), _shape("one", 1, 1), _shape("empty", 0, 5), _shape("no_columns", 3, 0)),
    tolerance=dict.fromkeys(DTYPES, (0.0, 0.0)),  # a copy is exact
    benchmarks=(_shape("4096x4096", 4096, 4096),),
    peers={"torch.clone": null_reference},
)
