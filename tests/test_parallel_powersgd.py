# SPDX-License-Identifier: MIT
"""PowerSGD between processes: the gradient, error feedback, healing, and that it trains.

Functions named `rank_*` run in the ranks of a gloo group (`tests/ranks.py`) and return what the test compares.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import math

import pytest
import tiny
import torch
import torch.distributed as dist
from parallel_parts import UNIT, assert_same, buffers, codes, given, randn, values
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dalle_fast.data.shapes import COLOURS, ShapesPairs
from dalle_fast.models import DALLE
from dalle_fast.parallel import (
    PowerSGD,
    Traffic,
    attach_powersgd,
    powersgd_hook,
    shard_blocks,
)

# ---- the gradient


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 8))


def rank_full(group):
    samples = randn(5, group.size(), 32, 24)
    model = mlp()
    model(samples.flatten(0, 1)).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ddp = DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.001)  # one bucket a layer
    powersgd = PowerSGD(ddp, rank=64)
    ddp.register_comm_hook(powersgd, powersgd_hook)
    for _ in range(3):  # DDP rebuilds its buckets after the first
        ddp.zero_grad()
        ddp(samples[dist.get_rank(group)]).square().mean().backward()
        for got, want in zip(model.parameters(), expected):
            assert (got.grad - want).norm() < 4 * UNIT * want.norm()
        torch.testing.assert_close(powersgd.grad_norm, float(torch.cat([g.flatten() for g in expected]).norm()),
                                   rtol=UNIT, atol=0)  # fmt: skip
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_full_rank_is_the_gradient_of_the_global_mean_loss(ranks, world):
    assert_same(ranks.run(rank_full, world=world))


def rank_exact(group, mode: str):
    """Upper triangles have the identity as their basis, and short integers are exact in nine bits."""
    shapes = [(5, 9), (9, 5), (6, 6)]
    backward, parameters, powersgd = given(group, *shapes, rank=9, mode=mode)
    grads = []
    for i, (p, shape) in enumerate(zip(parameters, shapes)):
        (matrix,) = powersgd.entry(p).matrices
        matrix.factor.copy_(codes(torch.eye(*matrix.factor.shape)))
        everyones = torch.randint(-16, 17, (group.size(), min(shape), max(shape)), dtype=torch.float32,
                                  generator=torch.Generator().manual_seed(i)) / 64  # fmt: skip
        everyones = everyones.triu()
        grads.append(everyones.mT if matrix.transposed else everyones)
    for step in (1, 2):
        got = backward([grad[dist.get_rank(group)] for grad in grads])
        for mine, grad, error in zip(got, grads, buffers(powersgd, parameters)):
            assert torch.equal(mine, grad.mean(0))
            assert torch.equal(error, step * (grad[dist.get_rank(group)] - grad.mean(0)))
    return got


@pytest.mark.parametrize("mode", ["gather", "scatter"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_short_integers_come_through_exactly(ranks, world, mode):
    assert_same(ranks.run(rank_exact, mode, world=world))


def rank_feedback(group):
    """Mean of E before + mean gradient = gradient applied + mean of E after, at every step, in every layout."""
    shapes = [(24, 40), (40, 24), (16, 3, 3, 3), (12, 36)]
    backward, parameters, powersgd = given(group, *shapes, rank=3, split={"weights.3": 3})
    assert [len(powersgd.entry(p).matrices) for p in parameters] == [1, 1, 1, 3]
    left = [torch.zeros(shape) for shape in shapes]
    for step in range(4):
        grads = [randn(97 * step + 7 * i + dist.get_rank(group), *shape) / 8 for i, shape in enumerate(shapes)]
        got = backward(grads)
        for i, (applied, grad, error) in enumerate(zip(got, grads, buffers(powersgd, parameters))):
            size = left[i].abs() + grad.abs() + applied.abs() + error.abs()
            total = torch.stack([left[i] + grad - error, 4 * UNIT * size])
            dist.all_reduce(total, group=group)
            balance, slack = total / group.size()
            assert ((balance - applied).abs() <= slack).all()
            assert applied.norm() < 0.9 * (balance + applied).norm()  # rank 3 does not say all
            left[i] = error
    return got


def rank_channels_last(group):
    """A gradient whose rows are not contiguous."""
    model = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, process_group=group)
    powersgd = PowerSGD(ddp, rank=16)
    ddp.register_comm_hook(powersgd, powersgd_hook)
    pictures = randn(dist.get_rank(group), 2, 8, 6, 6)
    ddp(pictures).square().mean().backward()
    assert not model.weight.grad.is_contiguous()
    mean = torch.autograd.grad(model(pictures).square().mean(), model.weight)[0].contiguous()
    dist.all_reduce(mean, group=group)
    assert (model.weight.grad - mean / group.size()).norm() < 4 * UNIT * mean.norm()


def test_gradients_in_channels_last(ranks):
    ranks.run(rank_channels_last, world=2)


def rank_order(group):
    """A block's P leaves before older blocks are waited for; nothing waits in the first."""
    _, parameters, powersgd = given(group, (24, 40), (30, 40), (20, 40), rank=4, mode="gather")
    entries = [powersgd.entry(p) for p in parameters]
    sent = []
    for entry in entries:
        powersgd.start([(entry, torch.ones(entry.error.shape))])
        sent.append(powersgd.traffic.collectives)
    powersgd.finish()
    assert sent == [1, 3, 5]  # P1; P2, R1; P3, R2 while R1 ends
    assert powersgd.traffic.collectives == 7  # R3, and the flags


