# SPDX-License-Identifier: MIT
"""How parameters are split over the ranks of a machine (paper section 2.5, appendix E)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from .matrices import clean_name

INPUT_SHARDED = ("*mlp_out.weight",)


def shard_placement(
    model: nn.Module, num_shards: int, input_sharded: Sequence[str] = INPUT_SHARDED
) -> Callable[[nn.Parameter], Shard]:
    """The paper's `shard_placement_fn` for `fully_shard`: outputs are split, the second MLP matrix by its inputs.

    Of a matrix [in, out] that is axis 1, of the second MLP matrix axis 0; nn.Linear keeps the transpose, [out, in].
    Parameters that do not come out even are split by their first dimension.
    """
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}

    def place(parameter: nn.Parameter) -> Shard:
        by_input = any(fnmatchcase(names[id(parameter)], pattern) for pattern in input_sharded)
        return Shard(1 if by_input and parameter.dim() > 1 and parameter.shape[1] % num_shards == 0 else 0)

    return place


def shard_blocks(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    input_sharded: Sequence[str] = INPUT_SHARDED,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """`fully_shard` on each block, then on what is left of the model, over the ranks of one machine.

    Args:
        model: changed in place.
        blocks: modules whose parameters are gathered and discarded together; the resblocks.
        mesh: the ranks of this machine, one dimension.
        input_sharded: patterns of weights that are split by their inputs.
        precision: of parameters and gradients in compute and reduction.

    Raises:
        ValueError: a mesh of several dimensions.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, the ranks of a machine, got {mesh.ndim}")
    place = shard_placement(model, mesh.size(), input_sharded)
    policy = precision or MixedPrecisionPolicy()
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, shard_placement_fn=place, mp_policy=policy)
