# SPDX-License-Identifier: MIT
"""PowerSGD's checkpoints between processes, and what it refuses.

Functions named `rank_*` run in the ranks of a gloo group (`tests/ranks.py`) and return what the test compares.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_parts import assert_same, buffers, given, machines, randn, transformer, values
from torch import nn

from dalle_fast.parallel import (
    PowerSGD,
    all_reduce_codes,
    attach_powersgd,
    shard_blocks,
)


def rank_saves(group):
    """Steps, saves, steps on."""
    shapes = [(24, 40), (40, 24), (30,)]
    backward, parameters, powersgd = given(group, *shapes, rank=4)

    def step(number: int, n: int):
        return backward([randn(31 * number + 7 * i + dist.get_rank() % n, *shape) for i, shape in enumerate(shapes)])

    for number in range(3):
        step(number, 2)
    mean = torch.stack([error.sum() for error in buffers(powersgd, parameters[:2])])
    dist.all_reduce(mean, group=group)
    state = powersgd.state_dict()
    assert state["seed"] == 0
    assert sorted(state["error"]) == ["weights.0", "weights.1"]
    assert_same([[values(e) for e in state["error"].values()], buffers(powersgd, parameters[:2])])
    after = torch.stack([values(e).sum() for e in state["error"].values()])
    torch.testing.assert_close(after, mean / group.size(), rtol=0.02, atol=0.02)
    return {name: e.view(torch.int16).tolist() for name, e in state["error"].items()}, [step(3, 1), step(4, 1)]


def rank_loads(group, error: dict[str, list]):
    shapes = [(24, 40), (40, 24), (30,)]
    backward, _, powersgd = given(group, *shapes, rank=4)
    error = {name: torch.tensor(e, dtype=torch.int16).view(torch.uint16) for name, e in error.items()}
    powersgd.load_state_dict({"seed": 0, "grad_constant": 1.0, "error": error})
    return [backward([randn(31 * n + 7 * i, *shape) for i, shape in enumerate(shapes)]) for n in (3, 4)]


def test_the_sum_of_error_buffers_goes_on_in_any_number_of_ranks(ranks):
    saved = ranks.run(rank_saves, world=2)
    assert saved[0][0] == saved[1][0]
    assert_same([got for _, got in saved] + ranks.run(rank_loads, saved[0][0], world=2))  # the same bits
    for world in (1, 4):
        for got, want in zip(ranks.run(rank_loads, saved[0][0], world=world), [saved[0][1]] * world):
            torch.testing.assert_close(got, want, rtol=0.01, atol=0.02)


def rank_saves_shards(group, folder: str):
    """Two shards save through torch.distributed.checkpoint; one rank's whole parameters load."""
    mesh, machine, shard = machines(group)
    model = transformer()
    shard_blocks(model, model.blocks, mesh)
    powersgd = PowerSGD(model, rank=6, group=machine, shard_group=shard)
    attach_powersgd(model, powersgd)
    model(randn(dist.get_rank(), 6, 16)).square().mean().backward()
    state = powersgd.state_dict()
    dcp.save(state, checkpoint_id=folder)
    whole = {
        name: values(powersgd.entry(p).error) for name, p in model.named_parameters() if powersgd.entry(p).matrices
    }
    loaded = PowerSGD(model, rank=6, group=machine, shard_group=shard)
    again = loaded.state_dict()
    dcp.load(again, checkpoint_id=folder)
    loaded.load_state_dict(again)
    for name, p in model.named_parameters():
        if loaded.entry(p).matrices:
            assert torch.equal(values(loaded.entry(p).error), whole[name])
    alone = PowerSGD(transformer(), rank=6, group=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    again = alone.state_dict()
    dcp.load(again, checkpoint_id=folder)
    alone.load_state_dict(again)
    for name, p in model.named_parameters():  # the part of the whole that this rank saved
        if powersgd.entry(p).matrices:
            dim = p.placements[0].dim
            mine = values(again["error"][name]).chunk(2, dim)[dist.get_rank(shard)]
            assert torch.equal(mine, whole[name])
    return {name: values(error) for name, error in again["error"].items()}


def test_shards_are_saved_as_parameters_are(ranks, tmp_path):
    assert_same([list(r.values()) for r in ranks.run(rank_saves_shards, str(tmp_path), world=4)])


def rank_refuses(group):
    model = nn.Sequential(nn.Linear(8, 8))
    for name, options in (
        ("rank", {"rank": 0}),
        ("clip_norm", {"rank": 2, "clip_norm": 0.0}),
        ("p_constant", {"rank": 2, "p_constant": math.inf}),
        ("mode", {"rank": 2, "mode": "ring"}),
    ):
        with pytest.raises(ValueError, match=name):
            PowerSGD(model, group=group, **options)
    with pytest.raises(ValueError, match="multiple of the 2 shards"):
        PowerSGD(model, rank=3, group=group, shard_group=group)
    with pytest.raises(ValueError, match="module"):
        PowerSGD(model.requires_grad_(False), rank=2, group=group)
    powersgd = PowerSGD(model.requires_grad_(True), rank=2, group=group)
    with pytest.raises(ValueError, match="no parameter of shape"):
        powersgd.entry(nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="fully_shard"):
        attach_powersgd(model, powersgd)
    state = powersgd.state_dict()
    with pytest.raises(ValueError, match="seed"):
        powersgd.load_state_dict({**state, "seed": 1})
    with pytest.raises(ValueError, match="only on one side"):
        powersgd.load_state_dict({**state, "error": {}})
    with pytest.raises(ValueError, match="shape"):
        powersgd.load_state_dict({**state, "error": {"0.weight": torch.zeros(3, 3, dtype=torch.uint16)}})
    with pytest.raises(TypeError, match="uint16"):
        all_reduce_codes(group, [torch.zeros(3)])


def test_errors_name_what_is_wrong(ranks):
    ranks.run(rank_refuses, world=2)
