# SPDX-License-Identifier: MIT
"""Dion: orthonormalised momentum beside AdamW16."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny import dalle_config

from dalle_fast.errors import ConfigError
from dalle_fast.models.store import serialize, write_atomic
from dalle_fast.optim import AdamW16, Dion
from dalle_fast.optim.dion_reference import dion_reference
from dalle_fast.parallel.world import World
from dalle_fast.train import DALLETrainConfig, LoopConfig
from dalle_fast.train.checkpoint import pack_optimizer, unpack_optimizer

SHAPES = [(40, 24), (24, 40), (16, 16), (12, 6, 3, 3)]


def parameters(seed=0):
    torch.manual_seed(seed)
    found = [torch.nn.Parameter(torch.randn(shape) / 5) for shape in SHAPES]
    found[3].data = found[3].data.contiguous(memory_format=torch.channels_last)
    return found


def give_gradients(params, step):
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))


def matrix(t):
    return t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_follows_the_reference(rank, backend):
    params = parameters()
    optimizer = Dion(params, lr=0.05, rank=rank, weight_decay=0.1, backend=backend)
    twins = None
    for step in range(4):
        give_gradients(params, step)
        grads = [matrix(p.grad).double() for p in params]
        if twins is None:
            weights = [matrix(p.detach()).double().clone() for p in params]
            optimizer.step()
            # the first basis is the optimizer's own choice: orthonormal, and the same for equal shapes
            bases = [optimizer._first_basis(matrix(p), rank, "reference").double() for p in params]
            twins = [(w, torch.zeros_like(w), v) for w, v in zip(weights, bases, strict=True)]
        else:
            optimizer.step()
        twins = [
            dion_reference(w, g, m, v, lr=0.05, weight_decay=0.1) for (w, m, v), g in zip(twins, grads, strict=True)
        ]
    for p, (w, m, v) in zip(params, twins, strict=True):
        torch.testing.assert_close(matrix(p.detach()).double(), w, atol=2e-5, rtol=0)
        torch.testing.assert_close(matrix(optimizer.state[p]["momentum"]).double(), m, atol=1e-4, rtol=0)
        torch.testing.assert_close(optimizer.state[p]["basis"].double(), v, atol=1e-4, rtol=0)


def test_all_directions_of_an_update_of_full_rank_are_as_long():
    w = torch.nn.Parameter(torch.zeros(32, 20))
    optimizer = Dion([w], lr=1.0, rank=20, weight_decay=0.0)
    torch.manual_seed(1)
    # singular values over two decades: plain momentum would move the last one a hundredth as far
    u, v = (torch.linalg.qr(torch.randn(n, 20)).Q for n in (32, 20))
    gradient = u @ torch.diag(torch.logspace(0, -2, 20)) @ v.t()
    for _ in range(40):  # power iteration finds the directions
        before = w.detach().clone()
        w.grad = gradient.clone()
        optimizer.step()
    lengths = torch.linalg.svdvals((w.detach() - before).double()) / (0.2 * 32**0.5)
    assert float(lengths.min()) > 0.9
    assert float(lengths.max()) < 1.1
    assert float((w.detach() - before).square().mean().sqrt()) == pytest.approx(0.2, rel=0.05)


def test_what_an_update_leaves_out_comes_later():
    """Rank 1 of a gradient with two directions: error feedback takes the second one in its turn."""
    w = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Dion([w], lr=0.01, rank=1, weight_decay=0.0)
    for _ in range(200):
        w.grad = torch.zeros(8, 8)
        w.grad[0, 0], w.grad[1, 1] = 1.0, 0.5
        optimizer.step()
    moved = -w.detach().diagonal()
    assert float(moved[:2].min()) > 0.1
    assert float(moved[2:].abs().max()) == 0


def test_size_of_the_gradient_does_not_matter():
    moved = []
    for scale in (1.0, 2.0**-60, 2.0**40):  # a power of two: the same roundings
        (w, *_) = parameters()
        optimizer = Dion([w], lr=0.05, rank=8)
        for step in range(3):
            give_gradients([w], step)
            w.grad *= scale
            optimizer.step()
        moved.append(w.detach())
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], atol=1e-5, rtol=0)
    a, b = (parameters()[0] for _ in range(2))
    for p, factor in ((a, 1.0), (b, 1024.0)):
        give_gradients([p], 0)
        p.grad *= factor
        Dion([p], lr=0.05, rank=8).step(grad_scale=factor)
    assert torch.equal(a, b)


def test_a_gradient_of_zeros_moves_nothing_and_kills_nothing():
    w = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = Dion([w], lr=0.1, rank=3, weight_decay=0.0)
    w.grad = torch.zeros(6, 4)
    optimizer.step()
    assert torch.equal(w, torch.ones(6, 4))
    w.grad = torch.randn(6, 4)
    optimizer.step()
    assert torch.linalg.matrix_rank((w.detach() - 1).double(), atol=1e-5) == 3


def test_directions_that_rounding_made_are_not_blown_up():
    w = torch.nn.Parameter(torch.zeros(16, 12))
    optimizer = Dion([w], lr=1.0, rank=6, weight_decay=0.0)
    torch.manual_seed(3)
    a, b = torch.randn(16, 1), torch.randn(1, 12)  # rank 1, and five directions too many
    for _ in range(3):
        before = w.detach().clone()
        w.grad = a @ b
        optimizer.step()
    values = torch.linalg.svdvals((w.detach() - before).double())
    assert float(values[1]) < 0.25 * float(values[0])


def test_groups_of_rank_0_are_adamw16s_bit_for_bit():
    ours, plain = ([torch.nn.Parameter(torch.linspace(-1, 1, 50)), *parameters()] for _ in range(2))
    first = Dion([{"params": ours[:3], "rank": 0}, {"params": ours[3:], "rank": 4}], lr=1e-2, ema_decay=0.9)
    second = AdamW16(plain[:3], lr=1e-2, ema_decay=0.9)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(plain, step)
        first.step()
        second.step()
    for p, q in zip(ours[:3], plain[:3], strict=True):
        assert torch.equal(p, q)
        assert torch.equal(first.state[p]["ema"], second.state[q]["ema"])
    for p in ours[3:]:
        assert set(first.state[p]) == {"momentum", "basis", "ema"}
        assert not torch.equal(first.state[p]["ema"], p)


def test_an_update_with_found_inf_is_skipped():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = Dion(params, lr=0.1, rank=4)
    give_gradients(params, 0)
    optimizer.step(found_inf=torch.ones(1))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.step(found_inf=torch.zeros(1))
    assert not torch.equal(params[0], before[0])


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    def make(params):
        bias = torch.nn.Parameter(torch.ones(9))
        return [*params, bias], Dion([{"params": params}, {"params": [bias], "rank": 0}], lr=0.05, rank=6)

    params, optimizer = make(parameters())
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    tensors, groups = pack_optimizer(optimizer)
    write_atomic(tmp_path / "optimizer.safetensors", serialize(tensors))
    others, resumed = make(parameters(seed=9))
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.detach())
    unpack_optimizer(World(), resumed, tmp_path / "optimizer.safetensors", groups)
    twin = copy.deepcopy(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    for step in range(3, 6):
        for some, o in ((params, optimizer), (others, resumed), (twins, twin)):
            give_gradients(some, step)
            o.step()
    for p, q, r in zip(params, others, twins, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert resumed.state[others[3]]["momentum"].is_contiguous(memory_format=torch.channels_last)


def test_wrong_calls_are_named():
    w, b = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"params: expected matrices in a group of rank 64, got \[4\]"):
        Dion([w, b])
    with pytest.raises(ValueError, match="rank: expected an int of at least 0, got -1"):
        Dion([w], rank=-1)
    with pytest.raises(ValueError, match=r"momentum: expected a number in \[0, 1\), got 1"):
        Dion([w], momentum=1.0)
    half = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(TypeError, match="expected dense float32, got dtype torch.bfloat16"):
        Dion([half]).step()


def test_the_config_takes_it_but_not_with_shards():
    assert DALLETrainConfig(optimizer="dion").dion_rank == 64
    with pytest.raises(ConfigError, match="dion needs whole matrices; expected loop.shard 1, got 2"):
        DALLETrainConfig(optimizer="dion", loop=LoopConfig(shard=2))
    with pytest.raises(ConfigError, match="dion_rank: expected at least 1"):
        dataclasses.replace(dalle_config(optimizer="dion"), dion_rank=0)
