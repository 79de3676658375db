# SPDX-License-Identifier: MIT
"""Calls of vq_bottleneck for the generic tests and benchmarks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .._cases import Arguments, Case, Room, randn
from . import vq_bottleneck
from .reference import vq_bottleneck_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _case(
    name: str,
    *shape: int,
    codes: int,
    width: int,
    tau: float = 0.7,
    bias: bool = True,
    channels_last: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **options: Any,
) -> Case:
    """`shape` of x, `codes` V, `width` D of the codebook; logits of standard deviation 1."""

    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        x = randn(generator, *shape, dtype=dtype, requires_grad=False)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        kernel = (1, 1) if len(shape) == 4 else ()
        weight = randn(generator, codes, shape[1], *kernel, dtype=dtype, requires_grad=False) * shape[1] ** -0.5
        head_bias = randn(generator, codes, dtype=dtype) if bias else None
        codebook = randn(generator, width, codes, *kernel, dtype=dtype)
        codebook_bias = randn(generator, width, dtype=dtype) if bias else None
        args = (x.requires_grad_(), weight.requires_grad_(), head_bias, codebook, tau)
        return args, {"seed": 7, "offset": 3, "codebook_bias": codebook_bias, **options}

    cells = math.prod(shape) // shape[1]
    return Case(name, build, dtypes, flops=2 * cells * codes * (shape[1] + width))


def _composed(
    x: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    codebook: torch.Tensor,
    tau: float,
    seed: int,
    offset: int,
    codebook_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.conv2d(x, head_weight, head_bias)
    out = F.conv2d(F.gumbel_softmax(logits, tau, dim=1), codebook, codebook_bias)
    log_q = F.log_softmax(logits.float(), dim=1)
    return out, (log_q.exp() * log_q).sum(1) + math.log(logits.shape[1])


ROOM = Room(
    name="vq_bottleneck",
    function=vq_bottleneck,
    reference=vq_bottleneck_reference,
    cases=(
        _case("grid", 2, 3, 3, 5, codes=13, width=4),
        _case("channels_last", 2, 8, 3, 3, codes=70, width=6, channels_last=True),
        _case("rows", 9, 5, codes=32, width=3, bias=False, row_offset=11),
        _case("cold", 1, 6, 2, 4, codes=40, width=5, tau=1 / 16),
        _case("warm", 7, 4, codes=300, width=3, tau=5.0, seed=2**63 + 5, offset=2**40 + 1),
        _case("wide", 5, 4, codes=1100, width=2),
        # CUDA: beyond what threads hold in registers
        _case("beyond", 2, 1, codes=16401, width=1, bias=False, dtypes=(torch.float32, torch.bfloat16)),
        _case("one", 1, 1, 1, 1, codes=1, width=1),
        _case("empty", 0, 4, 3, 3, codes=5, width=2),
    ),
    # float32: noise to 2^-22 or so, divided by tau = 1/16. bfloat16: y is rounded, then its product with the codebook.
    tolerance={torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)},
    # bfloat16: y and dlogits are rounded, |gradients| to about 50
    grad_tolerance={torch.float32: (1e-4, 1e-4), torch.bfloat16: (4e-2, 4e-2), torch.float16: (6e-3, 4e-3)},
    benchmarks=(
        _case("32x96x8x8 256 codes", 32, 96, 8, 8, codes=256, width=32, channels_last=True),
        _case("1x256x32x32 8192 codes", 1, 256, 32, 32, codes=8192, width=128, channels_last=True),
    ),
    peers={"composed ops": _composed},
    curves={
        "codes": {
            codes: _case(f"1x96x32x32 {codes} codes", 1, 96, 32, 32, codes=codes, width=32, channels_last=True)
            for codes in (256, 1024, 4096)
        }
    },
)
