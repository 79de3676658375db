# SPDX-License-Identifier: MIT
"""How the ranks of a run share a model and come to one gradient: DDP, `fully_shard`, PowerSGD, or one process alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ..optim.gradient_scale import ResblockGradScaler
from ..optim.shards import local_part
from .hooks import attach_powersgd, powersgd_hook
from .matrices import clean_name
from .powersgd import PowerSGD
from .shard import shard_blocks
from .world import World


def shard_model(world: World, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Leaves a part of every parameter on each rank of a replica; the next block is gathered while one computes.

    Args:
        world: says how many shards; with one nothing is done.
        model: changed in place. Its methods "prefill" and "decode", and "prefill" and "step" of the blocks, gather
            parameters as `forward` does; what forward has gathered of the model itself stays for the loss.
        blocks: gathered and dropped one by one, in their order.
    """
    if world.num_shards == 1:
        return
    shard_blocks(model, blocks, world.mesh["shard"])
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 2])
        block.set_modules_to_backward_prefetch(blocks[max(i - 1, 0) : i])
    for module, names in [(model, ("prefill", "decode")), *((block, ("prefill", "step")) for block in blocks)]:
        for name in names:
            register_fsdp_forward_method(module, name)


class Gradients:
    """Runs backward passes that leave the gradient of the global mean loss in the parameters, the same on all ranks.

    Args:
        world: the ranks.
        model: its parameters; of a sharded model, after `shard_model`.
        loss: called with the arguments of `backward`; returns the mean loss over this rank's samples, and anything.
        scaler: the scales that gradients carry; of a sharded model it shares flags with the other shards.
        powersgd_rank: rank of the factors that gradients cross machines as; 0 sends them whole.
        clip_norm: largest global norm of the gradients; 0 is no clipping.
        seed: of PowerSGD's factors.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        loss: Callable[..., tuple[torch.Tensor, Any]],
        *,
        scaler: ResblockGradScaler | None = None,
        resblocks: Sequence[Sequence[nn.Parameter]] = (),
        powersgd_rank: int = 0,
        clip_norm: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.world, self.model, self.scaler, self.clip_norm = world, model, scaler, clip_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.powersgd: PowerSGD | None = None
        self._loss, self._ddp = loss, None
        names = {id(p): clean_name(name) for name, p in model.named_parameters()}
        self._resblocks = [[names[id(p)] for p in parameters] for parameters in resblocks]
        self._scales: dict[str, float] = {}
        if world.mesh is None:
            return
        sharded = world.num_shards > 1
        if not sharded:
            # 1 x 1 convolutions give gradients that are right in two memory formats
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self._ddp = DistributedDataParallel(
                _Loss(model, loss),
                process_group=world.replicas,
                init_sync=False,  # weights begin equal: they depend on the seed alone
                # all are used; this keeps DDP from a new order of buckets after the first update, and with it of sums,
                # which would make a resumed run another one
                find_unused_parameters=True,
            )
        if powersgd_rank:
            self.powersgd = PowerSGD(
                model,
                rank=powersgd_rank,
                group=world.replicas,
                shard_group=world.shards if sharded else None,
                clip_norm=clip_norm or None,
                seed=seed,
                grad_scale=self._scale_of if scaler is not None else None,
            )
            if sharded:
                attach_powersgd(model, self.powersgd)
            else:
                self._ddp.register_comm_hook(self.powersgd, powersgd_hook)
        elif sharded and world.num_replicas > 1:
            for module in self._sharded_modules():
                module.set_all_reduce_hook(self._average)

    def _average(self, reduced: torch.Tensor) -> None:
        """Over the replicas, of gradients that the shards of this one have averaged."""
        dist.all_reduce(reduced.div_(self.world.num_replicas), group=self.world.replicas)

    def _scale_of(self, name: str) -> float:
        return self._scales.get(name, 1.0)

    def backward(self, *arguments: Any, share: float = 1.0, last: bool = True) -> tuple[torch.Tensor, Any]:
        """One forward and backward pass; gradients add up until the `last`, which brings the ranks together.

        Args:
            arguments: of the loss.
            share: what the loss is multiplied by: 1 / parts of a batch in several parts.
            last: whether the gradients are complete.

        Returns:
            What the loss returned.
        """
        if self.powersgd is not None and self.scaler is not None and last:
            scales = self.scaler.scales.tolist()
            self._scales = {name: s for s, names in zip(scales, self._resblocks, strict=True) for name in names}
        if self._ddp is not None:
            with contextlib.nullcontext() if last else self._ddp.no_sync():
                loss, rest = self._ddp(*arguments)
                (loss * share).backward()
            return loss, rest
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        loss, rest = self._loss(*arguments)
        (loss * share).backward()
        return loss, rest

    def unscale(self) -> None:
        """Removes the scales from the gradients and sets the scaler's flags, the same on all ranks."""
        if self.scaler is None:
            return
        if self.powersgd is None:
            self.scaler.unscale_()
            return
        bad = self.powersgd.nonfinite  # scales were removed on the way into the error buffers
        flags = [float(any(name in bad for name in names)) for names in self._resblocks]
        self.scaler.flags.copy_(torch.tensor(flags))

    def norm(self) -> torch.Tensor:
        """Global norm of the gradients before clipping; not finite where the update has to be skipped."""
        if self.powersgd is not None:
            return torch.tensor(self.powersgd.grad_norm, dtype=torch.float64)
        total = torch.nn.utils.get_total_norm(self._local_gradients())
        if self.world.num_shards > 1:
            square = total.double().square()
            dist.all_reduce(square, group=self.world.shards)
            total = square.sqrt().to(total.dtype)
        return total

    def clip(self, norm: torch.Tensor) -> None:
        """Scales the gradients down to `clip_norm`, given their norm."""
        if not self.clip_norm or self.powersgd is not None:  # PowerSGD has clipped
            return
        grads = self._local_gradients()
        factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].device))

    def _local_gradients(self) -> list[torch.Tensor]:
        return [local_part(p.grad) for p in self.parameters if p.grad is not None]

    def gather(self) -> bool:
        """Whether this rank has all parameters whole until `reshard`: gathers them if all ranks have the memory."""
        modules = self._sharded_modules()
        if not modules:
            return True
        fits = True
        device = local_part(self.parameters[0]).device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            fits = sum(p.numel() * p.element_size() for p in self.parameters) < 0.8 * free
        if not all(self.world.gather(fits)):
            return False
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        return True

    def reshard(self) -> None:
        """Drops what `gather`, or a pass without gradients, has gathered."""
        for module in self._sharded_modules():
            module.set_reshard_after_forward(module is not self.model, recurse=False)
            module.reshard()

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]


class _Loss(nn.Module):
    """The loss as a module's forward pass, which DDP wants."""

    def __init__(self, model: nn.Module, loss: Callable[..., tuple[torch.Tensor, Any]]) -> None:
        super().__init__()
        self.module = model  # a name that is taken out of parameters' names
        self.loss = loss

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, Any]:
        return self.loss(*arguments)
