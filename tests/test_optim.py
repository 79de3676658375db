# SPDX-License-Identifier: MIT
"""AdamW16 and the schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dalle_fast.ops import minifloat_decode
from dalle_fast.ops.adamw16 import adamw16
from dalle_fast.optim import AdamW16, PlateauHalving, cosine, warmup_linear


def quadratic(optimizer_of, steps=200, seed=0):
    """Distance from the minimum of an ill-conditioned quadratic after some updates."""
    torch.manual_seed(seed)
    target, curvature = torch.randn(64), torch.logspace(-4, -1, 64)  # gradients that no clip meets
    x = torch.nn.Parameter(torch.zeros(64))
    optimizer = optimizer_of([x])
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature * (x - target).square()).sum().backward()
        optimizer.step()
    return x.detach(), target


def test_it_follows_adamw_within_the_formats_error():
    options = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2}
    ours, target = quadratic(lambda p: AdamW16(p, variance_clip=15.0, **options))
    plain, _ = quadratic(lambda p: torch.optim.AdamW(p, **options))
    # moments carry 2^-10 relative rounding errors that do not add up
    assert float((ours - plain).abs().max()) < 0.02 * float(target.abs().max())


def test_the_variance_is_clipped_before_it_is_used():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdamW16([p], lr=1.0, betas=(0.0, 0.5), eps=0.0, weight_decay=0.0, variance_clip=5.0)
    p.grad = torch.tensor([10.0, 100.0, 1.0])
    optimizer.step()
    variance = minifloat_decode(optimizer.state[p]["variance"], "0-6-10")
    torch.testing.assert_close(variance, torch.tensor([5.0, 5.0, 0.5]))
    # update = g / sqrt(v / (1 - 0.5)); the mean saturates below 16
    expected = -torch.tensor([10.0, 15.984375, 1.0]) / torch.tensor([10.0, 10.0, 1.0]).sqrt()
    torch.testing.assert_close(p.detach(), expected)


def test_unscaling_and_averaging_are_fused():
    a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    first = AdamW16([a], lr=1e-2, ema_decay=0.9)
    second = AdamW16([b], lr=1e-2)
    average = b.detach().clone()
    for step in range(5):
        g = torch.cos(torch.arange(50.0) + step)
        a.grad, b.grad = g * 1024, g.clone()
        first.step(grad_scale=1024.0)
        second.step()
        average.lerp_(b.detach(), 0.1)
        assert torch.equal(a, b)
    torch.testing.assert_close(first.state[a]["ema"], average)


def test_state_survives_a_round_trip_bit_for_bit():
    def make():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))

    def step(model, optimizer, k):
        torch.manual_seed(k)
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()

    model = make()
    optimizer = AdamW16(model.parameters(), lr=1e-2, ema_decay=0.9)
    for k in range(3):
        step(model, optimizer, k)
    other = make()
    other.load_state_dict(model.state_dict())
    resumed = AdamW16(other.parameters(), lr=1e-2, ema_decay=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in other.parameters():
        assert resumed.state[p]["mean"].dtype == torch.uint16
    for k in range(3, 6):
        step(model, optimizer, k)
        step(other, resumed, k)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["ema"], resumed.state[q]["ema"])


def test_a_deep_copy_goes_on_like_the_original():
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = AdamW16([p], lr=1e-2)
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    for _ in range(2):
        for x, o in ((p, optimizer), (q, twin)):
            x.grad = torch.full((5,), 0.5)
            o.step()
    assert torch.equal(p, q)


def test_a_checkpoint_without_a_backend_resumes_on_the_one_constructed():
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = AdamW16([p], lr=1e-2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["backend"]
    resumed = AdamW16([p], lr=1.0, backend="reference")
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["backend"] == "reference"
    assert resumed.param_groups[0]["lr"] == 1e-2
    resumed.step()
    assert int(resumed.state[p]["step"]) == 2


def test_strided_parameters_and_bfloat16_gradients():
    base = torch.randn(6, 10)
    strided = base.clone().t()
    dense = base.t().contiguous()
    g = torch.randn(10, 6).bfloat16()
    for p, grad in ((strided, g), (dense, g.float())):
        codes = [torch.zeros(10, 6, dtype=torch.uint16) for _ in range(2)]
        adamw16([p], [grad], [codes[0]], [codes[1]], step=1, lr=0.1)
    assert torch.equal(strided, dense)


def test_channels_last_parameters_keep_their_memory_order():
    plain = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    last = torch.nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    optimizers = [AdamW16([p], lr=1e-2, ema_decay=0.9) for p in (plain, last)]
    for step in range(3):
        g = torch.randn(6, 4, 3, 3) * 1e-2
        plain.grad, last.grad = g, g.to(memory_format=torch.channels_last) if step else g.clone()  # or another order
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, last)
    for name in ("mean", "variance", "ema"):
        assert optimizers[1].state[last][name].stride() == last.stride()
        assert torch.equal(optimizers[0].state[plain][name], optimizers[1].state[last][name])
    resumed = AdamW16([last], lr=1e-2, ema_decay=0.9)
    resumed.load_state_dict(optimizers[0].state_dict())
    assert resumed.state[last]["mean"].stride() == last.stride()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr: expected"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]: expected"),
        ({"variance_clip": 20.0}, "variance_clip: expected"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
    ],
)
def test_bad_hyperparameters_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AdamW16([torch.nn.Parameter(torch.zeros(2))], **change)


def test_bad_tensors_are_named():
    p, g = torch.zeros(3), torch.zeros(3)
    code = torch.zeros(3, dtype=torch.uint16)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape \[3\], got \[4\]"):
        adamw16([p], [torch.zeros(4)], [code], [code.clone()], step=1, lr=0.1)
    with pytest.raises(TypeError, match=r"means\[0\]: expected dtype uint16, got int32"):
        adamw16([p], [g], [code.to(torch.int32)], [code.clone()], step=1, lr=0.1)
    with pytest.raises(ValueError, match="variances: expected 1 tensors"):
        adamw16([p], [g], [code], [], step=1, lr=0.1)
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    half.grad = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(TypeError, match="params: expected dense float32"):
        AdamW16([half]).step()


def test_cosine_of_the_paper():
    # beta: 0 to 6.6 over 5,000; tau: 1 to 1/16 over 150,000; step size 1e-4 to 1.25e-6 over 1,200,000; then constant
    assert cosine(0, 0.0, 6.6, 5000) == 0.0
    assert cosine(2500, 0.0, 6.6, 5000) == pytest.approx(3.3)
    assert cosine(5000, 0.0, 6.6, 5000) == cosine(10**7, 0.0, 6.6, 5000) == 6.6
    assert cosine(150_000, 1.0, 1 / 16, 150_000) == 1 / 16
    assert cosine(600_000, 1e-4, 1.25e-6, 1_200_000) == pytest.approx((1e-4 + 1.25e-6) / 2)
    values = [cosine(step, 1.0, 1 / 16, 100) for step in range(101)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="num_steps"):
        cosine(0, 1.0, 0.0, 0)


def test_warmup_reaches_its_peak():
    assert warmup_linear(0, 4.5e-4, 5000) == pytest.approx(4.5e-4 / 5000)
    assert warmup_linear(4999, 4.5e-4, 5000) == 4.5e-4
    assert warmup_linear(10**6, 4.5e-4, 5000) == 4.5e-4


def test_plateaus_halve_five_times_in_all():
    plateau = PlateauHalving(window=2, patience=2)
    for step in range(20):
        assert not plateau.update(10.0 - step)  # still falling
    halvings = sum(plateau.update(-9.0) for _ in range(200))
    assert halvings == 5
    assert plateau.factor == 1 / 32


def test_a_plateau_resumes_where_it_was():
    losses = [1.0 + 0.01 * math.sin(k) for k in range(40)]
    whole = PlateauHalving(window=3, patience=2)
    answers = [whole.update(loss) for loss in losses]
    first = PlateauHalving(window=3, patience=2)
    for loss in losses[:17]:
        first.update(loss)
    second = PlateauHalving(window=3, patience=2)
    second.load_state_dict(first.state_dict())
    assert [second.update(loss) for loss in losses[17:]] == answers[17:]
    assert second.factor == whole.factor < 1
    assert not second.update(math.nan)
