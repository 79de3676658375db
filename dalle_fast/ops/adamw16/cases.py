# SPDX-License-Identifier: MIT
"""Updates for the generic tests and benchmarks; results are what was mutated, moments decoded."""

from __future__ import annotations

from typing import Any

import torch

from .._cases import Arguments, Case, Room
from ..minifloat.reference import minifloat_decode_reference, minifloat_encode_reference
from . import adamw16
from .reference import adamw16_reference

# Cases hold the moments as numbers: a code may differ by one where float32 and float64 straddle a tie, and only the
# number has a tolerance.


def _encode(means, variances) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return (
        [minifloat_encode_reference(t, "1-6-9") for t in means],
        [minifloat_encode_reference(t, "0-6-10") for t in variances],
    )


def _results(params, means, variances, emas) -> tuple[torch.Tensor, ...]:
    decoded = [minifloat_decode_reference(t, "1-6-9") for t in means]
    decoded += [minifloat_decode_reference(t, "0-6-10") for t in variances]
    return (*params, *decoded, *emas)


def _function(params, grads, means, variances, emas, **options: Any) -> tuple[torch.Tensor, ...]:
    codes = _encode(means, variances)
    adamw16(params, grads, *codes, emas, **options)
    return _results(params, *codes, emas)


def _reference(params, grads, means, variances, emas, *, betas, **options: Any) -> tuple[torch.Tensor, ...]:
    codes = _encode(means, variances)
    options = {"found_inf": None, **options}
    adamw16_reference(params, grads, *codes, emas, beta1=betas[0], beta2=betas[1], **options)
    return _results(params, *codes, emas)


def _case(
    name: str,
    *shapes: tuple[int, ...],
    ema: bool = False,
    size: float = 1e-2,
    capturable: bool = False,
    found_inf: float | None = None,
    **options: Any,
) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        def draw(shape, factor=1.0):
            return torch.randn(shape, generator=generator) * factor

        params = [draw(shape) for shape in shapes]
        grads = [draw(shape, size).to(dtype) for shape in shapes]
        means = [draw(shape, size) for shape in shapes]
        variances = [draw(shape, size).square() for shape in shapes]
        means, variances = _encode(means, variances)
        means = [minifloat_decode_reference(t, "1-6-9") for t in means]
        variances = [minifloat_decode_reference(t, "0-6-10") for t in variances]
        emas = [draw(shape) for shape in shapes] if ema else []
        settings = {"step": 7, "lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2,
                    "variance_clip": 5.0, "grad_scale": 1.0, "ema_decay": 0.99}  # fmt: skip
        settings |= options
        if capturable:
            settings["step"] = [torch.tensor(3 * i) for i in range(len(shapes))]
            settings["lr"] = torch.tensor(settings["lr"], dtype=torch.float64)
            settings["grad_scale"] = torch.tensor(settings["grad_scale"])
            settings["found_inf"] = None if found_inf is None else torch.tensor([found_inf])
        return (params, grads, means, variances, emas), settings

    return Case(name, build, (torch.float32, torch.bfloat16))


ROOM = Room(
    name="adamw16",
    function=_function,
    reference=_reference,
    cases=(
        _case("two", (37, 5), (11,)),
        _case("ema", (3, 4, 5), (64, 33), ema=True),
        _case("scaled", (129,), grad_scale=1024.0, size=8.0),
        _case("clipped", (40,), size=30.0, step=1, variance_clip=5.0),
        _case("one", (1,), (), step=1, ema=True),
        _case("empty", (0, 3)),
        _case("chunks", (40_003,)),
        _case("vectors", (2057,), ema=True),
        _case("capturable", (37, 5), (1,), (64, 33), ema=True, capturable=True, found_inf=0.0, grad_scale=8.0),
        _case("no_found_inf", (130,), capturable=True),
        _case("found_inf", (11, 3), (8,), ema=True, capturable=True, found_inf=1.0),
    ),
    # moments may land on the neighbouring code (2^-9, 2^-10 relative) where float32 and float64 straddle a tie
    tolerance={torch.float32: (2.5e-3, 1e-6), torch.bfloat16: (2.5e-3, 1e-6)},
    differentiable=False,
)
