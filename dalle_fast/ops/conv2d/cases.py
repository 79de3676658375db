# SPDX-License-Identifier: MIT
"""Calls of conv2d for the generic tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from .._cases import Arguments, Case, Room, randn
from . import conv2d
from .reference import conv2d_reference


def _case(
    name: str,
    batch: int,
    num_in: int,
    num_out: int,
    height: int,
    width: int,
    kernel: int = 3,
    *,
    residual: bool = False,
    channels_last: bool = False,
    grad_x: bool = True,
    **options: Any,
) -> Case:
    def build(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        x = randn(generator, batch, num_in, height, width, dtype=dtype, requires_grad=False)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_(grad_x)
        weight = randn(generator, num_out, num_in, kernel, kernel, dtype=dtype, requires_grad=False)
        weight = weight.mul_((num_in * kernel**2) ** -0.5).requires_grad_()
        args = [x, weight, randn(generator, num_out, dtype=dtype)]
        if residual:
            scale = 1 + options.get("upsample", False)
            args.append(randn(generator, batch, num_out, scale * height, scale * width, dtype=dtype))
        return tuple(args), options

    flops = 2 * batch * height * width * num_in * num_out * kernel**2
    return Case(name, build, flops=flops)


def _peer(*args: Any, **options: Any) -> torch.Tensor:
    """oneDNN's way: channels_last, whose conversion a model in that format does not pay."""
    return conv2d_reference(*args, **options)


ROOM = Room(
    name="conv2d",
    function=conv2d,
    reference=conv2d_reference,
    cases=(
        _case("grid", 3, 5, 7, 6, 9, relu=True),
        _case("block", 5, 12, 6, 8, 8, residual=True, gain=0.25, relu=True),
        _case("one_by_one", 3, 8, 20, 5, 3, 1, residual=True, gain=0.5, relu=True),
        _case("input", 2, 3, 13, 20, 33, 7, grad_x=False),
        _case("channels_last", 2, 6, 4, 7, 5, relu=True, channels_last=True),
        _case("kernel_beyond_the_image", 1, 2, 3, 2, 1, 7),
        _case("upsample", 3, 8, 7, 5, 9, 1, relu=True, upsample=True),
        _case("upsample_wide", 5, 4, 13, 3, 37, residual=True, gain=0.5, upsample=True),
        _case("gain", 1, 3, 2, 4, 4, gain=-2.0),
        _case("wide", 2, 3, 5, 3, 70, 5, relu=True),
        _case("bands", 2, 3, 4, 40, 32, relu=True),
        _case("bands_between_vectors", 1, 5, 3, 30, 40, residual=True, gain=0.5, relu=True),
        _case("one", 1, 1, 1, 1, 1),
        _case("empty", 0, 3, 2, 4, 4, relu=True),
    ),
    # sums of up to 150 products; bfloat16: results are rounded
    tolerance={torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 8e-3)},
    # and over batch and pixels
    grad_tolerance={torch.float32: (1e-4, 1e-4), torch.bfloat16: (8e-3, 2e-2)},
    benchmarks=(
        _case("32x24x32x32 to 6", 32, 24, 6, 32, 32, relu=True, channels_last=True),
        _case("32x12x16x16 to 12", 32, 12, 12, 16, 16, relu=True, channels_last=True),
        _case("32x24x8x8 to 96", 32, 24, 96, 8, 8, residual=True, gain=1 / 36, relu=True, channels_last=True),
    ),
    peers={"F.conv2d": _peer},
)
