# SPDX-License-Identifier: MIT
"""Averages of 1-6-9 codes over a process group; NCCL and gloo have no sum of that format (paper appendix E).

Codes travel as bytes, sums are float32 in the order of the ranks, and each number is summed by one rank or by all in
that same order: every rank ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..ops import minifloat_decode, minifloat_encode

LARGEST = 15.984375
_GATHER_BYTES = 1 << 14  # up to this many bytes a rank, one collective beats fewer bytes in two
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.14


@dataclass
class Traffic:
    """What this rank has sent; counted, not estimated, for codes, and a ring's share for sums of float32."""

    bytes_sent: int = 0
    collectives: int = 0

    def add(self, bytes_sent: int) -> None:
        self.bytes_sent += bytes_sent
        self.collectives += 1


def wire_bytes(count: int, num_ranks: int, mode: str = "auto") -> int:
    """Bytes that a rank sends to average `count` codes with `all_reduce_codes`."""
    if num_ranks == 1 or count == 0:
        return 0
    if chosen_mode(mode, count, num_ranks) == "gather":
        return (num_ranks - 1) * 2 * count
    return 2 * (num_ranks - 1) * 2 * -(-count // num_ranks)


def ring_bytes(count: int, num_ranks: int, itemsize: int = 4) -> int:
    """Bytes that a rank sends to average `count` numbers around a ring, as NCCL and gloo do."""
    return 2 * (num_ranks - 1) * itemsize * count // num_ranks


def chosen_mode(mode: str, count: int, num_ranks: int) -> str:
    """How `all_reduce_codes` averages: "gather" or "scatter"."""
    if mode not in ("auto", "gather", "scatter"):
        raise ValueError(f"mode: expected 'auto', 'gather' or 'scatter', got {mode!r}")
    if mode != "auto":
        return mode
    return "gather" if num_ranks == 2 or 2 * count <= _GATHER_BYTES else "scatter"


def all_reduce_codes(
    group: dist.ProcessGroup,
    buffers: Sequence[torch.Tensor],
    mode: str = "auto",
    *,
    traffic: Traffic | None = None,
) -> None:
    """Replaces 1-6-9 codes by their average over the ranks of a group, all buffers in one exchange.

    Args:
        group: the ranks; all call with buffers of the same sizes.
        buffers: uint16 tensors, changed in place: infinities become the largest number with their sign, NaN stays.
            With one rank nothing changes.
        mode: "gather" sends all codes to all ranks: (n - 1) x 2 bytes a code, one collective. "scatter" sends each
            rank its share, averages there and gathers the averages: 2 (n - 1) / n x 2 bytes, as an optimal all-reduce.
            "auto" takes the former for two ranks or few codes.
        traffic: counts the bytes sent.

    Raises:
        TypeError: a buffer is not uint16.
        ValueError: unknown `mode`.
    """
    for buffer in buffers:
        if buffer.dtype != torch.uint16:
            raise TypeError(f"buffers: expected uint16 codes, got {buffer.dtype}")
    if not buffers:
        return
    exchange = averaging(group, flatten_codes(buffers), mode, traffic or Traffic())
    averaged = drive(exchange)
    for buffer, part in zip(buffers, averaged.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part.view(buffer.shape))


def averaging(
    group: dist.ProcessGroup, codes: torch.Tensor, mode: str, traffic: Traffic
) -> Generator[None, None, torch.Tensor]:
    """The exchange behind `all_reduce_codes` on one flat tensor; yields while a collective is under way."""
    num_ranks, count = group.size(), codes.numel()
    if num_ranks == 1 or count == 0:
        return codes
    if chosen_mode(mode, count, num_ranks) == "gather":
        everyones = codes.new_empty(num_ranks, count)
        yield from _all_gather(group, everyones, codes, traffic)
        return _average(everyones)
    share = -(-count // num_ranks)
    parts = codes.new_zeros(num_ranks * share)
    parts[:count] = codes
    mine = torch.empty_like(parts)
    work = dist.all_to_all_single(_bytes(mine), _bytes(parts), group=group, async_op=True)
    traffic.add((num_ranks - 1) * 2 * share)
    yield
    work.wait()
    average = _average(mine.view(num_ranks, share))
    yield from _all_gather(group, parts, average, traffic)
    return parts[:count]


def drive(exchange: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """Runs an exchange to its end, waiting for each collective."""
    while True:
        try:
            next(exchange)
        except StopIteration as end:
            return end.value


def flatten_codes(buffers: Sequence[torch.Tensor]) -> torch.Tensor:
    """All codes in one dimension; a copy unless there is one contiguous buffer."""
    if len(buffers) == 1:
        return buffers[0].reshape(-1)
    return torch.cat([buffer.reshape(-1).view(torch.int16) for buffer in buffers]).view(torch.uint16)


def _all_gather(
    group: dist.ProcessGroup, everyones: torch.Tensor, mine: torch.Tensor, traffic: Traffic
) -> Generator[None, None, None]:
    work = _all_gather_flat(_bytes(everyones), _bytes(mine), group=group, async_op=True)
    traffic.add((group.size() - 1) * 2 * mine.numel())
    yield
    work.wait()


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(-1).view(torch.uint8)


def _average(codes: torch.Tensor) -> torch.Tensor:
    """[n, count] -> [count]; summed in the order of the ranks."""
    total = minifloat_decode(codes[0], "1-6-9")
    for row in codes[1:]:
        total += minifloat_decode(row, "1-6-9")
    return minifloat_encode(total.div_(len(codes)).clamp_(-LARGEST, LARGEST), "1-6-9")
