# SPDX-License-Identifier: MIT
"""AdamW16 and the schedules."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch

from dalle_fast.ops import minifloat_decode
from dalle_fast.ops.adamw16 import adamw16
from dalle_fast.optim import AdamW16, PlateauHalving, cosine, warmup_linear

try:
    from dalle_fast import _C_simt
except ImportError:
    _C_simt = None
needs_executor = pytest.mark.skipif(_C_simt is None, reason="no host executor")


@pytest.fixture(params=["cpu", pytest.param("executor", marks=needs_executor), "reference"])
def backend(request, monkeypatch):
    """The CPU kernels, the CUDA ones on the host executor, the plain twin."""
    if request.param == "executor":
        monkeypatch.setattr(importlib.import_module("dalle_fast.ops.adamw16.op"), "_C", _C_simt)
    return "reference" if request.param == "reference" else "cpu"


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


def twins(backend, **options):
    """Two optimizers of equal parameters, one capturable; shapes with vectors, tails, and rows that are not aligned."""
    torch.manual_seed(2)
    start = [torch.randn(40, 9), torch.randn(3), torch.randn(()), torch.randn(1031)[1:], torch.randn(8, 6).t()]
    result = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in start]
        result.append((params, AdamW16(params, capturable=capturable, backend=backend, **options)))
    return result


def give_gradients(k, *lists, scale=1.0):
    """The same to all lists; the second parameter has none at every third step."""
    torch.manual_seed(k)
    for i, group in enumerate(zip(*lists, strict=True)):
        g = torch.randn(group[0].shape) * 1e-2 * scale
        for p in group:
            p.grad = None if i == 1 and k % 3 == 1 else g.clone()


def assert_equal_state(first, second):
    for p, q in zip(*(o.param_groups[0]["params"] for o in (first, second)), strict=True):
        assert torch.equal(p, q)
        for name, value in first.state[p].items():
            assert torch.equal(value, second.state[q][name]), name


def test_capturable_is_the_same_bit_for_bit(backend):
    (a, plain), (b, capturable) = twins(backend, lr=3e-3, ema_decay=0.9)
    for k in range(7):
        give_gradients(k, a, b, scale=512.0)
        plain.step(grad_scale=512.0)
        capturable.step(grad_scale=torch.tensor(512.0))
    if backend == "cpu":
        assert_equal_state(plain, capturable)
    else:  # torch rounds float tensors times numbers another way than times tensors
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert [int(capturable.state[p]["step"]) for p in b] == [7, 5, 7, 7, 7]


def test_the_step_size_can_be_changed_in_its_tensor(backend):
    (a, plain), (b, capturable) = twins(backend, lr=1e-2)
    lr = capturable.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.StepLR(capturable, 1, gamma=0.5)
    for k in range(4):
        give_gradients(k, a, b)
        plain.param_groups[0]["lr"] = 1e-2 / (k + 1)
        lr.fill_(1e-2 / (k + 1))
        plain.step()
        capturable.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    scheduler.step()
    assert capturable.param_groups[0]["lr"] is lr
    assert float(lr) == 1e-2 / 8


def test_found_inf_skips_everything(backend):
    (a, plain), (b, capturable) = twins(backend, ema_decay=0.9)
    for params, optimizer in ((a, plain), (b, capturable)):
        give_gradients(0, params)
        optimizer.step(found_inf=torch.tensor(0.0))
        before = copy.deepcopy(optimizer)
        give_gradients(3, params, scale=torch.inf)
        optimizer.step(found_inf=torch.tensor(1.0))
        assert_equal_state(before, optimizer)
        give_gradients(3, params)
        optimizer.step(found_inf=torch.tensor(0.0))
        assert int(optimizer.state[params[0]]["step"]) == 2
        assert not torch.equal(before.param_groups[0]["params"][0], params[0])


@pytest.mark.parametrize("capturable", [False, True])
def test_a_grad_scaler_leaves_unscaling_and_skipping_to_the_step(capturable, backend):
    (a, optimizer) = twins(backend)[capturable]
    (b, plain), _ = twins(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for k in range(6):
        give_gradients(k, b)
        give_gradients(k, a, scale=torch.inf if k == 2 else float(scaler.scale(torch.ones(()))))
        if k == 4:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if k != 2:
            plain.step()
    assert scaler.get_scale() == 128.0
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_checkpoints_fit_capturable_and_not(capturable):
    first, second = twins("auto", lr=5e-3, ema_decay=0.9)
    (a, source), (b, target) = (first, second) if capturable else (second, first)
    for k in range(3):
        give_gradients(k, a)
        source.step()
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        del group["capturable"]  # as older ones
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    lr = target.param_groups[0]["lr"]
    target.load_state_dict(saved)
    assert target.param_groups[0]["capturable"] is capturable
    assert isinstance(target.param_groups[0]["lr"], torch.Tensor) is capturable
    assert not capturable or target.param_groups[0]["lr"] is lr
    for k in range(3, 5):
        give_gradients(k, a, b)
        source.step()
        target.step()
    assert_equal_state(source, target)


def test_tensors_that_a_capturable_update_cannot_take_are_named():
    p, g = torch.zeros(3), torch.zeros(3)
    code = torch.zeros(3, dtype=torch.uint16)
    lists = ([p], [g], [code], [code.clone()])
    step = [torch.tensor(0)]
    with pytest.raises(TypeError, match="lr: expected no tensor"):
        adamw16(*lists, step=1, lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="step: expected 1 tensors"):
        adamw16(*lists, step=[], lr=0.1)
    with pytest.raises(TypeError, match="steps: expected dtype int64"):
        adamw16(*lists, step=[torch.tensor(0.0)], lr=0.1)
    with pytest.raises(ValueError, match=r"found_inf: expected one element, got shape \[2\]"):
        adamw16(*lists, step=step, lr=0.1, found_inf=torch.zeros(2))
    with pytest.raises(TypeError, match="grad_scale: expected dtype float32"):
        adamw16(*lists, step=step, lr=0.1, grad_scale=torch.tensor(2))
    assert int(step[0]) == 0


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


def test_parameters_that_share_memory_are_refused_before_any_is_changed():
    storage = torch.ones(8)
    first, other = torch.zeros(3), torch.ones(5)
    for params in ([first, storage[:5], storage[4:]], [first, torch.ones(1).expand(4)]):
        optimizer = AdamW16(params)
        for p in params:
            p.grad = torch.ones(p.shape)
        with pytest.raises(ValueError, match=r"^params(\[1\])?: expected"):
            optimizer.step()
        assert torch.equal(first, torch.zeros(3))
    with pytest.raises(ValueError, match=r"^params\[1\]: expected each tensor once"):
        AdamW16([other, other])
