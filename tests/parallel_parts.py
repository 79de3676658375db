# SPDX-License-Identifier: MIT
"""Models, gradients and meshes for the tests of dalle_fast.parallel; ranks call these too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dalle_fast.ops import minifloat_decode, minifloat_encode
from dalle_fast.parallel import (
    PowerSGD,
    powersgd_hook,
)

LARGEST = 15.984375
UNIT = 2.0**-10  # half a unit in the last place of 1-6-9


def codes(x: torch.Tensor) -> torch.Tensor:
    return minifloat_encode(x, "1-6-9")


def values(code: torch.Tensor) -> torch.Tensor:
    return minifloat_decode(code, "1-6-9")


class Given(nn.Module):
    """Parameters whose gradients are what forward is given."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, grads: list[torch.Tensor]) -> torch.Tensor:
        return sum((weight * grad).sum() for weight, grad in zip(self.weights, grads))


def given(group, *shapes: tuple[int, ...], rank: int, bucket_cap_mb: float = 25, **options):
    """(backward, parameters, PowerSGD) of a `Given` under DDP."""
    ddp = DistributedDataParallel(Given(*shapes), process_group=group, bucket_cap_mb=bucket_cap_mb)
    powersgd = PowerSGD(ddp, rank=rank, **options)
    ddp.register_comm_hook(powersgd, powersgd_hook)
    parameters = list(ddp.module.weights)

    def backward(grads: list[torch.Tensor]) -> list[torch.Tensor]:
        ddp.zero_grad()
        ddp(grads).backward()
        return [p.grad.clone() for p in parameters]

    return backward, parameters, powersgd


def buffers(powersgd: PowerSGD, parameters) -> list[torch.Tensor]:
    return [values(powersgd.entry(p).error) for p in parameters]


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(results: list) -> None:
    """All ranks returned the same bits."""
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


def layer(width: int) -> nn.Module:
    """The six matrices of a transformer layer, query, key and value in one."""
    return nn.ModuleDict(
        {
            "qkv": nn.Linear(width, 3 * width),
            "out": nn.Linear(width, width),
            "mlp_in": nn.Linear(width, 4 * width),
            "mlp_out": nn.Linear(4 * width, width),
        }
    )


def machines(group):
    """Two machines of two ranks: (their mesh, the ranks with the same shards, this machine's shards)."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("machine", "shard"))
    return mesh["shard"], mesh.get_group("machine"), mesh.get_group("shard")


class Layer(nn.Module):
    """Something of a transformer: an odd head, whose shards are not equal, and sharded and root parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(layer(16) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp_in, self.mlp_out = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(q * k.sigmoid() + v)
        return x + self.mlp_out(self.mlp_in(x).relu())


def transformer() -> Layer:
    model = Layer()
    torch.manual_seed(3)
    model.blocks = nn.ModuleList(Residual() for _ in range(2))
    return model
