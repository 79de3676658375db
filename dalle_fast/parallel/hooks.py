# SPDX-License-Identifier: MIT
"""Where PowerSGD meets a model: DDP's communication hook, and FSDP2's all-reduce hook for sharded parameters."""

# No `from __future__ import annotations`: DDP compares the hook's annotations as types.

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .matrices import Entry
from .powersgd import PowerSGD


def powersgd_hook(state: PowerSGD, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: `ddp.register_comm_hook(powersgd, powersgd_hook)`.

    The gradients of all buckets are ready when those of the last one are: clipping needs the global norm. Error buffers
    belong to parameters, so DDP may rebuild its buckets. Every parameter has to take part in each backward.
    """
    if bucket.index() == 0:
        state.reset()
    buffer = bucket.buffer()
    future = torch.futures.Future(devices=[] if state.stream is None else [state.device])
    gradients = [(state.entry(p), grad) for p, grad in zip(bucket.parameters(), bucket.gradients())]
    state.start(gradients, when_done=lambda: future.set_result(buffer))
    if bucket.is_last():
        state.finish()
    return future


def attach_powersgd(model: nn.Module, state: PowerSGD) -> None:
    """Compresses what FSDP2 leaves on each rank of a machine on its way across machines.

    `fully_shard` has been called with the mesh of one machine (one dimension; under its own hybrid sharding gradients
    have already been summed over machines when the hook is called); `state` has the group of ranks that hold the same
    shards on all machines, and the group of this machine's shards. `param.grad` holds the final gradients after
    `backward`. Gradients are not added up: clear them before each backward; to accumulate, use
    `set_requires_gradient_sync(False)`. Not with reentrant checkpointing, which nests backward passes.

    Raises:
        ValueError: no module is sharded, or one on a mesh that has more than one dimension.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ValueError("model: expected modules that fully_shard has wrapped, got none")
    backward = _ShardedBackward(state)
    for module in modules:
        parameters = [p for p in _managed_parameters(module) if p.requires_grad]
        for parameter in parameters:
            if parameter.device_mesh.ndim != 1:
                raise ValueError(f"model: expected a mesh of one dimension, got {parameter.device_mesh}")
        if parameters:
            entries = [state.entry(p) for p in parameters]
            module.set_all_reduce_hook(partial(backward.take, entries), stream=state.stream)


class _ShardedBackward:
    """One backward pass after the other through the hooks of all modules."""

    def __init__(self, state: PowerSGD) -> None:
        self.state = state
        self.taken: list[tuple[list[Entry], list[torch.Tensor]]] = []
        self.task = -1  # autograd's number of the backward pass

    def take(self, entries: list[Entry], reduced: torch.Tensor) -> None:
        """The hook: `reduced` has the shards of a module's gradients one behind the other.

        FSDP makes `param.grad` of it as soon as this returns; `finish` writes the final gradients there.
        """
        if any(entry.parameter.grad is not None for entry in entries):
            raise RuntimeError("PowerSGD: gradients are not added up over backward passes; call zero_grad() before")
        sizes = [_padded_numel(entry.parameter) for entry in entries]
        if sum(sizes) != reduced.numel():
            raise RuntimeError(
                f"PowerSGD: expected {sum(sizes)} gradients of {entries[0].name} and its neighbours, got "
                f"{reduced.numel()}; every parameter has to take part in each backward"
            )
        task = torch._C._current_graph_task_id()
        if task != self.task:  # a new backward pass; one that raised has not come to its end
            self.task, self.taken = task, []
            self.state.reset()
            # behind FSDP's own callback, which was queued when backward began
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        shards = []
        for part, entry in zip(reduced.split(sizes), entries):
            shape = entry.parameter.to_local().shape
            shards.append(part[: math.prod(shape)].view(shape))
        self.taken.append((entries, shards))
        self.state.start(list(zip(entries, shards)))

    def finish(self) -> None:
        taken, self.taken, self.task = self.taken, [], -1
        targets = {}
        for entries, shards in taken:
            for entry, shard in zip(entries, shards):
                grad = entry.parameter.grad
                place = grad.to_local() if isinstance(grad, DTensor) else None
                # another dtype: FSDP has converted the gradient; else this has to be the same memory
                if place is None or (place.dtype == shard.dtype and place.data_ptr() != shard.data_ptr()):
                    raise RuntimeError(f"PowerSGD: FSDP did not put the gradient of {entry.name} where it was expected")
                targets[entry.name] = place
        self.state.finish(targets)


def _managed_parameters(module: FSDPModule) -> list[nn.Parameter]:
    """The parameters of one FSDP module in the order of its flat gradients: children first."""
    found: dict[int, nn.Parameter] = {}
    seen: set[int] = set()

    def visit(at: nn.Module) -> None:
        if at is not module and isinstance(at, FSDPModule):
            return
        seen.add(id(at))
        for child in at.children():
            if id(child) not in seen:
                visit(child)
        for parameter in at.parameters(recurse=False):
            found.setdefault(id(parameter), parameter)

    visit(module)
    return list(found.values())


def _padded_numel(parameter: DTensor) -> int:
    """Numbers of a shard in the flat gradients: the first dimension is filled up to equal parts."""
    (placement,) = parameter.placements
    if not isinstance(placement, Shard) or placement.dim != 0:
        return parameter.to_local().numel()
    rows = -(-parameter.shape[0] // parameter.device_mesh.size())
    return rows * math.prod(parameter.shape[1:])
