# SPDX-License-Identifier: MIT
"""What a room tells the generic tests and benchmarks about itself (`cases.py` of each room exports `ROOM`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One call of the public function."""

    name: str
    """Short and unique within the room; appears in test ids."""
    build: Callable[[torch.Generator, torch.dtype], Arguments]
    """(generator, dtype) -> (args, kwargs) on CPU. Floating tensors that take a gradient have requires_grad=True."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Dtypes to run it in."""
    flops: int = 0
    """Of a benchmark: FLOPs of the forward pass's matrix products, pairs that attend only."""
    backward_flops: int | None = None
    """The same of the backward pass; None: twice those of the forward pass."""
    elements: int = 0
    """Of a benchmark: elements that a forward pass has to read or write; 0: all of its arguments and results."""
    differentiable: bool = True
    """Of a benchmark: whether the backward pass is timed too, in a room that has one."""
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Of a benchmark: peers in place of the room's."""


@dataclass(frozen=True)
class Room:
    """An op, seen from outside."""

    name: str
    """The one word used in csrc, ops, tests and benchmarks."""
    function: Callable[..., Any]
    """The public function; takes `backend=`."""
    reference: Callable[..., Any]
    """Plain torch twin: same arguments without `backend`; computes in the dtype it is given, float64 included."""
    cases: tuple[Case, ...]
    """Calls that every back end must get right."""
    tolerance: dict[torch.dtype, tuple[float, float]]
    """dtype -> (rtol, atol) against the float64 reference on the same (rounded) inputs. Say why in a comment."""
    grad_tolerance: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    """The same for gradients; empty: as `tolerance`."""
    differentiable: bool = True
    """Whether the public function has gradients."""
    benchmarks: tuple[Case, ...] = ()
    """Calls to time, at the sizes people use."""
    benchmark_bound: float = 0.0
    """What ||ours - float64|| / ||float64|| of a benchmark may be; 0: twice the larger number of the tolerance."""
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """name -> function of the same arguments: what users would call otherwise, called its best way."""
    prepared_peers: dict[str, Callable[[Arguments, bool], Callable[..., Any]]] = field(default_factory=dict)
    """name -> (arguments, backward) -> a peer that was compiled, tuned or given its own state outside of what is timed;
    it raises where that cannot be. The peer's attribute `note`, if any, is reported."""
    curves: dict[str, dict[int, Case]] = field(default_factory=dict)
    """What grows -> its value -> the call to time."""


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, requires_grad: bool = True) -> torch.Tensor:
    """A normal tensor, drawn in float32 and rounded to `dtype`."""
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(requires_grad)