def test_factors_travel_while_later_blocks_come(ranks):
    ranks.run(rank_order, world=2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_not_applied_stays_in_the_error_buffers(ranks, world):
    assert_same(ranks.run(rank_feedback, world=world))


def rank_alone(group):
    backward, parameters, powersgd = given(group, (24, 40), (40, 24), rank=5)
    low = [randn(1, 24, 5) @ randn(2, 5, 40) / 8, randn(3, 40, 4) @ randn(4, 4, 24) / 8]
    got = backward(low)
    for grad, want in zip(got, low):
        assert (grad - want).norm() < 4 * UNIT * want.norm()
    full = [randn(5, 24, 40) / 8, randn(6, 40, 24) / 8]
    for error in (powersgd.entry(p).error for p in parameters):
        error.zero_()
    for grad, want, p in zip(backward(full), full, parameters):
        (matrix,) = powersgd.entry(p).matrices
        assert torch.linalg.matrix_rank(grad) == matrix.rank == 5
        basis = torch.linalg.qr(matrix.of(want) @ values(matrix.factor)).Q
        projected = basis @ (basis.mT @ matrix.of(want))
        assert (matrix.of(grad) - projected).norm() < 8 * UNIT * want.norm()
    assert powersgd.traffic == Traffic()


def test_one_rank_is_the_identity_up_to_the_rank(ranks):
    ranks.run(rank_alone, world=1)


def rank_tiny(group):
    """A matrix of zeros, and one of the smallest numbers, whose basis a smaller eps lets be."""
    for eps in (1e-6, 1e-20):
        backward, parameters, powersgd = given(group, (24, 40), (40, 24), rank=4, eps=eps)
        zeros, tiny = torch.zeros(24, 40), torch.full((40, 24), 1e-12)
        got = backward([zeros, tiny])
        assert torch.equal(got[0], zeros)
        left = (got[1] + buffers(powersgd, parameters)[1] - tiny).norm()
        assert left <= 4 * UNIT * tiny.norm()
        assert eps == 1e-6 or (got[1] - tiny).norm() < 4 * UNIT * tiny.norm()
        assert powersgd.finite


def test_gradients_of_nothing_and_next_to_nothing(ranks):
    ranks.run(rank_tiny, world=2)


def rank_constants(group):
    results = []
    for constants in ((1.0, 2.0**-6, 2.0**-6), (2.0**-3, 2.0**-1, 2.0**-9)):
        named = dict(zip(("grad_constant", "p_constant", "q_constant"), constants))
        backward, _, powersgd = given(group, (24, 40), (30,), rank=4, clip_norm=0.5, **named)
        got = [backward([randn(step + dist.get_rank(group), 24, 40) / 8, torch.ones(30)]) for step in range(3)]
        results.append((got, powersgd.grad_norm))
    return results


def test_constants_that_are_powers_of_two_change_no_bit(ranks):
    assert_same([result for results in ranks.run(rank_constants, world=2) for result in results])


def rank_scales(group):
    scale = {"weights.0": 1024.0, "weights.1": 0.125}
    backward, _, _ = given(group, (24, 40), (30,), rank=24, grad_scale=scale.__getitem__)
    grads = [randn(dist.get_rank(group), 24, 40) / 8, randn(9, 30)]
    got = backward([grad * s for grad, s in zip(grads, scale.values())])
    mean = grads[0].clone()
    dist.all_reduce(mean, group=group)
    assert (got[0] - mean / 2).norm() < 4 * UNIT * got[0].norm()
    torch.testing.assert_close(got[1], grads[1])


def test_gradient_scales_are_taken_out(ranks):
    ranks.run(rank_scales, world=2)


def rank_clip(group):
    backward, _, powersgd = given(group, (24, 40), (40, 24), (1 << 16,), (30,), rank=24, clip_norm=0.25)
    grads = [randn(i, *shape) / 8 for i, shape in enumerate([(24, 40), (40, 24), (1 << 16,), (30,)])]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    got = backward(grads)
    torch.testing.assert_close(powersgd.grad_norm, float(norm), rtol=UNIT, atol=0)
    for grad, want in zip(got, grads):
        assert (grad - want * 0.25 / norm).norm() < 4 * UNIT * grad.norm()


def test_gradients_are_clipped_by_the_norm_of_all(ranks):
    ranks.run(rank_clip, world=2)


# ---- what is not finite


def rank_heal(group, kind: str, seed: int):
    """A fault in one rank, parameter and step drawn at random; everything else is as if it had not been."""
    shapes = [(24, 40), (40, 24), (1 << 16,), (30,), (32, 32)]
    names = [f"weights.{i}" for i in range(len(shapes))]
    draw = torch.Generator().manual_seed(seed)
    rank, at = (int(torch.randint(n, (), generator=draw)) for n in (group.size(), 3))
    where = [0, 1, 4][int(torch.randint(3, (), generator=draw))] if kind != "plain" else seed % 2 + 2
    backward, parameters, powersgd = given(group, *shapes, rank=4, bucket_cap_mb=0.003)
    me, history = dist.get_rank(group), []
    for step in range(5):
        grads = [randn(31 * step + 7 * i + me, *shape) / 8 for i, shape in enumerate(shapes)]
        before = [powersgd.entry(p).error.clone() if powersgd.entry(p).matrices else None for p in parameters]
        if step == at and me == rank:
            grads[where].view(-1)[-1] = {"overflow": 1e6, "inf": -math.inf}.get(kind, math.nan)
        got = backward(grads)
        history.append((powersgd.grad_norm, got))
        after = [powersgd.entry(p).error if powersgd.entry(p).matrices else None for p in parameters]
        if step != at:
            assert powersgd.finite
            assert not powersgd.nonfinite
            assert all(grad.isfinite().all() for grad in got)
            continue
        assert powersgd.grad_norm == math.inf
        assert powersgd.nonfinite == {names[where]}
        assert all(grad.isnan().all() for grad in got)  # whoever looks at gradients alone skips too
        for i, (old, new) in enumerate(zip(before, after)):
            if old is None:
                continue
            mine = values(old) + grads[i] if i != where or me != rank else None
            if i == where and kind == "overflow":  # E itself overflowed: cleared there, kept elsewhere
                assert torch.equal(values(new), torch.zeros(shapes[i]) if me == rank else values(codes(mine)))
            elif mine is None:  # the gradient was not added; what was sent of E is taken out of it
                assert not torch.equal(new, old)
                assert values(new).isfinite().all()
            else:
                assert values(new).isfinite().all()
                assert 0 < (values(new) - mine).norm() < mine.norm()
    return history


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "plain"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_not_finite_in_one_rank_heals(ranks, world, kind, seed):
    assert_same(ranks.run(rank_heal, kind, seed, world=world))


def rank_clamped(group):
    """A factor past the format's end: the update is skipped, and no buffer loses anything."""
    backward, parameters, powersgd = given(group, (24, 40), rank=4, p_constant=64.0)
    grad = randn(dist.get_rank(group), 24, 40)
    got = backward([grad])
    assert powersgd.nonfinite == {"weights.0"}
    assert got[0].isnan().all()
    (error,) = buffers(powersgd, parameters)
    assert torch.equal(error, values(codes(grad)))


def test_a_factor_that_was_clamped_keeps_the_buffers(ranks):
    ranks.run(rank_clamped, world=2)


def rank_broken_backward(group):
    """A backward pass that ended early leaves nothing behind for the next."""
    backward, parameters, powersgd = given(group, (24, 40), (30, 40), rank=30, bucket_cap_mb=0.001)
    backward([randn(0, 24, 40), randn(1, 30, 40)])
    powersgd.start([(powersgd.entry(p), torch.zeros(p.shape)) for p in parameters])
    for p in parameters:
        powersgd.entry(p).error.zero_()
    got = backward([randn(2, 24, 40), randn(3, 30, 40)])
    for grad, error, want in zip(got, buffers(powersgd, parameters), (randn(2, 24, 40), randn(3, 30, 40))):
        assert (grad - want).norm() < 4 * UNIT * want.norm()
        assert error.norm() < 4 * UNIT * want.norm()  # nothing was taken out for the block that broke off


def test_a_backward_pass_that_broke_off_is_forgotten(ranks):
    ranks.run(rank_broken_backward, world=2)


# ---- training


def pictures_and_captions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn shapes as 8 x 8 colours and words: tokens without a dVAE."""
    data = ShapesPairs("train", size=24, num_samples=count)
    samples = [data[i] for i in range(count)]
    words = {word: i for i, word in enumerate(sorted({w for s in samples for w in s.caption.split()}))}
    text = torch.full((count, 10), -1)
    for row, sample in zip(text, samples):
        ids = torch.tensor([words[w] for w in sample.caption.split()])
        row[: len(ids)] = ids
    palette = torch.tensor([(255, 255, 255), *COLOURS.values()], dtype=torch.float32)
    pixels = torch.stack([torch.from_numpy(s.image.copy()).float() for s in samples])  # [N, 24, 24, 3]
    cells = pixels.unflatten(1, (8, 3)).unflatten(3, (8, 3)).mean((2, 4)).flatten(1, 2)
    return text, torch.cdist(cells, palette.expand(count, -1, -1)).argmin(-1)


class Loss(nn.Module):
    def __init__(self, dalle: DALLE) -> None:
        super().__init__()
        self.dalle = dalle

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.dalle.loss(text, image).loss


def rank_trains(group, rank: int | None, seed: int, steps: int):
    """Losses of a small transformer under DDP, with PowerSGD of a rank or without."""
    text, image = pictures_and_captions(512)
    torch.manual_seed(seed)
    model = Loss(DALLE(tiny.DALLE))
    ddp = DistributedDataParallel(model, process_group=group)
    powersgd = PowerSGD(ddp, rank=rank, clip_norm=4.0) if rank else None
    if powersgd:
        ddp.register_comm_hook(powersgd, powersgd_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.96), weight_decay=4.5e-2)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(text), (group.size(), 8), generator=draw)[dist.get_rank(group)]
        optimizer.zero_grad()
        loss = ddp(text[rows], image[rows])
        loss.backward()
        if powersgd is None or powersgd.finite:
            optimizer.step()
        mean = loss.detach() / group.size()
        dist.all_reduce(mean, group=group)
        losses.append(float(mean))
    return losses, [p.detach() for p in model.parameters()]


def test_training_is_as_good_as_uncompressed(ranks):
    """The paper's criterion for a rank: no gap in the training loss. Rank 8 of width 32 has none, rank 1 does.

    Between seeds the uncompressed mean moves by 2 %.
    """
    losses = {}
    for rank in (None, 8, 1):
        results = ranks.run(rank_trains, rank, 0, 120, world=2)
        assert_same(results)
        losses[rank] = sum(results[0][0][60:]) / 60
    assert losses[8] < 1.03 * losses[None]
    assert losses[1] > 1.06 * losses[None]


# ---- streams and examples


def rank_streams(group, device: str):
    """One rank, through DDP and through FSDP: on a GPU the factors are made on a stream of their own."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh(device, (1, 1), mesh_dim_names=("machine", "shard"))
        for sharded in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)), nn.Linear(256, 3)).to(device)
            plain = copy.deepcopy(model)
            if sharded:
                shard_blocks(model, model[:6], mesh["shard"])
                powersgd = PowerSGD(model, rank=256, group=mesh.get_group("machine"))
                attach_powersgd(model, powersgd)
            else:
                ddp = DistributedDataParallel(model, bucket_cap_mb=0.3)
                powersgd = PowerSGD(ddp, rank=256)
                ddp.register_comm_hook(powersgd, powersgd_hook)
            assert (powersgd.stream is not None) == (device == "cuda")
            for step in range(6):
                x = randn(step, 512, 256).to(device)
                for each in (model if sharded else ddp, plain):
                    each.zero_grad()
                    each(x).square().mean().backward()
                for p, want in zip(model.parameters(), plain.parameters()):
                    got = p.grad.full_tensor() if sharded else p.grad
                    assert (got - want.grad).norm() < 4 * UNIT * want.grad.norm()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_streams(device):
    pool = Ranks(1, initialize=False)
    try:
        pool.run(rank_streams, device, world=1)
    finally:
        pool.close()


def rank_doctest(group, name: str):
    module = importlib.import_module(name)
    return doctest.testmod(module, optionflags=doctest.ELLIPSIS)


def test_examples_run():
    pool = Ranks(1, initialize=False)
    try:
        for module in ("powersgd", "matrices"):
            ((failed, attempted),) = pool.run(rank_doctest, f"dalle_fast.parallel.{module}", world=1)
            assert attempted
            assert not failed
    finally:
        pool.close()
