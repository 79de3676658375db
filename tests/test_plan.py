# SPDX-License-Identifier: MIT
"""The plan of a run on a cluster: the paper's figures, bytes as counted when sent, and what is refused."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dalle_fast.cli import main
from dalle_fast.errors import ConfigError
from dalle_fast.models import DALLE, DALLEConfig
from dalle_fast.parallel import PowerSGD, attach_powersgd, compression_rate, powersgd_hook, shard_blocks
from dalle_fast.parallel.cluster import cluster_of, parse_rate
from dalle_fast.plan import (
    PAPER_RANKS,
    kept_bytes,
    plan,
    powersgd_loads,
    shard_shapes,
    step_seconds,
    total,
)
from dalle_fast.presets import preset
from dalle_fast.train import DALLETrainConfig, LoopConfig


@pytest.fixture(scope="module")
def paper():
    return plan(preset("dalle", "paper-12b"), cluster_of(1024, "25Gbit"))


def small(**options) -> DALLETrainConfig:
    return DALLETrainConfig(model=tiny.DALLE, loop=LoopConfig(batch_size=16, **options))


# ---- the paper


@pytest.mark.parametrize(("size", "width", "rank", "rate"), [("2.8b", 1920, 512, 0.83), ("5.6b", 2688, 640, 0.85),
                                                            ("12b", 3968, 896, 0.86)])  # fmt: skip
def test_ranks_and_compression_of_table_1(size, width, rank, rate):
    found = plan(preset("dalle", f"paper-{size}"), cluster_of(1024, "25Gbit"))
    assert PAPER_RANKS[width] == found.rank == rank
    assert found.saved == pytest.approx(compression_rate(width, rank), abs=1e-12)
    assert round(found.saved, 2) == rate
    assert found.sizes.compressed * 8 == 64 * 12 * width**2


def test_the_12_billion_parameters_and_their_memory(paper):
    assert paper.parameters == 12_292_840_960
    weights = 64 * 12 * 3968**2
    assert round(weights / 1e9, 2) == 12.09
    assert 2 * weights > 16e9  # section 2.5: in 16 bits they exceed one GPU
    memory = paper.memory
    assert memory["weights"] == pytest.approx(4 * paper.parameters / 8, rel=1e-4)
    assert memory["moments"] == memory["weights"]  # 16 bits each
    assert memory["error buffers"] == 2 * weights / 8
    assert memory["two blocks, gathered"] == pytest.approx(2 * 2 * 12 * 3968**2, rel=1e-3)
    identity = 128 * 1280 * 3968 * 4
    assert identity < memory["activations"] < 1.2 * identity
    # as the paper kept them (16-bit weights, gradients in the error buffers, averages on the host) they fit 16 GB
    assert memory["weights"] / 2 + memory["moments"] + memory["error buffers"] + memory["activations"] < 16e9


def test_the_papers_step(paper):
    forward = 2 * 12.09e9 * 1280  # a sample a GPU
    assert 4 * forward < paper.flops < 1.15 * 4 * forward
    by_name = {m.name: m for m in paper.methods}
    assert by_name["fp16 ring"].gpu_bytes == pytest.approx(2 * 127 / 128 * 2 * paper.parameters / 8, rel=1e-3)
    assert by_name["fp32 ring"].gpu_bytes == pytest.approx(2 * by_name["fp16 ring"].gpu_bytes, rel=1e-6)
    assert by_name["PowerSGD"].machine_bytes == 8 * by_name["PowerSGD"].gpu_bytes
    codes = 2 * 127 / 128 * 2 * 12 * 3968**2 * 64 / 8 * (1 - compression_rate(3968, 896))
    embeddings = 2 * 127 / 128 * 4 * paper.sizes.uncompressed
    assert by_name["PowerSGD"].gpu_bytes == pytest.approx(codes + embeddings, rel=1e-3)
    assert by_name["PowerSGD"].step_seconds < by_name["fp16 ring"].step_seconds / 4
    assert paper.intra_bytes == pytest.approx(3 * 7 / 8 * 2 * paper.parameters, rel=1e-6)
    assert "memory, 32.5 GB for a GPU of 16" in paper.limit


def test_what_autograd_keeps_of_a_block():
    """Float32: the inputs of both norms, the outputs of norms, projections and GELU; in 16 bits half of the latter."""
    with torch.device("meta"):
        model = DALLE(DALLEConfig(width=128, num_layers=2, num_heads=2, grid=(8, 8)))
    numbers = (256 + 64) * 128
    assert 64 * numbers < kept_bytes(model, half=False) < 66 * numbers
    assert 36 * numbers < kept_bytes(model, half=True) < 38 * numbers


# ---- the wire: what the plan predicts is what is sent


class Loss(nn.Module):
    """A step of the tiny transformer on tokens that do not matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dalle = DALLE(tiny.DALLE)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dalle.loss(ids[:, :10], ids[:, 10:]).loss


