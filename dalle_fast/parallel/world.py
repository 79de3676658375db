# SPDX-License-Identifier: MIT
"""The processes of a run: who they are, which hold the same parameters, and how they agree (paper section 2.5).

`torchrun` starts the ranks of a machine one behind the other. Ranks i * m .. i * m + m - 1 are replica i: each holds
1/m of every parameter. The n-th ranks of all replicas hold the same part; their gradients are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import ConfigError, UserError

T = TypeVar("T")
_PATIENCE = timedelta(minutes=60)  # while the first rank evaluates, samples or hashes, the others wait


class World:
    """One process by itself. `World.join` finds the others."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.num_shards = 1
        """Ranks of a replica."""
        self.num_replicas = 1
        self.mesh: DeviceMesh | None = None
        """Of the dimensions "replica" and "shard"; None: no process group."""
        self.saving: dist.ProcessGroup | None = None
        """All ranks, on gloo, for the threads that write checkpoints."""
        self._started = False  # the process group

    @staticmethod
    def join(device: str, num_shards: int = 1, *, alone: bool = False) -> World:
        """The ranks that `torchrun` has started, by its environment; one process without it.

        Args:
            device: "cpu" or "cuda"; of cuda each rank of a machine takes the device of its local number.
            num_shards: ranks that share one copy of the parameters, within a machine.
            alone: a process group even for one process.

        Raises:
            ConfigError: the ranks of a machine do not divide into replicas of `num_shards`.
        """
        world = World()
        world.size = int(os.environ.get("WORLD_SIZE", "1"))
        world.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
        if num_shards < 1 or local % num_shards or world.size % num_shards:
            raise ConfigError(
                f"loop.shard: expected a divisor of the {local} ranks of a machine (torchrun --nproc-per-node), "
                f"got {num_shards}"
            )
        if world.size == 1 and not alone:
            return world
        if device == "cuda":
            torch.cuda.set_device(world.local_rank)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            store = None if world.size > 1 else dist.HashStore()
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
            world._started = True
        world.num_shards, world.num_replicas = num_shards, world.size // num_shards
        world.mesh = init_device_mesh(device, (world.num_replicas, num_shards), mesh_dim_names=("replica", "shard"))
        world.saving = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return world

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_first(self) -> bool:
        """Whether this rank owns the run's folder, its log and the terminal."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which copy of the parameters this rank has a part of."""
        return self.rank // self.num_shards

    @property
    def shard(self) -> int:
        """Which part."""
        return self.rank % self.num_shards

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same parameters as this one."""
        return None if self.mesh is None else self.mesh.get_group("replica")

    @property
    def shards(self) -> dist.ProcessGroup | None:
        """The ranks of this replica."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    def rows(self, batch_size: int, accumulate: int) -> range:
        """The samples of a batch that this rank computes.

        Raises:
            ConfigError: the batch does not come out even.
        """
        if batch_size % (self.size * accumulate):
            raise ConfigError(
                f"loop.batch_size: expected a multiple of {self.size} ranks x {accumulate} parts (loop.accumulate), "
                f"got {batch_size}"
            )
        count = batch_size // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    # ---- agreement

    def first(self, function: Callable[[], T]) -> T:
        """Calls `function` in the first rank; all return what it returned, or raise the UserError that it raised."""
        if self.size == 1:
            return function()
        answer: list = [None]
        if self.is_first:
            answer = [_outcome(function)]
        dist.broadcast_object_list(answer, src=0)
        return _unfold(answer[0])

    def each(self, function: Callable[[], T]) -> T:
        """Calls `function` in every rank; the UserError that it raised in any is raised in all."""
        if self.size == 1:
            return function()
        mine = _outcome(function)
        errors: list = [None] * self.size
        dist.all_gather_object(errors, mine[1])
        for rank, error in enumerate(errors):
            if error is not None:
                raise type(error)(f"rank {rank}: {error}")
        return mine[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        values: list = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a contiguous tensor from the first replica to the others, in place, any dtype."""
        if self.num_replicas > 1 and tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), group_src=0, group=self.replicas)
        return tensor

    def leave(self) -> None:
        """Ends the process group that `join` has started."""
        if self._started:
            dist.destroy_process_group()
            self._started = False

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] of each rank -> [size * n, ...], with its gradient: what all ranks' losses say about `x`."""
        return x if self.size == 1 else _GatherRows.apply(x, self)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        parts = [torch.empty_like(x) for _ in range(world.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, g):
        world = ctx.world
        return world.sum(g.contiguous()).chunk(world.size)[world.rank], None


def _outcome(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error


def _unfold(outcome: Sequence) -> T:
    value, error = outcome
    if error is not None:
        raise error
    return value
