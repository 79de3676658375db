# SPDX-License-Identifier: MIT
"""Memory of large results on CPU, kept for the next ones of the same size: what torch's allocator does on CUDA.

malloc gives large blocks back to the system when they are freed, and a fresh one costs a page fault for each 4 KiB: for
the gradient of a large vocabulary that is more than the product which fills it. Training asks for the same sizes again
at every step. So results of this library of 1 MiB or more lie in storages that are kept when their tensors are gone.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence

import torch

_LEAST = 1 << 20  # bytes; below, malloc keeps them
_use_count = getattr(torch._C, "_storage_Use_Count", None)

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_kept: dict[int, deque[torch.UntypedStorage]] = {}  # by bytes; sizes, and storages of a size, last used last


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it lies in the memory of the CPU: no subclass, such as FakeTensor or DTensor."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu


def _default_limit() -> int:
    try:
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16, 1 << 31)
    except (AttributeError, OSError, ValueError):
        return 1 << 28


_limit = _default_limit()


def set_limit(num_bytes: int) -> None:
    """Keeps at most this many bytes, those of tensors that are alive included; 0 keeps none. At first 1/16 of the RAM.

    Raises:
        ValueError: it is negative.
    """
    global _limit
    if num_bytes < 0:
        raise ValueError(f"num_bytes: expected at least 0, got {num_bytes}")
    with _lock:
        _limit = num_bytes
        _make_room(0)


def kept() -> int:
    """Bytes that no tensor uses and that wait for the next one."""
    with _lock:
        return sum(size for size, storages in _kept.items() for i in range(len(storages)) if _is_free(storages, i))


def release() -> None:
    """Gives all bytes that no tensor uses back to the system."""
    with _lock:
        for size, storages in list(_kept.items()):
            _drop(size, [i for i in range(len(storages)) if _is_free(storages, i)])


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """like.new_empty(shape, dtype=dtype), contiguous; a large one on CPU lies in memory that is there already."""
    dtype = like.dtype if dtype is None else dtype
    if _use_count is None or torch.compiler.is_compiling() or not is_plain(like):
        return like.new_empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST or size > _limit:
        return like.new_empty(shape, dtype=dtype)
    with _lock:
        storages = _kept.get(size, ())
        i = next((i for i in range(len(storages)) if _is_free(storages, i)), None)
        if i is None:
            _make_room(size)
            storage = torch.UntypedStorage(size)
        else:
            storage = storages[i]
            del storages[i]
        storages = _kept.pop(size, deque())
        storages.append(storage)
        _kept[size] = storages
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, tuple(shape), strides)


def _is_free(storages: deque[torch.UntypedStorage], i: int) -> bool:
    """Neither a tensor, in Python or inside torch, nor anything else but this module holds the storage."""
    return sys.getrefcount(storages[i]) == 2 and _use_count(storages[i]._cdata) == 1


def _make_room(size: int) -> None:
    """Forgets storages, free ones and those used longest ago first, until `size` more bytes are within the limit.

    A storage in use that is forgotten is freed with its tensors.
    """
    held = size + sum(bytes_ * len(storages) for bytes_, storages in _kept.items())
    for only_free in (True, False):
        for bytes_ in list(_kept):
            storages = _kept[bytes_]
            chosen = []
            for i in range(len(storages)):
                if held > _limit and (not only_free or _is_free(storages, i)):
                    chosen.append(i)
                    held -= bytes_
            _drop(bytes_, chosen)


def _drop(size: int, indices: list[int]) -> None:
    for i in reversed(indices):
        del _kept[size][i]
    if not _kept[size]:
        del _kept[size]
