# SPDX-License-Identifier: MIT
"""One line of a benchmark table, and those that follow from the rooms' `cases.py` alone."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from .. import ops
from ..ops._cases import Arguments, Case, Room

Call = Callable[[], object]


@dataclass
class Row:
    """One line of the table, its tensors made."""

    name: str
    ours: Call
    error: Callable[[], float]
    """||ours - float64|| / ||float64|| on all or a part of the result."""
    bound: float
    """What `error` may be."""
    bytes: int
    """Each input read once, each output written once."""
    flops: int = 0
    """Of the matrix products, exact pairs only."""
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)
    """name -> makes the callable to time, so that a peer which is missing or fails is reported by its reason."""
    graph: bool = False
    """Whether users would replay it from a CUDA graph."""
    flop_dtype: torch.dtype = torch.bfloat16
    """What the products are taken in."""


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; where both are NaN or the same Inf there is no error."""
    actual, expected = (t.detach().to(torch.int32 if t.dtype == torch.uint16 else t.dtype) for t in (actual, expected))
    actual, expected = actual.double(), expected.double()
    same = (actual.isnan() & expected.isnan()) | (actual.isinf() & (actual == expected))
    difference = torch.linalg.vector_norm((actual - expected).masked_fill(same, 0.0))
    scale = torch.linalg.vector_norm(expected.masked_fill(same, 0.0))
    return float(difference / scale) if float(scale) else float(difference)


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _map(function: Callable[[torch.Tensor], torch.Tensor], arguments: Arguments) -> Arguments:
    def apply(value):
        if not isinstance(value, torch.Tensor):
            return value
        return function(value.detach()).requires_grad_(value.requires_grad)

    return tree_map(apply, arguments)


@lru_cache(maxsize=4)
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An upstream gradient that no symmetry takes to zero, as one of ones would be for a softmax."""
    count = shape.numel()
    return (torch.arange(count, device=device) % 7 - 3).div(4).to(dtype).view(shape)


def _run(function: Callable[..., Any], arguments: Arguments, backward: bool) -> list[torch.Tensor]:
    """Results of the call, or gradients."""
    args, kwargs = arguments
    if not backward:
        with torch.no_grad():
            return _tensors(function(*args, **kwargs))
    outputs = [t for t in _tensors(function(*args, **kwargs)) if t.requires_grad]
    inputs = [t for t in _tensors(arguments) if t.requires_grad]
    return list(torch.autograd.grad(outputs, inputs, [_upstream(t.shape, t.dtype, t.device) for t in outputs]))


def _call(function: Callable[..., Any], arguments: Arguments, backward: bool) -> Call:
    """What is timed: the call and its gradients. A peer's note about how it was tuned goes along."""

    def run() -> list[torch.Tensor]:
        return _run(function, arguments, backward)

    run.note = getattr(function, "note", "")
    return run


def room_row(room: Room, case: Case, dtype: torch.dtype, backward: bool) -> Row:
    """A benchmark case of a room, forward or forward and backward."""
    arguments = case.build(torch.Generator().manual_seed(0), dtype)
    tolerance = (room.grad_tolerance if backward else {}).get(dtype, room.tolerance[dtype])

    def error() -> float:
        exact = _map(lambda t: t.double() if t.is_floating_point() else t.clone(), arguments)
        expected = _run(room.reference, exact, backward)
        actual = _run(room.function, _map(torch.clone, arguments), backward)
        return max(relative(a, e) for a, e in zip(actual, expected, strict=True))

    inputs = _tensors(arguments)
    with torch.no_grad():
        outputs = _tensors(room.function(*(copied := _map(torch.clone, arguments))[0], **copied[1]))
    moved = case.elements * dtype.itemsize or size_of(*inputs, *outputs)
    flops = case.flops
    if backward:  # once more with the upstream gradient, and the gradients
        moved += size_of(*inputs, *outputs, *outputs, *(t for t in inputs if t.requires_grad))
        flops += 2 * flops if case.backward_flops is None else case.backward_flops
    return Row(
        f"{room.name} {case.name} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}",
        _call(room.function, arguments, backward),
        error,
        room.benchmark_bound or 2 * max(tolerance),  # of small cases; sums are longer here
        moved,
        flops,
        {
            **{n: lambda peer=peer: _call(peer, arguments, backward) for n, peer in (case.peers or room.peers).items()},
            **{
                n: lambda make=make: _call(make(arguments, backward), arguments, backward)
                for n, make in room.prepared_peers.items()
            },
        },
        flop_dtype=dtype,
    )


def quick_peers(row: Row) -> dict[str, Call]:
    """The peers that need no compiler, made."""
    return {name: make() for name, make in row.peers.items() if "compiled" not in name}


def all_rooms() -> list[Room]:
    """Every ROOM of the ops, by name."""
    folders = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)
    return [importlib.import_module(f"{ops.__name__}.{name}.cases").ROOM for name in folders]


def room_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of every benchmark case of every room; a row's tensors exist from when it is made."""
    for room in all_rooms():
        for case in room.benchmarks:
            for dtype in case.dtypes:
                if dtype == torch.float16:  # torch has no fast float16 on CPU to compare with
                    continue
                for backward in (False, True) if room.differentiable and case.differentiable else (False,):
                    mode = "forward+backward" if backward else "forward"
                    name = f"{room.name} {case.name} {str(dtype)[6:]} {mode}"
                    yield name, lambda r=room, c=case, d=dtype, b=backward: room_row(r, c, d, b)
