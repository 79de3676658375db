# SPDX-License-Identifier: MIT
"""What a training step costs on a cluster, before there is one: memory, bytes on the wire, time, and what limits it.

The model lives on the meta device; matrices, shards and bytes are counted by the code that will train, time by an
alpha-beta model: bytes over rate, and a latency a message. Forward and backward hide what is sent meanwhile:

    step = gather_n + max(forward, gathers) + max(backward, gathers + scatters, backward / n + exchanges)
         + scatter_n + exchange_n + update

for n blocks: nothing is sent before the first is through, and nothing is left to hide the last, embeddings and heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import ConfigError
from .estimate import forward_flops
from .models import DALLE
from .ops.linear_cross_entropy.op import default_chunk_rows
from .parallel.cluster import Cluster
from .parallel.matrices import KEEP, SPLIT, Sizes, clean_name, count_sizes, matrix_shapes
from .parallel.powersgd import LARGE
from .parallel.shard import shard_placement
from .parallel.wire import chosen_mode, ring_bytes, wire_bytes
from .train import DALLETrainConfig

PAPER_RANKS = {1920: 512, 2688: 640, 3968: 896}
"""Total rank by width (paper, table 1): the smallest that left no gap in the training loss."""
Block = Mapping[str, tuple[int, ...]]
"""Shapes of the gradients that travel together, by parameter name."""


# ---- what is sent


class Load(NamedTuple):
    """What one GPU sends, and how many messages come one after the other."""

    bytes: float
    messages: int

    def plus(self, other: Load) -> Load:
        return Load(self.bytes + other.bytes, self.messages + other.messages)

    def seconds(self, rate: float, latency: float) -> float:
        return self.bytes / rate + self.messages * latency


NOTHING = Load(0, 0)


def total(loads: Sequence[Load]) -> Load:
    return Load(sum(load.bytes for load in loads), sum(load.messages for load in loads))


def ring_load(count: int, ranks: int, itemsize: int) -> Load:
    """An average of numbers over all ranks."""
    return Load(ring_bytes(count, ranks, itemsize), 2 * (ranks - 1) if count else 0)


def code_load(count: int, ranks: int, mode: str = "auto") -> Load:
    """An average of 1-6-9 codes."""
    if count == 0:
        return NOTHING
    at_once = 0 if chosen_mode(mode, count, ranks) == "gather" else 1  # the scatter's messages leave together
    return Load(wire_bytes(count, ranks, mode), ranks - 1 + at_once) if ranks > 1 else NOTHING


def plain_loads(blocks: Sequence[Block], ranks: int, itemsize: int) -> list[Load]:
    """Of each block without compression: a ring's all-reduce."""
    return [ring_load(sum(map(math.prod, block.values())), ranks, itemsize) for block in blocks]


def powersgd_loads(
    blocks: Sequence[Block],
    rank: int,
    ranks: int,
    *,
    keep: Sequence[str] = KEEP,
    split: Mapping[str, int] = SPLIT,
    mode: str = "auto",
) -> list[Load]:
    """Of each block under `PowerSGD` with factors of `rank`; all small gradients and the flags leave with the last."""
    loads, grouped = [], 0
    for block in blocks:
        p = r = large = 0
        for name, shape in block.items():
            matrices, numel = matrix_shapes(name, shape, rank, keep, split), math.prod(shape)
            p += sum(min(m, n) * k for m, n, k in matrices)
            r += sum(max(m, n) * k for m, n, k in matrices)
            grouped += 4 * len(matrices)
            if not matrices:
                large += numel if numel >= LARGE else 0
                grouped += numel if numel < LARGE else 0
        loads.append(code_load(p, ranks, mode).plus(code_load(r, ranks, mode)).plus(ring_load(large, ranks, 4)))
    loads[-1] = loads[-1].plus(ring_load(grouped, ranks, 4))
    return loads


def step_seconds(
    forward: float,
    backward: float,
    update: float,
    exchange: Sequence[float],
    gather: Sequence[float] = (0.0,),
    scatter: Sequence[float] = (0.0,),
) -> float:
    """The formula above. Sequences are of blocks as backward reaches them."""
    inside = sum(gather[:-1])
    hidden = max(backward, inside + sum(scatter[:-1]), backward / len(exchange) + sum(exchange[:-1]))
    return gather[-1] + max(forward, inside) + hidden + scatter[-1] + exchange[-1] + update