IDS = torch.arange(74).remainder(16).expand(2, -1)


def rank_sends(group, mode: str):
    ddp = DistributedDataParallel(Loss(), process_group=group)
    powersgd = PowerSGD(ddp, rank=8, mode=mode)
    ddp.register_comm_hook(powersgd, powersgd_hook)
    ddp(IDS).backward()
    return powersgd.traffic.bytes_sent, powersgd.sizes


@pytest.mark.parametrize(("world", "mode"), [(2, "gather"), (3, "scatter"), (4, "auto")])
def test_predicted_bytes_are_the_bytes_sent(ranks, world, mode):
    with torch.device("meta"):
        blocks = shard_shapes(DALLE(tiny.DALLE), 1)
    bucket = {name: shape for block in blocks for name, shape in block.items()}  # DDP takes them all at once
    expected = total(powersgd_loads([bucket], 8, world, mode=mode)).bytes
    for sent, sizes in ranks.run(rank_sends, mode, world=world):
        assert sent == expected
        assert sizes == plan(small(), cluster_of(world, "1Gbit", gpus_per_node=1), rank=8, batch=world * 2).sizes


def rank_sends_shards(group):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("machine", "shard"))
    model = Loss()
    shard_blocks(model, model.dalle.blocks, mesh["shard"])
    powersgd = PowerSGD(model, rank=8, group=mesh.get_group("machine"), shard_group=mesh.get_group("shard"))
    attach_powersgd(model, powersgd)
    model(IDS).backward()
    return powersgd.traffic.bytes_sent, powersgd.sizes


def test_predicted_bytes_of_shards_are_the_bytes_sent(ranks):
    found = plan(small(), cluster_of(4, "1Gbit", gpus_per_node=2), rank=8)
    ((sent, sizes), *_) = ranks.run(rank_sends_shards, world=4)
    assert sent == {m.name: m for m in found.methods}["PowerSGD"].gpu_bytes
    assert sizes == found.sizes


# ---- time


def test_a_step_is_as_long_as_its_longest_part_and_what_nothing_hides():
    assert step_seconds(1.0, 2.0, 0.5, [0.0, 0.0]) == 3.5
    assert step_seconds(1.0, 2.0, 0.5, [0.5, 0.25]) == 3.75  # backward hides all but the last
    assert step_seconds(1.0, 2.0, 0.5, [3.0, 0.25]) == 5.75  # after the first of two blocks
    assert step_seconds(1.0, 2.0, 0.5, [3.0]) == 6.5
    assert (
        step_seconds(1.0, 2.0, 0.5, [0.0], gather=[0.5, 1.5, 0.1], scatter=[0.5, 0.5, 0.2]) == 0.1 + 2 + 3 + 0.2 + 0.5
    )


def test_more_of_anything_never_costs_time():
    def seconds(**changes) -> list[float]:
        flags = {"gpus": 64, "link": "25Gbit", **changes}
        return [m.step_seconds for m in plan(small(), cluster_of(**flags), batch=64).methods]

    base = seconds()
    for changes in ({"link": "100Gbit"}, {"compute": 500.0}, {"intra": "900GB/s"}, {"latency": 1.0}):
        assert all(new <= old for new, old in zip(seconds(**changes), base, strict=True))


