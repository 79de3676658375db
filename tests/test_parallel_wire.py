# SPDX-License-Identifier: MIT
"""Averages of codes between processes, and the bytes that travel.

Functions named `rank_*` run in the ranks of a gloo group (`tests/ranks.py`) and return what the test compares.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from parallel_parts import LARGEST, UNIT, assert_same, codes, layer, randn, values
from torch.nn.parallel import DistributedDataParallel

from dalle_fast.parallel import (
    PowerSGD,
    Traffic,
    all_reduce_codes,
    compression_rate,
    powersgd_hook,
    wire_bytes,
)


def wire_parts(rank: int) -> list[torch.Tensor]:
    return [codes(randn(rank, 101)), codes(randn(10 + rank, 7, 9).mT), codes(torch.full((1,), 2.0))]


def rank_wire(group, mode: str):
    parts, traffic = wire_parts(dist.get_rank(group)), Traffic()
    all_reduce_codes(group, parts, mode, traffic=traffic)
    for got, *everyones in zip(parts, *(wire_parts(rank) for rank in range(group.size()))):
        mean = torch.stack([values(x) for x in everyones]).double().mean(0)
        torch.testing.assert_close(values(got), mean.float(), rtol=UNIT, atol=1e-6)
    odd = [codes(torch.tensor([math.inf, -math.inf, math.nan, 1.0]))]
    all_reduce_codes(group, odd, mode)
    if group.size() > 1:
        assert values(odd[0])[:2].tolist() == [LARGEST, -LARGEST]
    assert values(odd[0])[2].isnan()
    all_reduce_codes(group, [codes(torch.zeros(0))], mode)
    return [values(part) for part in parts], traffic


@pytest.mark.parametrize("mode", ["gather", "scatter", "auto"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_codes_are_averaged_to_the_same_bits_and_bytes_are_counted(ranks, world, mode):
    results = ranks.run(rank_wire, mode, world=world)
    assert_same([parts for parts, _ in results])
    for _, traffic in results:
        assert traffic.bytes_sent == wire_bytes(101 + 63 + 1, world, mode)


def test_bytes_of_an_exchange():
    assert wire_bytes(1000, 1) == 0
    assert wire_bytes(1000, 2) == 2000
    assert wire_bytes(1000, 8, "gather") == 14000
    assert wire_bytes(1000, 8, "scatter") == 2 * 7 * 2 * 125  # 2 (n - 1) / n of 2000 bytes
    assert wire_bytes(1001, 8, "scatter") == 2 * 7 * 2 * 126
    assert wire_bytes(1 << 20, 4) == wire_bytes(1 << 20, 4, "scatter")
    with pytest.raises(ValueError, match="mode"):
        wire_bytes(1000, 2, "ring")


@pytest.mark.parametrize(("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_rates_of_the_paper(width, rank, percent):
    assert math.floor(100 * compression_rate(width, rank) + 0.5) == percent
    assert compression_rate(width, rank) == pytest.approx(1 - 5 * rank / (8 * width))


def rank_bytes(group, mode: str):
    width, rank = 32, 8
    model = layer(width)
    ddp = DistributedDataParallel(model, process_group=group)
    powersgd = PowerSGD(ddp, rank=rank, mode=mode)
    matrices, numbers = 12 * width * width, rank * 18 * width
    assert powersgd.sizes == (matrices, numbers, 9 * width)
    assert compression_rate(width, rank, 1) == pytest.approx(1 - numbers / matrices)
    ddp.register_comm_hook(powersgd, powersgd_hook)
    model.forward = lambda x: sum(m(x if m.in_features == width else x.repeat(1, 4)).sum() for m in model.values())
    for _ in range(2):
        powersgd.traffic = Traffic()
        ddp.zero_grad()
        ddp(torch.ones(2, width)).backward()
    n = group.size()
    factors = 6 * width * rank, 12 * width * rank  # P has the short side of each matrix, R the long one
    codes_sent = sum(wire_bytes(count, n, mode) for count in factors)
    floats = 2 * (n - 1) * 4 * (9 * width + 4 * 6) // n  # biases, and four flags a matrix
    assert powersgd.traffic.bytes_sent == codes_sent + floats
    assert powersgd.traffic.collectives == (3 if mode == "gather" else 5)


@pytest.mark.parametrize("mode", ["gather", "scatter"])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_on_the_wire(ranks, world, mode):
    ranks.run(rank_bytes, mode, world=world)
