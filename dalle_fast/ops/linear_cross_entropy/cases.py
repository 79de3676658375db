# SPDX-License-Identifier: MIT
"""Calls of linear_cross_entropy for the generic tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._cases import Arguments, Case, Room, randn
from . import linear_cross_entropy
from .reference import linear_cross_entropy_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(
    name: str,
    num_rows: int,
    width: int,
    num_codes: int,
    *,
    bias: bool = True,
    ignored: int = 0,
    chunk: int | None = None,
    spread: float = 1.0,
    **options: float,
) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        x = randn(generator, num_rows, width, dtype=dtype)
        weight = (randn(generator, num_codes, width, dtype=dtype).detach() * spread).requires_grad_()
        target = torch.randint(num_codes, (num_rows,), generator=generator)
        target[:ignored] = -100
        b = randn(generator, num_codes, dtype=dtype) if bias else None
        return (x, weight, target, b), {"chunk_rows": chunk, **options}

    return Case(name, build, DTYPES, flops=2 * num_rows * width * num_codes)


def _trained(num_rows: int, width: int, num_codes: int) -> Case:
    """Logits of standard deviation 1: with larger ones torch's softmax makes subnormal numbers, which are slow."""
    return _case(f"{num_rows}x{width}x{num_codes}", num_rows, width, num_codes, bias=False, spread=width**-0.5)


def _reference(*args: torch.Tensor | None, **_: float | None) -> torch.Tensor:
    return linear_cross_entropy_reference(*args)  # the options change memory and time, not values


def _peer(*args: torch.Tensor | None, chunk_rows: int | None = None) -> torch.Tensor:
    x, weight, target, bias = args
    return F.cross_entropy(F.linear(x, weight, bias), target)


def _torch_peer(*args: torch.Tensor | None, chunk_rows: int | None = None) -> torch.Tensor:
    x, weight, target, bias = args
    return F.linear_cross_entropy(x, weight, target, linear_bias=bias)


def _chunked_peer(*args: torch.Tensor | None, chunk_rows: int | None = None) -> torch.Tensor:
    x, weight, target, bias = args
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, linear_bias=bias, options=options)


_TORCH_PEERS = {}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since torch 2.14
    _TORCH_PEERS = {"F.linear_cross_entropy": _torch_peer, "F.linear_cross_entropy in chunks": _chunked_peer}

ROOM = Room(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=_reference,
    cases=(
        _case("odd", 5, 7, 11),
        _case("no_bias", 9, 8, 33, bias=False),
        _case("ignored", 12, 6, 17, ignored=5),
        _case("chunks", 37, 16, 70, chunk=8),
        _case("upstream", 6, 5, 9, ignored=1, upstream=0.3),
        _case("one", 1, 1, 1),
        _case("wide", 20, 24, 300, bias=False),
        # CUDA: rows of one and several warps, of whole pieces and not, in registers and beyond them
        _case("warp", 4, 8, 64, ignored=1),
        _case("full_warp", 2, 3, 1024),
        _case("block", 2, 3, 1096, bias=False, ignored=1),
        _case("beyond", 2, 1, 16408),
        _case("beyond_odd", 2, 1, 16387, bias=False),
    ),
    # float32: sums of a few hundred products. 16-bit: the logits (|x| to about 15) are rounded to bfloat16 once, 2^-9
    # relative, and so are the gradients; float16 inputs have float32 logits, on CUDA dlogits are rounded to float16.
    tolerance={torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 3e-2), torch.float16: (2e-3, 2e-3)},
    grad_tolerance={torch.float32: (2e-5, 2e-5), torch.bfloat16: (4e-2, 3e-2), torch.float16: (4e-3, 2e-3)},
    benchmarks=(_trained(1024, 512, 8192), _trained(4096, 256, 256)),
    peers={"F.cross_entropy(F.linear)": _peer, **_TORCH_PEERS},
    curves={"codes": {codes: _trained(1024, 512, codes) for codes in (512, 2048, 8192)}},
)
