# SPDX-License-Identifier: MIT
"""One compression and decompression for the generic tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._cases import Arguments, Case, Room
from ..minifloat import minifloat_decode, minifloat_encode
from . import powersgd_project, powersgd_reconstruct
from .reference import powersgd_project_reference, powersgd_reconstruct_reference


def _step(project: Any, reconstruct: Any, error, factor, grad, machines: int, **backend: str):
    p, status = project(error, factor, grad, inverse_grad_scale=0.5, scale=2.0, **backend)
    q, _ = project(error.mT, p, **backend)
    return p, status, q, reconstruct(p, q, error, grad_factor=0.25, error_factor=0.25 / machines, **backend)


def _compress(error, factor, grad, machines: int = 4, *, backend: str = "auto"):
    return _step(powersgd_project, powersgd_reconstruct, error, factor, grad, machines, backend=backend)


def _reference(error, factor, grad, machines: int = 4):
    return _step(powersgd_project_reference, powersgd_reconstruct_reference, error, factor, grad, machines)


def _case(
    name: str, m: int, n: int, r: int, *, transposed: bool = False, codes: bool = True, bf16: bool = False
) -> Case:
    """Numbers so short that every product and sum is exact in float32: the tests ask for equal codes."""

    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        def draw(rows: int, columns: int, most: int) -> torch.Tensor:
            return torch.randint(-most, most + 1, (rows, columns), generator=generator).float()

        error = minifloat_encode(draw(n, m, 2).mT / 32 if transposed else draw(m, n, 2) / 32, "1-6-9")
        if transposed:
            error = error.mT.contiguous().mT
        factor = draw(n, r, 1)
        grad = draw(m, n, 2) / 32
        grad = grad.to(torch.bfloat16) if bf16 else grad
        return (error, minifloat_encode(factor, "1-6-9") if codes else factor, grad), {}

    return Case(name, build, (torch.float32,))


def _real(m: int, n: int, r: int) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        error = minifloat_encode(torch.randn(m, n, generator=generator) * 1e-3, "1-6-9")
        factor = minifloat_encode(torch.randn(n, r, generator=generator), "1-6-9")
        return (error, factor, torch.randn(m, n, generator=generator) * 1e-3), {}

    return Case(f"{m}x{n} rank {r}", build, (torch.float32,), flops=6 * m * n * r)


def _peer(error, factor, grad, machines: int = 4):
    """The composed ops on the same 16-bit error buffer."""
    e = minifloat_decode(error, "1-6-9").add_(grad, alpha=0.5)
    p = (e @ minifloat_decode(factor, "1-6-9")).mul_(2.0)
    q = e.mT @ p
    g = p @ q.mT
    error.copy_(minifloat_encode(e.sub_(g, alpha=0.25 / machines), "1-6-9"))
    return g.mul_(0.25)


def _float_peer(arguments: Arguments, backward: bool) -> Callable[..., torch.Tensor]:
    """The composed ops on float32 buffers of twice the size, as torch's hook has them."""
    error, factor, grad = arguments[0]
    e, x = minifloat_decode(error, "1-6-9"), minifloat_decode(factor, "1-6-9")

    def run(*_: Any, machines: int = 4) -> torch.Tensor:
        e.add_(grad, alpha=0.5)
        p = (e @ x).mul_(2.0)
        q = e.mT @ p
        g = p @ q.mT
        e.sub_(g, alpha=0.25 / machines)
        return g.mul_(0.25)

    return run


ROOM = Room(
    name="powersgd",
    function=_compress,
    reference=_reference,
    cases=(
        _case("rows", 13, 21, 3),
        _case("tiles", 70, 131, 5),
        _case("transposed", 37, 19, 4, transposed=True),
        _case("transposed_tiles", 67, 66, 17, transposed=True),
        _case("float_factor", 9, 10, 2, codes=False),
        _case("bf16_grad", 11, 35, 3, bf16=True),
        _case("rank_7", 24, 40, 7),
        _case("rank_112", 33, 72, 112),
        _case("rank_130", 20, 6, 130),
        _case("rank_130_transposed", 16, 136, 130, transposed=True, bf16=True),
        _case("vectors", 16, 136, 5),
        _case("vectors_bf16", 8, 72, 9, bf16=True),
        _case("vectors_transposed", 136, 24, 6, transposed=True, codes=False),
        _case("vectors_transposed_bf16", 16, 40, 6, transposed=True, bf16=True),
        _case("shares_of_the_depth", 9, 264, 3, codes=False),
        _case("one", 1, 1, 1),
        _case("empty", 0, 5, 2),
    ),
    tolerance={torch.float32: (0.0, 0.0)},
    differentiable=False,
    benchmark_bound=4e-3,  # real numbers: each of three products is rounded by up to 2^-10, and made of rounded ones
    benchmarks=(_real(496, 3968, 112), _real(1984, 3968, 112)),
    peers={"composed ops": _peer},
    curves={"rank": {rank: _real(496, 3968, rank) for rank in (14, 28, 56, 112, 224)}},
    prepared_peers={"composed ops, float32 buffers": _float_peer},
)
