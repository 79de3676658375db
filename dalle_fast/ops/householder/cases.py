# SPDX-License-Identifier: MIT
"""Matrices to orthonormalise for the generic tests and benchmarks."""

from __future__ import annotations

import math

import torch

from .._cases import Arguments, Case, Room, randn
from . import orthonormalize
from .reference import orthonormalize_reference


def _case(
    name: str,
    *shape: int,
    eps: float = 1e-6,
    column_scales: tuple[float, float] | None = None,
    transposed: bool = False,
) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        p = randn(generator, *shape, dtype=dtype, requires_grad=False)
        if transposed:
            p = p.mT.contiguous().mT
        if column_scales:
            p = p * torch.logspace(*column_scales, shape[-1])
        return (p,), {"eps": eps}

    m, r = shape[-2:]
    flops = math.prod(shape[:-2]) * (4 * m * r * r - 4 * r**3 // 3)  # the factors, then the columns of Q
    return Case(name, build, (torch.float32,), flops=flops)


def _with_diagonal(p: torch.Tensor, eps: float) -> torch.Tensor:
    p = p.clone()
    p.diagonal(dim1=-2, dim2=-1).add_(eps)
    return p


def _qr(p: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.linalg.qr(_with_diagonal(p, eps)).Q


def _geqrf(p: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.linalg.householder_product(*torch.geqrf(_with_diagonal(p, eps)))


ROOM = Room(
    name="householder",
    function=orthonormalize,
    reference=orthonormalize_reference,
    cases=(
        _case("tall", 37, 5),
        _case("batch", 3, 41, 20, eps=0.5),
        _case("panels", 70, 35),
        _case("wide", 150, 140, eps=3.0),
        _case("wide_transposed", 100, 98, eps=3.0, transposed=True),
        _case("square", 2, 18, 18, eps=4.0),
        _case("graded", 64, 24, column_scales=(-12, 12)),
        _case("tiny", 30, 7, column_scales=(-30, -30), eps=0.0),
        _case("huge", 30, 7, column_scales=(30, 30)),
        _case("tall_panels", 150, 33),
        _case("taller_panels", 250, 33),
        _case("many_pivots", 60, 50, eps=2.0),
        _case("column", 9, 1),
        _case("one", 1, 1),
        _case("empty_batch", 0, 8, 4),
        _case("no_columns", 2, 8, 0),
    ),
    # A basis moves by about condition number x rounding x m; the cases have condition numbers below 100.
    tolerance={torch.float32: (0.0, 2e-5)},
    differentiable=False,
    benchmarks=(
        _case("496x112", 496, 112),
        _case("1984x112", 1984, 112),
        _case("3968x112", 3968, 112),
        _case("32 x 496x112", 32, 496, 112),
    ),
    peers={"torch.linalg.qr": _qr, "geqrf + householder_product": _geqrf},
    curves={"rank": {rank: _case(f"1984x{rank}", 1984, rank) for rank in (14, 28, 56, 112, 224)}},
)