def test_one_machine_sends_nothing_to_others():
    found = plan(small(), cluster_of(8, "1Gbit"))
    assert all(m.gpu_bytes == m.exchange_seconds == 0 for m in found.methods)
    assert found.intra_bytes > 0
    alone = plan(small(), cluster_of(1, "1Gbit"))
    assert alone.intra_bytes == 0
    assert alone.memory["two blocks, gathered"] == 0


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ({"link": "1Gbit"}, "the link between machines"),
        ({"link": "400Gbit"}, "compute"),
        ({"link": "400Gbit", "intra": "1GB/s"}, "the links within a machine"),
    ],
)
def test_it_says_what_limits(flags, limit):
    found = plan(preset("dalle", "paper-2.8b"), cluster_of(256, **flags))
    assert found.limit.startswith(limit)
    assert limit in str(found)


def test_the_link_that_is_said_to_be_enough_is():
    config = preset("dalle", "paper-12b")
    slow = plan(config, cluster_of(128, "1Gbit"))
    enough = slow.limit.split("; ")[-1].split(" Gbit/s hide")[0]
    fast = plan(config, cluster_of(128, f"{float(enough) * 1.01:.4f}Gbit"))
    exchange = {m.name: m for m in fast.methods}["PowerSGD"].exchange_seconds
    assert 0.95 * fast.seconds["backward, factors"] < exchange < fast.seconds["backward, factors"]


# ---- the command line


@pytest.mark.parametrize(
    ("text", "rate"),
    [("25Gbit", 25e9 / 8), ("400Gbit/s", 50e9), ("50Mbit", 6.25e6), ("1.5Gbps", 1.5e9 / 8), ("150GB/s", 150e9)],
)
def test_rates_as_people_write_them(text, rate):
    assert parse_rate("link", text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "25", "fast", "-1Gbit", "0Gbit", "25 Gbit extra", "25Gb", "1e400Gbit"])
def test_rates_that_are_none(text):
    with pytest.raises(ConfigError, match=r"link: expected a rate such as 25Gbit.*, got "):
        parse_rate("link", text)


def test_the_command(capsys):
    main(["plan", "--preset", "paper-12b", "--gpus", "1024", "--link", "25Gbit"])
    out = capsys.readouterr().out
    for part in ("12,292,840,960 parameters", "rank 896 (112 a shard)", "86%", "fp16 ring", "limit: "):
        assert part in out
    main(
        [
            "plan",
            "--preset",
            "emoji",
            "--gpus",
            "2",
            "--gpus-per-node",
            "1",
            "--link",
            "50Mbit",
            "--rank",
            "64",
            "--json",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["link"] == 6.25e6
    assert found["rank"] == 64
    assert found["methods"][2]["name"] == "PowerSGD"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", "1000", "--link", "25Gbit", "--gpus-per-node", "16"), "gpus: expected a multiple of the 16"),
        (("--gpus", "0", "--link", "25Gbit"), "gpus: expected at least 1, got 0"),
        (("--gpus", "64", "--link", "25"), "link: expected a rate such as 25Gbit"),
        (("--gpus", "64", "--link", "25Gbit", "--intra", "much"), "intra: expected a rate"),
        (("--gpus", "64", "--link", "25Gbit", "--rank", "100"), "rank: expected a positive multiple of the 8 GPUs"),
        (("--gpus", "64", "--link", "25Gbit", "--batch", "100"), "batch: expected a multiple of the 64 GPUs, got 100"),
        (("--gpus", "64", "--link", "25Gbit", "--gpu", "tpu"), "gpu: expected one of v100-16gb"),
        (("--gpus", "64", "--link", "25Gbit", "--compute", "0"), "compute: expected a positive number, got 0"),
        (("--gpus", "64", "--link", "25Gbit", "--latency", "-1"), "latency: expected 0 or more"),
        (("--gpus", "64", "--link", "25Gbit", "--preset", "paper-1b"), "preset: dalle has"),
    ],
)
def test_flags_that_cannot_be(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
