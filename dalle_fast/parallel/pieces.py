# SPDX-License-Identifier: MIT
"""Tensors of which each rank holds a part, in one ordinary safetensors file: written and read by all ranks at once.

The file is the same at any number of ranks, so a run goes on with another number, and any reader of safetensors reads
it. Every rank writes its part into its place; nobody holds the whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, Shard

from ..errors import CheckpointError
from ..files import open_regular, parse_json
from ..optim.shards import local_part
from .matrices import sharded_like
from .world import World

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_HEADER = 100_000_000
"""Bytes, as the library safetensors has it."""
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
_NUMPY = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class Piece(NamedTuple):
    """What this rank has of a tensor."""

    shape: torch.Size
    """Of the whole."""
    index: tuple[slice, ...]
    """Where in the whole."""
    data: torch.Tensor
    """Contiguous, on CPU, a copy."""


def index_of(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Where in the whole the local part of a DTensor lies; everything for other tensors."""
    index = [slice(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        (placement,) = tensor.placements
        if isinstance(placement, Shard):
            size, num_ranks = tensor.shape[placement.dim], tensor.device_mesh.size()
            part = -(-size // num_ranks)
            begin = min(tensor.device_mesh.get_local_rank() * part, size)
            index[placement.dim] = slice(begin, min(begin + part, size))
    return tuple(index)


def take_piece(tensor: torch.Tensor) -> Piece:
    """A copy that later updates do not touch."""
    local = local_part(tensor.detach())
    copy = torch.empty(local.shape, dtype=local.dtype, device="cpu").copy_(local)
    return Piece(tensor.shape, index_of(tensor), copy)


# ---- writing


def reserve(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Writes the header and reserves the bytes, so that a full disk is met here; by one rank.

    Raises:
        OSError: it does not fit.
    """
    header, end = {}, 0
    for name, piece in sorted(pieces.items(), key=lambda item: (-item[1].data.itemsize, item[0])):  # stay aligned
        begin, end = end, end + piece.shape.numel() * piece.data.itemsize
        dtype = _DTYPES[piece.data.dtype]
        header[name] = {"dtype": dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, max(file.tell() + end, 1))
        os.fsync(file.fileno())


def _read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Entries, and where the numbers begin."""
    with open_regular(path) as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        return parse_json(file.read(length)), 8 + length


def fill(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Writes this rank's pieces into a reserved file, until they are on the disk."""
    header, start = _read_header(path)
    for name, piece in pieces.items():
        if not piece.data.numel():
            continue
        kind = _NUMPY[piece.data.itemsize]
        place = np.memmap(
            path, kind, "r+", offset=start + header[name]["data_offsets"][0], shape=tuple(piece.shape) or (1,)
        )
        numbers = piece.data.reshape(-1).view(torch.uint8).numpy().view(kind)
        place[piece.index] = numbers.reshape(piece.data.shape or (1,))
        place.flush()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---- reading


class Contents(NamedTuple):
    """What a file holds of a tensor."""

    dtype: torch.dtype
    shape: torch.Size


def contents(world: World, path: Path) -> dict[str, Contents]:
    """The tensors of a safetensors file, read by the first rank.

    Raises:
        CheckpointError: it is missing or not safetensors.
    """

    def read() -> dict[str, Contents]:
        try:
            entries, _ = _read_header(path)
            entries.pop("__metadata__", None)
            return {name: Contents(_TORCH[e["dtype"]], torch.Size(e["shape"])) for name, e in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({type(error).__name__}: {' '.join(str(error).split())[:500]})"
            ) from error

    return world.first(read)


def read_parts(
    world: World, path: Path, wanted: Iterable[tuple[str, Contents, tuple[slice, ...]]]
) -> dict[str, torch.Tensor]:
    """The part at `index` of each tensor, on CPU: read by the first replica, copied to the others.

    Raises:
        CheckpointError: the file cannot be read.
    """
    wanted = list(wanted)
    parts: dict[str, torch.Tensor] = {}

    def read() -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name, _, index in wanted:
                    part = file.get_slice(name)[index] if index else file.get_tensor(name)
                    parts[name] = part.contiguous()
        except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({' '.join(str(error).split())[:500]})"
            ) from error

    world.each(read if world.replica == 0 else lambda: None)
    for name, (dtype, _), index in wanted:
        if world.replica:
            parts[name] = torch.empty([part.stop - part.start for part in index], dtype=dtype)
        world.spread(parts[name])
    return parts


def read_into(world: World, path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Fills tensors, or this rank's parts of them, from a file.

    Raises:
        CheckpointError: names or shapes differ.
    """
    found = contents(world, path)
    if found.keys() != targets.keys():
        odd = sorted(found.keys() ^ targets.keys())
        raise CheckpointError(f"{path}: does not fit the model ({odd[0]} is only on one side)")
    for name, target in targets.items():
        if found[name].shape != target.shape:
            raise CheckpointError(
                f"{path}: does not fit the model ({name}: expected {list(target.shape)}, got {list(found[name].shape)})"
            )
        if found[name].dtype.is_floating_point != target.dtype.is_floating_point:
            raise CheckpointError(
                f"{path}: does not fit the model ({name}: expected {target.dtype}, got {found[name].dtype})"
            )
    parts = read_parts(world, path, ((name, found[name], index_of(target)) for name, target in targets.items()))
    with torch.no_grad():
        for name, target in targets.items():
            local_part(target.detach()).copy_(parts[name])


def read_like(world: World, path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of a file; those in `like` of the same shape in parts and with its memory layout.

    Raises:
        CheckpointError: the file cannot be read.
    """
    found = contents(world, path)
    wanted = []
    for name, entry in found.items():
        model = like.get(name)
        fits = model is not None and model.shape == entry.shape
        whole = tuple(slice(0, size) for size in entry.shape)
        wanted.append((name, entry, index_of(model) if fits else whole))
    parts = read_parts(world, path, wanted)
    for name, part in parts.items():
        model = like.get(name)
        if model is not None and model.shape == found[name].shape:
            local = local_part(model.detach())  # files hold contiguous tensors, and other strides round differently
            laid_out = torch.empty_like(local, dtype=part.dtype).copy_(part)
            parts[name] = sharded_like(laid_out, model)
    return parts
