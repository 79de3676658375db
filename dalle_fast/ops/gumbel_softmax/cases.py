# SPDX-License-Identifier: MIT
"""Calls of gumbel_softmax for the generic tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._cases import Arguments, Case, Room, randn
from . import gumbel_softmax
from .reference import gumbel_softmax_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(name: str, *shape: int, tau: float = 0.7, dim: int = 1, channels_last: bool = False, **options: Any) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        logits = randn(generator, *shape, dtype=dtype, requires_grad=False)
        if channels_last:
            logits = logits.to(memory_format=torch.channels_last)
        logits.requires_grad_(not options.get("hard", False) or options.get("return_kl", False))
        return (logits, tau), {"dim": dim, "seed": 7, "offset": 3, **options}

    if options.get("hard", False):
        peers = {"F.gumbel_softmax(hard=True)": _hard_peer, "argmax of logits and noise": _argmax_peer}
        return Case(name, build, DTYPES, differentiable=False, peers=peers)
    return Case(name, build, DTYPES)


def _peer(logits: torch.Tensor, tau: float, dim: int, **_: Any) -> torch.Tensor:
    return F.gumbel_softmax(logits, tau, dim=dim)


def _hard_peer(logits: torch.Tensor, tau: float, dim: int, **_: Any) -> torch.Tensor:
    return F.gumbel_softmax(logits, tau, dim=dim, hard=True)


def _argmax_peer(logits: torch.Tensor, tau: float, dim: int, **_: Any) -> torch.Tensor:
    """What hard samples are for those who want the index only."""
    return torch.argmax(logits - torch.empty_like(logits).exponential_().log_(), dim)


ROOM = Room(
    name="gumbel_softmax",
    function=gumbel_softmax,
    reference=gumbel_softmax_reference,
    cases=(
        _case("grid", 2, 13, 3, 5),
        _case("codes_dense", 5, 37),
        _case("channels_last", 2, 70, 3, 3, channels_last=True),
        _case("dim0", 9, 7, dim=0),
        _case("last_of_three", 2, 3, 130, dim=-1, row_offset=11),
        _case("big_offset", 3, 8, 17, seed=2**63 + 5, offset=2**40 + 1),
        _case("hard", 3, 70, 5, hard=True),
        _case("hard_dense", 6, 33, hard=True),
        _case("one", 1, 1),
        _case("empty", 0, 4, 3),
        _case("warm", 2, 40, 20, tau=5.0),
        # CUDA: rows of one and several warps, of whole pieces and not, in registers and beyond them
        _case("warp", 3, 64),
        _case("full_warp", 1, 1024, tau=0.1),
        _case("block", 1, 1096),
        _case("beyond", 1, 16408),
        _case("beyond_odd", 1, 16387),
        _case("hard_block", 1, 1096, hard=True),
        # neighbouring rows in pieces; kept and not
        _case("kept", 1, 13, 16),
        _case("not_kept", 1, 70, 16, tau=0.1),
        _case("many_codes", 1, 516, 8),
        _case("hard_pieces", 1, 13, 16, hard=True),
        # all of these again where the KL comes with it
        _case("kl", 2, 13, 3, 5, return_kl=True),
        _case("kl_codes_dense", 5, 37, return_kl=True),
        _case("kl_channels_last", 2, 70, 3, 3, channels_last=True, return_kl=True),
        _case("kl_hard", 3, 70, 5, hard=True, return_kl=True),
        _case("kl_hard_dense", 6, 33, hard=True, return_kl=True),
        _case("kl_one", 3, 1, return_kl=True),
        _case("kl_empty", 0, 4, 3, return_kl=True),
        _case("kl_warp", 3, 64, return_kl=True),
        _case("kl_full_warp", 1, 1024, return_kl=True),
        _case("kl_block", 1, 1096, return_kl=True),
        _case("kl_beyond", 1, 16408, return_kl=True),
        _case("kl_beyond_odd", 1, 16387, return_kl=True),
        _case("kl_hard_block", 1, 1096, hard=True, return_kl=True),
        _case("kl_kept", 1, 13, 16, return_kl=True),
        _case("kl_not_kept", 1, 70, 16, return_kl=True),
        _case("kl_many_codes", 1, 516, 8, return_kl=True),
        _case("kl_hard_pieces", 1, 13, 16, hard=True, return_kl=True),
    ),
    # float32: noise to 2^-22 or so, divided by tau = 0.7. 16-bit: y is rounded once.
    tolerance={torch.float32: (1e-5, 2e-6), torch.bfloat16: (1e-2, 1e-3), torch.float16: (2e-3, 1e-4)},
    # the backward pass reads the rounded y
    grad_tolerance={torch.float32: (1e-4, 1e-5), torch.bfloat16: (4e-2, 1e-2), torch.float16: (6e-3, 2e-3)},
    benchmarks=(
        _case("32x256x8x8", 32, 256, 8, 8),
        _case("32x256x8x8 channels_last", 32, 256, 8, 8, channels_last=True),
        _case("1024x8192", 1024, 8192),
        _case("1024x8192 hard", 1024, 8192, hard=True),
        _case("1x8192x32x32", 1, 8192, 32, 32),
        _case("1x8192x32x32 hard", 1, 8192, 32, 32, hard=True),
    ),
    peers={"F.gumbel_softmax": _peer},
    curves={"codes": {codes: _case(f"1024x{codes}", 1024, codes) for codes in (128, 512, 2048, 8192)}},
)
