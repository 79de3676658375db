# SPDX-License-Identifier: MIT
"""Stops a call before a product that would take minutes, where PyTorch has no fast path for a dtype.

A processor without bfloat16 instructions multiplies float32 at 100 GFLOP/s and bfloat16 at 0.3. Nothing interrupts such
a product once it runs, so its time is estimated first: its FLOPs at the rate of a small one of the same kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from .peak_rates import Peaks

CALL_SECONDS = 15.0  # for one call of anything that is timed or checked
SLOW = 0.25  # of the float32 rate: below it a dtype is taken to have no fast path
CHEAP_FLOPS = 1 << 20  # not worth an estimate

aten = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class TooSlow(Exception):
    """A call that would take too long here; the message says why and how long."""


def slow_dtypes(peaks: Peaks) -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes whose products have no fast path here."""
    rates = peaks.rates
    slow = rates["bfloat16_flop_per_second"] < SLOW * rates["float32_flop_per_second"]
    return (torch.bfloat16, torch.float16) if slow else ()


class SlowProductGuard(TorchDispatchMode):
    """Within it a product of `dtypes` raises TooSlow where it would end more than `seconds` after the start.

    Args:
        dtypes: those of slow products.
        seconds: for all that happens within.
        rate: FLOP/s of a small product like (op, dtype).
    """

    def __init__(
        self,
        dtypes: tuple[torch.dtype, ...],
        seconds: float = CALL_SECONDS,
        rate: Callable[[str, torch.dtype], float] | None = None,
    ) -> None:
        super().__init__()
        self.dtypes, self.seconds, self.rate = dtypes, seconds, rate or small_rate
        self.begin = time.monotonic()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = _FORMULAS.get(op._overloadpacket)
        if formula is not None:
            tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
            slow = next((t.dtype for t in tensors if t.dtype in self.dtypes), None)
            if slow is not None:
                self._refuse_if_slow(op, slow, flops_of(op, args, kwargs))
        return op(*args, **kwargs)

    def _refuse_if_slow(self, op, dtype: torch.dtype, flops: int) -> None:
        if flops < CHEAP_FLOPS:
            return
        kind = next((k for k in ("convolution", "attention") if k in str(op)), "products")
        rate = self.rate(f"{kind} backward" if "backward" in str(op) else kind, dtype)
        elapsed = time.monotonic() - self.begin
        if elapsed + flops / rate > self.seconds:
            raise TooSlow(refusal(kind, dtype, rate, elapsed + flops / rate))


def refusal(kind: str, dtype: torch.dtype, rate: float, seconds: float) -> str:
    """The reason for a table."""
    return f"not run: {str(dtype)[6:]} {kind} at {rate / 1e9:.2g} GFLOP/s here, would take {seconds:.0f} s or more"


def flops_of(op, args: tuple, kwargs: dict) -> int:
    """FLOPs of a call of a product, from the shapes alone."""

    def on_meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    out = op(*tree_map(on_meta, args), **tree_map(on_meta, kwargs))
    return _FORMULAS[op._overloadpacket](*args, **kwargs, out_val=out)


def _small(kind: str) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor], int]:
    """A product of this kind with its inputs and FLOPs."""
    if kind == "convolution":
        return F.conv2d, [torch.randn(2, 32, 16, 16), torch.randn(32, 32, 3, 3)], 2 * 2 * 14 * 14 * 32 * 32 * 9
    if kind == "attention":
        return F.scaled_dot_product_attention, [torch.randn(1, 2, 128, 64) for _ in range(3)], 4 * 2 * 128 * 128 * 64
    return torch.mm, [torch.randn(128, 128) for _ in range(2)], 2 * 128**3


@lru_cache
def small_rate(kind: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of some milliseconds ("products", "convolution", "attention", or "... backward")."""
    backward = kind.endswith(" backward")
    call, inputs, flops = _small(kind.removesuffix(" backward"))
    inputs = [t.to(dtype).requires_grad_(backward) for t in inputs]
    best = math.inf
    with torch.enable_grad():
        for _ in range(2):
            begin = time.perf_counter()
            out = call(*inputs)
            if backward:
                begin = time.perf_counter()
                torch.autograd.grad(out, inputs, torch.ones_like(out))
            best = min(best, time.perf_counter() - begin)
    return (2 if backward else 1) * flops / best
