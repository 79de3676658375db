# SPDX-License-Identifier: MIT
"""Finds the rooms and calls them in the many ways the generic tests need."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import dalle_fast.ops
from dalle_fast.ops._cases import Arguments, Case, Room

OPS_FOLDER = Path(dalle_fast.ops.__file__).parent


def all_rooms() -> list[Room]:
    """Every ROOM of dalle_fast/ops/<room>/cases.py, by name."""
    folders = sorted(path.parent.name for path in OPS_FOLDER.glob("*/cases.py"))
    return [importlib.import_module(f"dalle_fast.ops.{name}.cases").ROOM for name in folders]


def build(room: Room, case: Case, dtype: torch.dtype) -> Arguments:
    """The arguments of a case: the same at every call and in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{room.name}/{case.name}".encode()))
    return case.build(generator, dtype)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], arguments: Arguments) -> Arguments:
    """Applies `function` to every tensor; keeps requires_grad."""

    def apply(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return function(value.detach()).requires_grad_(value.requires_grad)

    return tree_map(apply, arguments)


def to_float64(arguments: Arguments) -> Arguments:
    """Copies with every floating tensor in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t.clone(), arguments)


def fresh(arguments: Arguments) -> Arguments:
    """Copies that share no memory with `arguments`, same strides not kept."""
    return map_tensors(lambda t: t.clone(), arguments)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def call(function: Callable[..., Any], arguments: Arguments, **extra: Any) -> list[torch.Tensor]:
    """Results of the call, then the arguments after it (an op may change them), as flat lists of tensors."""
    args, kwargs = arguments
    with torch.no_grad():
        result = function(*args, **kwargs, **extra)
    return tensors_of(result) + tensors_of(arguments)


def gradients(function: Callable[..., Any], arguments: Arguments, **extra: Any) -> list[torch.Tensor]:
    """Gradients with respect to every tensor that requires one, for a fixed non-uniform upstream gradient."""
    args, kwargs = arguments
    outputs = [t for t in tensors_of(function(*args, **kwargs, **extra)) if t.requires_grad]
    inputs = [t for t in tensors_of(arguments) if t.requires_grad]
    upstream = [upstream_gradient(t) for t in outputs]
    return list(torch.autograd.grad(outputs, inputs, upstream))


def upstream_gradient(output: torch.Tensor) -> torch.Tensor:
    """Values that every dtype here holds exactly, so that references see the same gradient."""
    ramp = torch.arange(output.numel(), dtype=torch.float64) % 7 - 3
    return (ramp / 4).reshape(output.shape).to(output.dtype).to(output.device)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: tuple[float, float]) -> None:
    """Close in value; integers and booleans exactly equal; shapes equal."""
    assert actual.shape == expected.shape
    actual, expected = actual.cpu(), expected.cpu()
    if actual.is_floating_point():
        rtol, atol = tolerance
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
    else:
        assert torch.equal(actual, expected)


def strided_variants() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Equal tensors in other layouts: what users' views look like."""

    def padded(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 0:
            return t.clone()
        storage = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
        storage[..., : t.shape[-1]] = t
        return storage[..., : t.shape[-1]]

    def transposed(t: torch.Tensor) -> torch.Tensor:
        if t.dim() < 2:
            return t.clone()
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def reversed_dims(t: torch.Tensor) -> torch.Tensor:
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)

    def every_second(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 0:
            return t.clone()
        storage = t.new_zeros(*t.shape[:-1], t.shape[-1] * 2)
        storage[..., ::2] = t
        return storage[..., ::2]

    def misaligned(t: torch.Tensor) -> torch.Tensor:
        storage = t.new_zeros(t.numel() + 1)
        view = storage[1:].view(t.shape)
        view.copy_(t)
        return view

    return {
        "padded": padded,
        "transposed": transposed,
        "reversed": reversed_dims,
        "every_second": every_second,
        "misaligned": misaligned,
    }


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


class RecordOps(TorchDispatchMode):
    """Collects the calls of registered ops, with copies of their arguments as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "dalle_fast":
            self.calls.append((op, *map_tensors(_leaf, (args, kwargs))))
        return op(*args, **kwargs)
