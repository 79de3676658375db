# SPDX-License-Identifier: MIT
"""PowerSGD on parameters sharded within machines: the gradient, healing, and FSDP's ways.

Functions named `rank_*` run in the ranks of a gloo group (`tests/ranks.py`) and return what the test compares.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from parallel_parts import UNIT, assert_same, given, machines, randn, transformer, values
from torch.distributed.fsdp import MixedPrecisionPolicy

from dalle_fast.parallel import (
    PowerSGD,
    attach_powersgd,
    compression_rate,
    shard_blocks,
)


def rank_sharded_full(group, with_blocks: bool):
    samples = randn(4, 4, 6, 16)
    model = transformer()
    model(samples.flatten(0, 1)).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = float(torch.cat([grad.flatten() for grad in expected.values()]).norm())
    model.zero_grad()
    mesh, machine, shard = machines(group)
    shard_blocks(model, model.blocks if with_blocks else [], mesh)
    assert model.blocks[0].mlp_out.weight.placements[0].dim == 1
    assert model.blocks[0].mlp_in.weight.placements[0].dim == 0
    powersgd = PowerSGD(model, rank=32, group=machine, shard_group=shard, clip_norm=norm / 2)
    attach_powersgd(model, powersgd)
    for _ in range(2):
        model.zero_grad()
        model(samples[dist.get_rank()]).square().mean().backward()
        for name, p in model.named_parameters():
            got, want = p.grad.full_tensor(), expected[name] / 2
            assert (got - want).norm() < 4 * UNIT * want.norm()
        assert powersgd.grad_norm == pytest.approx(norm, rel=UNIT)
        assert not powersgd.nonfinite
    with pytest.raises(RuntimeError, match="zero_grad"):
        model(samples[dist.get_rank()]).square().mean().backward()
    return powersgd.grad_norm


@pytest.mark.parametrize("with_blocks", [True, False])
def test_shards_at_full_rank_are_the_gradient_of_the_global_mean_loss(ranks, with_blocks):
    assert_same(ranks.run(rank_sharded_full, with_blocks, world=4))


def rank_sharded_bf16(group):
    """Gradients reduced in bfloat16, which FSDP converts after the hook."""
    samples = randn(4, 4, 6, 16)
    model = transformer()
    model(samples.flatten(0, 1)).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    mesh, machine, shard = machines(group)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    shard_blocks(model, model.blocks, mesh, precision=policy)
    powersgd = PowerSGD(model, rank=32, group=machine, shard_group=shard)
    attach_powersgd(model, powersgd)
    model(samples[dist.get_rank()]).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        # FSDP alone is up to 0.056 off in bfloat16
        assert (p.grad.full_tensor() - expected[name]).norm() < 0.1 * expected[name].norm()


def test_shards_in_bfloat16(ranks):
    ranks.run(rank_sharded_bf16, world=4)


def rank_sharded_like_ddp(group):
    """Each shard is what DDP makes of it as a parameter of its own."""
    mesh, machine, shard = machines(group)
    model = transformer()
    shard_blocks(model, model.blocks, mesh)
    powersgd = PowerSGD(model, rank=6, group=machine, shard_group=shard)
    attach_powersgd(model, powersgd)
    plain = transformer()
    shard_blocks(plain, plain.blocks, mesh)
    parts = [p.to_local() for p in plain.parameters()]
    names = {f"weights.{i}": name for i, (name, _) in enumerate(plain.named_parameters())}
    keep = [
        short for short, name in names.items() if powersgd.entry(dict(model.named_parameters())[name]).error is None
    ]
    split = {short: 3 for short, name in names.items() if "qkv.weight" in name}
    backward, parameters, peer = given(machine, *(p.shape for p in parts), rank=3, keep=keep, split=split)
    for p, sharded in zip(parameters, model.parameters()):
        for ours, theirs in zip(peer.entry(p).matrices, powersgd.entry(sharded).matrices, strict=True):
            ours.factor.copy_(theirs.factor)
    for step in range(3):
        samples = randn(50 + step, 4, 6, 16)[dist.get_rank()]
        for each in (model, plain):
            each.zero_grad()
            each(samples).square().mean().backward()
        expected = backward([p.grad.to_local() for p in plain.parameters()])
        for p, want in zip(model.parameters(), expected):
            assert torch.equal(p.grad.to_local(), want)
    numbers = powersgd.sizes
    assert numbers.factors / numbers.compressed == pytest.approx(1 - compression_rate(16, 6, 2))


def test_shards_follow_ddp_to_the_bit(ranks):
    ranks.run(rank_sharded_like_ddp, world=4)


def rank_sharded_heal(group):
    mesh, machine, shard = machines(group)
    model = transformer()
    shard_blocks(model, model.blocks, mesh)
    powersgd = PowerSGD(model, rank=6, group=machine, shard_group=shard)
    attach_powersgd(model, powersgd)
    norms = []
    for step in range(3):
        samples = randn(60 + step, 4, 6, 16)[dist.get_rank()]
        if step == 1 and dist.get_rank() == 2:
            samples = samples * math.nan
        model.zero_grad()
        model(samples).square().mean().backward()
        norms.append(powersgd.grad_norm)
        assert powersgd.finite == (step != 1)
        for p in model.parameters():
            assert p.grad.to_local().isfinite().all() == (step != 1) or not p.grad.to_local().numel()
            error = powersgd.entry(p).error
            assert error is None or values(error).isfinite().all()
    return norms, len(powersgd.nonfinite)


def test_shards_agree_on_what_is_not_finite(ranks):
    assert_same(ranks.run(rank_sharded_heal, world=4))


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("half-way")


def rank_sharded_broken(group):
    mesh, machine, shard = machines(group)
    model = transformer()
    shard_blocks(model, model.blocks, mesh)
    powersgd = PowerSGD(model, rank=32, group=machine, shard_group=shard)
    attach_powersgd(model, powersgd)
    x = randn(1, 6, 16)
    first = model.blocks[0].forward
    model.blocks[0].forward = lambda y: Breaks.apply(first(y))
    with pytest.raises(ArithmeticError):
        model(x).square().mean().backward()
    model.blocks[0].forward = first
    model.reset_iter_state()
    for p in model.parameters():
        if powersgd.entry(p).error is not None:
            powersgd.entry(p).error.zero_()
    model.zero_grad()
    model(x).square().mean().backward()
    expected = transformer()
    expected(x).square().mean().backward()
    for got, want in zip(model.blocks.parameters(), expected.blocks.parameters()):  # FSDP doubles the root's
        assert (got.grad.full_tensor() - want.grad).norm() < 4 * UNIT * want.grad.norm()


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp.FSDPModule, "reset_iter_state"), reason="FSDP cannot go on")
def test_shards_go_on_after_a_backward_pass_that_raised(ranks):
    ranks.run(rank_sharded_broken, world=4)