# ---- the model


def shard_shapes(model: DALLE, num_shards: int) -> list[Block]:
    """What the first of `num_shards` GPUs holds under `shard_blocks`: blocks from last to first, then the rest."""
    place = shard_placement(model, num_shards)

    def local(parameter: torch.nn.Parameter) -> tuple[int, ...]:
        shape, dim = list(parameter.shape), place(parameter).dim
        shape[dim] = -(-shape[dim] // num_shards)
        return tuple(shape)

    groups: dict[str, dict[str, tuple[int, ...]]] = {f"blocks.{i}": {} for i in reversed(range(len(model.blocks)))}
    rest: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        name = clean_name(name)
        groups.get(".".join(name.split(".")[:2]), rest)[name] = local(parameter)
    return [*groups.values(), rest]


def kept_bytes(model: DALLE, half: bool) -> int:
    """What autograd keeps of one sample in one block of the model, without the weights."""
    block = model.blocks[0]
    weights = {id(p) for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in weights:
            kept[id(base)] = base.numel() * base.itemsize
            alive.append(base)  # so that no other tensor takes its id
        return tensor

    alive: list[torch.Tensor] = []
    before = block.gradient_scales, block.checkpointing
    block.gradient_scales, block.checkpointing = torch.empty(2, device="meta") if half else None, False
    tokens = model.config.text_len + model.config.image_len
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(torch.empty(1, tokens, model.config.width, device="meta", requires_grad=True))
    finally:
        block.gradient_scales, block.checkpointing = before
    return sum(kept.values())


# ---- the plan


@dataclass(frozen=True)
class Method:
    """A way to average gradients over machines."""

    name: str
    gpu_bytes: float
    """Sent by each GPU in a step, across machines."""
    machine_bytes: float
    exchange_seconds: float
    """Of the link, if nothing else happened."""
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found; bytes and seconds are of one GPU and step unless they say otherwise."""

    cluster: Cluster
    parameters: int
    rank: int
    batch: int
    sizes: Sizes
    flops: float
    """Forward and backward of this GPU's samples, recomputing and PowerSGD's products included."""
    memory: dict[str, float]
    seconds: dict[str, float]
    """forward, backward and update on the GPU; gather and scatter within the machine."""
    intra_bytes: float
    methods: tuple[Method, ...]
    limit: str

    @property
    def saved(self) -> float:
        """Share of the compressed gradients' numbers that is not sent."""
        return 1 - self.sizes.factors / self.sizes.compressed if self.sizes.compressed else 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**dataclasses.asdict(self), "sizes": self.sizes._asdict(), "saved": self.saved}

    def __str__(self) -> str:
        c, rows = self.cluster, []
        rows.append(
            f"{self.parameters:,} parameters on {c.machines} machines of {c.gpus_per_node} GPUs, "
            f"{self.batch} samples a step, PowerSGD rank {self.rank} ({self.rank // c.gpus_per_node} a shard)"
        )
        rows.append(f"\nmemory of a GPU, of {c.memory / 1e9:.0f} GB")
        rows += [f"  {name:34}{size / 1e9:9.2f} GB" for name, size in self.memory.items() if size]
        rows.append(f"  {'all':34}{sum(self.memory.values()) / 1e9:9.2f} GB")
        rows.append("\na step of a GPU")
        rows.append(f"  {'computes':34}{self.flops / 1e12:9.1f} TFLOP")
        rows.append(f"  {'sends within its machine':34}{self.intra_bytes / 1e9:9.2f} GB")
        rows += [f"  {name:34}{seconds:9.3f} s" for name, seconds in self.seconds.items() if seconds]
        rows.append(
            f"\n{'across machines':24}{'GB a GPU':>10}{'GB a machine':>14}{'s of the link':>15}{'s a step':>10}"
        )
        rows += [
            f"  {m.name:22}{m.gpu_bytes / 1e9:10.2f}{m.machine_bytes / 1e9:14.2f}"
            f"{m.exchange_seconds:15.2f}{m.step_seconds:10.2f}"
            for m in self.methods
        ]
        rows.append(f"\nPowerSGD leaves out {self.saved:.0%} of the numbers in compressed gradients")
        rows.append(f"limit: {self.limit}")
        return "\n".join(rows)


def plan(config: DALLETrainConfig, cluster: Cluster, *, rank: int | None = None, batch: int | None = None) -> Plan:
    """Predicts memory, traffic and time of training a transformer on a cluster (paper sections 2.4, 2.5, appendix E).

    Parameters are sharded within a machine and replicated across machines, as `shard_blocks` and `attach_powersgd` do.
    Blocks are gathered, and their gradients scattered, in 16 bits where `loop.precision` has 16.

    Args:
        config: the run; `loop.batch_size` are the samples of a step on all GPUs.
        cluster: machines and rates.
        rank: of PowerSGD, in total; None: the paper's for its widths, else a quarter of the width.
        batch: in place of `loop.batch_size`.

    Raises:
        ConfigError: a rank or batch that does not divide, or a number out of range.
    """
    num_shards, machines = cluster.gpus_per_node, cluster.machines
    batch = config.loop.batch_size if batch is None else batch
    if batch < 1 or batch % cluster.gpus:
        raise ConfigError(f"batch: expected a multiple of the {cluster.gpus} GPUs, got {batch}")
    width = config.model.width
    if rank is None:
        rank = PAPER_RANKS.get(width, max(1, width // 4))
        rank = -(-rank // num_shards) * num_shards
    if rank < 1 or rank % num_shards:
        raise ConfigError(f"rank: expected a positive multiple of the {num_shards} GPUs of a machine, got {rank}")
    with torch.device("meta"):
        model = DALLE(config.model)
    half = config.loop.precision != "fp32"
    itemsize, samples = (2 if half else 4), batch // cluster.gpus
    local, whole = shard_shapes(model, num_shards), shard_shapes(model, 1)
    matrices = [
        (math.prod(shape), matrix_shapes(name, shape, rank // num_shards))
        for block in local
        for name, shape in block.items()
    ]
    sizes = count_sizes(matrices)
    memory = _memory(config, model, matrices, sizes, whole, num_shards, samples, half)

    # time on the GPU
    each = [m for _, found in matrices for m in found]
    products = sum(2.0 * m * n * k for m, n, k in each)
    bases = sum(4.0 * min(m, n) * k * k for m, n, k in each)
    forward = forward_flops(model) * samples
    backward = forward * (3 if config.loop.checkpointing else 2)
    state = sum(memory[name] for name in ("weights", "gradients", "moments", "averages"))
    plain_gpu = {
        "forward": forward / cluster.compute,
        "backward, factors": backward / cluster.compute,
        "update": 2 * state / cluster.bandwidth,  # all of it read and written
    }
    on_gpu = {
        "forward": plain_gpu["forward"],
        "backward, factors": plain_gpu["backward, factors"] + (2 * products + bases) / cluster.compute,
        "update": plain_gpu["update"] + products / cluster.compute + 2 * memory["error buffers"] / cluster.bandwidth,
    }

    # on the wire
    inside = [
        Load((num_shards - 1) / num_shards * itemsize * sum(map(math.prod, block.values())), num_shards - 1)
        for block in whole
    ]
    gather = [load.seconds(cluster.intra, cluster.latency) for load in inside]
    loads = {
        "fp32 ring": plain_loads(local, machines, 4),
        "fp16 ring": plain_loads(local, machines, 2),
        "PowerSGD": powersgd_loads(local, rank // num_shards, machines),
    }
    methods, exchanges = [], {}
    for name, blocks in loads.items():
        seconds = [load.seconds(cluster.link / num_shards, cluster.latency) for load in blocks]
        gpu, sent = (on_gpu if name == "PowerSGD" else plain_gpu), total(blocks).bytes
        step = step_seconds(*gpu.values(), seconds, gather, gather)
        methods.append(Method(name, sent, sent * num_shards, sum(seconds), step))
        exchanges[name] = seconds
    seconds = {**on_gpu, "gather, twice": 2 * sum(gather), "scatter": sum(gather)}
    return Plan(
        cluster=cluster,
        parameters=sum(p.numel() for p in model.parameters()),
        rank=rank,
        batch=batch,
        sizes=sizes,
        flops=forward + backward + 3 * products + bases,
        memory=memory,
        seconds=seconds,
        intra_bytes=3 * total(inside).bytes,
        methods=tuple(methods),
        limit=_memory_limit(cluster, config, memory)
        + _time_limit(cluster, on_gpu, gather, total(loads["PowerSGD"]), sum(exchanges["PowerSGD"])),
    )


def _memory(
    config: DALLETrainConfig,
    model: DALLE,
    matrices: list[tuple[int, list[tuple[int, int, int]]]],
    sizes: Sizes,
    whole: list[Block],
    num_shards: int,
    samples: int,
    half: bool,
) -> dict[str, float]:
    """Bytes of one GPU by what they are for."""
    model_config, itemsize = config.model, 2 if half else 4
    count = sizes.compressed + sizes.uncompressed
    gathered = max(sum(map(math.prod, block.values())) for block in whole[:-1])
    rest = sum(map(math.prod, whole[-1].values()))
    kept, layers = kept_bytes(model, half), model_config.num_layers
    tokens = model_config.text_len + model_config.image_len
    identity = 2 * layers * tokens * model_config.width * 4  # the inputs of all resblocks, float32
    codes = (
        (model_config.text_len, model_config.text_vocab_size),
        (model_config.image_len, model_config.image_vocab_size),
    )
    sharded = num_shards > 1
    return {
        "weights": 4.0 * count,
        "gradients": 4.0 * count,
        "moments": (4.0 if config.optimizer == "adamw16" else 8.0) * count,
        "averages": 4.0 * count if config.loop.ema_decay else 0.0,
        "error buffers": 2.0 * sizes.compressed,
        "fixed factors": sum(2.0 * max(m, n) * k for _, found in matrices for m, n, k in found),
        "two blocks, gathered": 2.0 * itemsize * gathered * sharded,
        "embeddings and heads, gathered": float(itemsize * rest * sharded),
        "a block's gradients, to scatter": float(itemsize * gathered * sharded),
        "activations": float(samples * (identity + 2 * kept if config.loop.checkpointing else layers * kept)),
        "logits": max(4.0 * default_chunk_rows(samples * rows, vocab) * vocab for rows, vocab in codes),
    }


def _memory_limit(cluster: Cluster, config: DALLETrainConfig, memory: dict[str, float]) -> str:
    """Empty where a GPU holds it all."""
    needed = sum(memory.values())
    if needed <= cluster.memory:
        return ""
    options = {
        "loop.ema_decay 0": memory["averages"] > 0,
        "optimizer adamw16": config.optimizer != "adamw16",
        "loop.checkpointing": not config.loop.checkpointing,
        "more GPUs a machine": True,
    }
    return (
        f"memory, {needed / 1e9:.1f} GB for a GPU of {cluster.memory / 1e9:.0f}; "
        f"{', '.join(name for name, helps in options.items() if helps)} would lift it. With memory enough: "
    )


def _time_limit(cluster: Cluster, on_gpu: dict[str, float], gather: list[float], sent: Load, exchange: float) -> str:
    """What is longest in a step with PowerSGD, and what would lift it."""
    forward, backward, _ = on_gpu.values()
    compute, inside, between = "compute", "the links within a machine", "the link between machines"
    parts = {compute: forward + backward, inside: 3 * sum(gather), between: exchange}
    longest = max(parts, key=parts.__getitem__)
    spare = backward - sent.messages * cluster.latency
    if spare > 0:
        hides = f"{sent.bytes * cluster.gpus_per_node * 8e-9 / spare:.3g} Gbit/s hide PowerSGD behind backward"
    else:
        hides = "the latency of its messages alone is longer than backward: fewer machines help, a faster link does not"
    cure = {
        compute: f"faster or more GPUs; {hides}",
        inside: "faster links within a machine, more samples a GPU",
        between: f"a faster link, a lower rank, more samples a GPU; {hides}",
    }
    shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    return f"{longest} ({shown}). What would lift it: {cure[longest]}"
