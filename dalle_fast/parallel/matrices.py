# SPDX-License-Identifier: MIT
"""What PowerSGD keeps of each parameter: which are compressed, error buffers, the fixed Gaussian factor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..ops import minifloat_encode
from ..ops.philox import uniform
from ..optim.shards import local_part

KEEP = ("*embed*", "*position*", "*pad", "*head.weight")
SPLIT = {"*qkv.weight": 3, "*in_proj_weight": 3}


def compression_rate(width: int, rank: int, num_shards: int = 8) -> float:
    """Share of the gradient that is not sent for a transformer layer: 1 - rank (m + 2) / (2 width m) (appendix E).

    Counted in numbers, for four matrices width x width and two of 4 width x width, each split into m = `num_shards`
    parts with factors of rank / m.

    Example:
        >>> f"{compression_rate(3968, 896):.2f}"
        '0.86'
    """
    return 1.0 - rank * (num_shards + 2) / (2 * width * num_shards)


class Sizes(NamedTuple):
    """Numbers held on this rank."""

    compressed: int
    """In gradients that are compressed."""
    factors: int
    """In the factors that stand for them."""
    uncompressed: int
    """In gradients that travel as float32."""


@dataclass
class Matrix:
    """One matrix that is compressed: all of a parameter, or one of several row blocks of it (query, key, value)."""

    error: torch.Tensor
    """[m, n] uint16, m <= n: a view of the parameter's error buffer, transposed where need be."""
    factor: torch.Tensor
    """[n, r] uint16: Gaussian, drawn once."""
    transposed: bool
    rows: tuple[int, int]
    """First and last + 1 of the rows of the parameter, taken as two-dimensional."""

    @property
    def rank(self) -> int:
        return self.factor.shape[1]

    def of(self, grad: torch.Tensor) -> torch.Tensor:
        """This matrix, [m, n], as a view of a gradient [rows, columns] of the parameter."""
        part = grad[slice(*self.rows)]
        return part.mT if self.transposed else part


@dataclass
class Entry:
    """A parameter as PowerSGD sees it; `matrices` is empty where it travels uncompressed."""

    name: str
    parameter: nn.Parameter
    error: torch.Tensor | None = None
    """uint16, shape of the local part of the parameter: 1-6-9 codes."""
    matrices: list[Matrix] = field(default_factory=list)


def sharded_like(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A DTensor of local parts, sharded as a parameter that is one; else `local` itself."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def clean_name(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and checkpointing wrap around it."""
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def normal(seed: int, name: str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Standard normal numbers, float64 [rows, columns]: Box-Muller on Philox under (seed, name)."""
    offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    radius = uniform(seed, offset, rows, columns, device=device).log_().mul_(-2).sqrt_()
    return radius * uniform(seed, offset + 1, rows, columns, device=device).mul_(2 * math.pi).cos_()


def matrix_shapes(
    name: str, shape: Sequence[int], rank: int, keep: Sequence[str] = KEEP, split: Mapping[str, int] = SPLIT
) -> list[tuple[int, int, int]]:
    """(rows, columns, rank) of the matrices that a parameter, or a shard of it, is compressed as, one below the other.

    The rule of the paper: weight matrices, but no embeddings, heads, gains and biases. Nor is a parameter compressed
    whose factors, in 16 bits, would take more bytes than the gradient in 32.
    """
    if len(shape) < 2 or math.prod(shape) == 0 or any(fnmatchcase(name, pattern) for pattern in keep):
        return []
    rows, columns = shape[0], math.prod(shape[1:])
    num_parts = next((parts for pattern, parts in split.items() if fnmatchcase(name, pattern)), 1)
    if rows % num_parts:
        num_parts = 1
    height = rows // num_parts
    rank = min(rank, height, columns)
    if 2 * rank * (height + columns) > 4 * height * columns:
        return []
    return [(height, columns, rank)] * num_parts


def count_sizes(parameters: Iterable[tuple[int, list[tuple[int, int, int]]]]) -> Sizes:
    """Of parameters given by their numbers and the (rows, columns, rank) of their matrices, in any order of the two."""
    compressed = factors = plain = 0
    for numel, matrices in parameters:
        compressed += numel if matrices else 0
        plain += 0 if matrices else numel
        factors += sum((m + n) * rank for m, n, rank in matrices)
    return Sizes(compressed, factors, plain)


def make_entry(
    name: str, parameter: nn.Parameter, rank: int, keep: Sequence[str], split: Mapping[str, int], seed: int, shard: int
) -> Entry:
    """Error buffers and factors for a parameter, or for this rank's shard of it."""
    entry = Entry(name, parameter)
    local = local_part(parameter.detach())
    shapes = matrix_shapes(name, local.shape, rank, keep, split)
    if not shapes:
        return entry
    entry.error = torch.zeros(local.shape, dtype=torch.uint16, device=local.device)
    flat = entry.error.view(local.shape[0], -1)
    for part, (height, columns, rank) in enumerate(shapes):
        span = (part * height, (part + 1) * height)
        error, transposed = flat[slice(*span)], height > columns
        gauss = normal(seed, f"{name}/{part}/{shard}", max(height, columns), rank, local.device)
        factor = minifloat_encode(gauss.float(), "1-6-9")
        entry.matrices.append(Matrix(error.mT if transposed else error, factor, transposed, span))
    return entry
