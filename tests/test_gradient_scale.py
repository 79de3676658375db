# SPDX-License-Identifier: MIT
"""A gradient scale for each resblock: the published state machine, the float16 branch, and a network that needs it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DALLE as TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gradient_scale import NUM_LAYERS, NUM_UPDATES, VOCAB_SIZE, survey, train
from dalle_fast.models import DALLE
from dalle_fast.nn import Linear, scaled_branch
from dalle_fast.optim import ResblockGradScaler
from dalle_fast.optim.gradient_scale_reference import ResblockScaleReference


def parameters(count: int = 3) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def scaler_of(params: list[torch.nn.Parameter], **options) -> ResblockGradScaler:
    return ResblockGradScaler([[p] for p in params], **options)


def one_update(scaler: ResblockGradScaler, params: list[torch.nn.Parameter], overflowed: set[int]) -> None:
    for i, p in enumerate(params):
        p.grad = torch.tensor([1.0, float("inf") if i in overflowed else 1.0])
    scaler.unscale_()
    scaler.update()


# ---- the state machine


@settings(max_examples=40, deadline=None)
@given(
    num_replicas=st.sampled_from([1, 3, 1024]),
    start=st.sampled_from([7000, 7400, 13000, 23900, 24000]),
    # stretches of updates in which the same resblocks overflow
    stretches=st.lists(st.tuples(st.sets(st.integers(0, 2)), st.integers(1, 260)), max_size=5),
)
def test_scales_follow_the_paper_under_any_overflows(num_replicas, start, stretches):
    params = parameters()
    scaler = scaler_of(params, num_replicas=num_replicas)
    scaler.load_state_dict({"exponents": [start] * 3, "cooldown": [0] * 3})
    references = [ResblockScaleReference(num_replicas) for _ in params]
    for reference in references:
        reference.scale = num_replicas * 2.0 ** (start / 1000)
    divided: list[list[int]] = [[], [], []]
    update = 0
    for overflowed, length in stretches:
        for _ in range(length):
            before = scaler.scales.clone()
            one_update(scaler, params, overflowed)
            fell = scaler.scales < before
            assert bool(scaler.lowered) == bool(fell.any())
            for i, reference in enumerate(references):
                reference.update(i not in overflowed)
                if fell[i]:
                    assert i in overflowed
                    divided[i].append(update)
            update += 1
        torch.testing.assert_close(
            scaler.scales.double(), torch.tensor([r.scale for r in references], dtype=torch.float64), rtol=1e-6, atol=0
        )
    assert ((num_replicas * 2.0**7 <= scaler.scales) & (scaler.scales <= num_replicas * 2.0**24)).all()
    for updates in divided:
        assert all(b - a >= 125 for a, b in itertools.pairwise(updates))


def test_the_published_constants():
    params = parameters(2)
    scaler = scaler_of(params, num_replicas=1024)
    assert scaler.scales.tolist() == [1024 * 2.0**13] * 2
    one_update(scaler, params, {1})
    assert scaler.scales.tolist() == pytest.approx([2 ** (23 + 1 / 1000), 2**23 / math.sqrt(2)], rel=1e-7)
    for _ in range(124):  # within 125 updates of the division
        one_update(scaler, params, {1})
    assert scaler.scales[1].item() == pytest.approx(2**23 / math.sqrt(2), rel=1e-7)
    one_update(scaler, params, {1})
    assert scaler.scales.tolist() == pytest.approx([2 ** (23 + 126 / 1000), 2**22], rel=1e-7)
    scaler.load_state_dict({"exponents": [24000, 7000], "cooldown": [0, 0]})
    one_update(scaler, params, {1})
    assert scaler.scales.tolist() == [1024 * 2.0**24, 1024 * 2.0**7]


def test_state_is_exact_and_knows_no_world_size():
    params = parameters()
    scaler = scaler_of(params)
    for i in range(200):
        one_update(scaler, params, {i % 5})
    state = scaler.state_dict()
    again, wider = scaler_of(params), scaler_of(params, num_replicas=4)
    for other in (again, wider):
        other.load_state_dict(state)
        assert other.state_dict() == state
    assert torch.equal(again.scales, scaler.scales)
    assert torch.equal(wider.scales, scaler.scales * 4)
    one_update(scaler, params, {0, 1, 2})
    one_update(again, params, {0, 1, 2})
    assert again.state_dict() == scaler.state_dict()
    with pytest.raises(ValueError, match="state: expected 2 values in 'exponents', got 3"):
        scaler_of(parameters(2)).load_state_dict(state)


def test_gradients_are_unscaled_and_what_is_not_finite_is_found_per_resblock():
    params = parameters(4)
    shared = []
    scaler = scaler_of(params, reduce_flags=lambda flags: shared.append(flags.clone()))
    scaler.load_state_dict({"exponents": [8000, 9000, 10000, 11000], "cooldown": [0] * 4})
    params[0].grad = torch.tensor([2.0**8, 2.0**9])
    params[1].grad = torch.tensor([float("nan"), 1.0])
    params[2].grad = torch.tensor([1.0, -float("inf")])
    scaler.unscale_()  # resblock 3 has no gradient
    torch.testing.assert_close(params[0].grad, torch.tensor([1.0, 2.0]))
    assert scaler.flags.tolist() == shared[0].tolist() == [0, 1, 1, 0]
    assert scaler.found_inf == 1
    params[1].grad = params[2].grad = None
    scaler.unscale_()
    assert scaler.found_inf == 0


def test_nothing_is_read_back_to_the_host():
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(4, 4, device="cuda")) for _ in range(2)]
        scaler = scaler_of(params)
        for p in params:
            p.grad = torch.empty_like(p)
        scaler.unscale_()
        scaler.update()
        for name in ("scales", "inverse_scales", "flags", "exponents", "lowered", "found_inf"):
            assert getattr(scaler, name).is_cuda, name


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="resblocks: expected at least one"):
        ResblockGradScaler([])
    with pytest.raises(ValueError, match="num_replicas: expected at least 1, got 0"):
        scaler_of(parameters(), num_replicas=0)
    with pytest.raises(ValueError, match=r"scales: expected float32 \[6\], got torch.float32 \[5\]"):
        DALLE(TINY).set_gradient_scales(torch.ones(5))


# ---- the float16 branch


def make(**changes) -> DALLE:
    torch.manual_seed(0)
    return DALLE(TINY)


def data(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(300, (batch, 10), generator=generator), torch.randint(16, (batch, 64), generator=generator)


def gradients(model: DALLE, scaler: ResblockGradScaler | None = None) -> list[torch.Tensor]:
    model.zero_grad()
    if scaler is not None:
        model.set_gradient_scales(scaler.scales)
    model.loss(*data()).loss.backward()
    if scaler is not None:
        scaler.unscale_()
        assert scaler.found_inf == 0
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_are_those_of_float32():
    model = make()
    expected = gradients(model)
    actual = gradients(model, ResblockGradScaler(model.resblock_parameters()))
    for (name, p), a, b in zip(model.named_parameters(), expected, actual, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() <= 2e-3 * a.norm(), name  # some roundings to 11 bits
        assert p.dtype == torch.float32


def test_checkpointing_recomputes_the_same_gradients():
    model = make()
    expected = gradients(model, ResblockGradScaler(model.resblock_parameters()))
    model.set_checkpointing(True)
    actual = gradients(model, ResblockGradScaler(model.resblock_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_compiles_as_one_graph(checkpointing):
    torch._dynamo.reset()
    block = make().blocks[0]
    block.gradient_scales, block.checkpointing = torch.tensor([2.0**10, 2.0**12]), checkpointing
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for function in (block, compiled):
        for factor in (1.0, 4.0):  # scales are read at each call
            block.zero_grad()
            block.gradient_scales.mul_(factor)
            x = data_of_width(32).requires_grad_()
            y = function(x)
            y.backward(torch.full_like(y, 1e-3))
            results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        block.gradient_scales.div_(4.0)
    for expected, actual in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def data_of_width(width: int) -> torch.Tensor:
    return torch.randn(2, 74, width, generator=torch.Generator().manual_seed(2))


def test_dtypes_are_those_of_figure_four():
    seen = {}

    def norm(x):
        seen["norm"] = x.dtype
        x.register_hook(lambda g: seen.update(norm_gradient=g.dtype))
        return F.layer_norm(x, x.shape[-1:])

    def branch(h):
        seen["branch"] = h.dtype
        y = h * 2
        y.register_hook(lambda g: seen.update(branch_gradient=g.dtype, g=g))
        return y

    x = torch.randn(4, 8, requires_grad=True)
    y = scaled_branch(x, norm, branch, torch.tensor(8.0))
    y.backward(torch.full_like(y, 0.5))
    assert y.dtype == x.grad.dtype == torch.float32
    assert (seen["norm"], seen["norm_gradient"]) == (torch.float32, torch.float32)
    assert (seen["branch"], seen["branch_gradient"]) == (torch.float16, torch.float16)
    assert (seen["g"] == 4.0).all()


def test_an_overflow_stays_in_its_resblock():
    model = make()
    scaler = ResblockGradScaler(model.resblock_parameters())
    scales = scaler.scales.clone()
    scales[3] = 2.0**40  # its scaled gradients are beyond 65504
    model.set_gradient_scales(scales)
    model.loss(*data()).loss.backward()
    scaler.unscale_()
    assert scaler.flags.tolist() == [0, 0, 0, 1, 0, 0]
    embeddings = (model.text_embedding.weight, model.image_embedding.weight, model.pad, model.start_of_image)
    assert all(p.grad.isfinite().all() for p in embeddings)
    # a gradient that is not finite from the start is filtered on the way into every branch
    scaler.flags.zero_()
    model.zero_grad()
    model.set_gradient_scales(scaler.scales)
    (model.loss(*data()).loss * float("nan")).backward()
    scaler.unscale_()
    assert scaler.found_inf == 0
    assert model.start_of_image.grad.isnan().all()


def test_products_round_once_and_have_the_range_of_float16():
    layer = Linear(64, 8)
    x = torch.randn(3, 5, 64).half().requires_grad_()
    y = layer(x)
    exact = F.linear(x.double(), layer.weight.half().double(), layer.bias.half().double())
    assert y.dtype == torch.float16
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-11 + 2.0**-24).all()
    dout = torch.full_like(y, 60000.0)
    y.backward(dout)
    assert layer.weight.grad.isinf().any()  # sums of 15 such rows are beyond float16
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 15 * 60000.0).float(), rtol=1e-3, atol=0)  # float32
    x.grad = None
    torch.nn.init.constant_(layer.weight, 0.01)
    layer(x).backward(torch.full_like(y, 2.0**-24))
    assert x.grad.dtype == torch.float16
    assert not x.grad.any()  # 8 * 0.01 * 2^-24
    assert torch.equal(layer(x.float()), F.linear(x.float(), layer.weight, layer.bias))


# ---- sharded


def _sharded(group) -> tuple[dict[str, torch.Tensor], dict]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    rank = group.rank()
    model = make()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loss is divided by the global batch
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    scaler = ResblockGradScaler(
        model.resblock_parameters(), 2, lambda flags: dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    )
    model.set_gradient_scales(scaler.scales)
    text, image = (t[rank : rank + 1] for t in data())
    (model.loss(text, image).loss / 2).backward()
    scaler.unscale_()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert scaler.found_inf == 0
    if rank == 1:  # one shard of one rank
        model.blocks[1].mlp_in.weight.grad.to_local()[0, 0] = float("inf")
    scaler.unscale_()
    scaler.update()
    return found, scaler.state_dict()


def test_sharded_parameters_share_their_flags(ranks):
    (gradients, state), (_, other) = ranks.run(_sharded, world=2)
    model = make()
    scaler = ResblockGradScaler(model.resblock_parameters(), 2)
    model.set_gradient_scales(scaler.scales)
    model.loss(*data()).loss.backward()
    scaler.unscale_()
    for name, p in model.named_parameters():
        # each rank rounds its own sum over tokens
        assert (p.grad - gradients[name]).norm() <= 1e-3 * p.grad.norm(), name
    assert state["exponents"] == other["exponents"] == [13001, 13001, 13001, 12500, 13001, 13001]


# ---- a network that no single scale can train


def test_no_single_scale_keeps_all_gradients():
    for k in range(25):
        overflowed, vanished = survey(2.0**k)
        assert overflowed or vanished, f"2^{k}"
        assert not overflowed or overflowed[0] <= 1
        assert not vanished or vanished[-1] == 2 * NUM_LAYERS - 1


def test_scales_for_each_resblock_train_to_the_loss_of_float32():
    full, _ = train("float32")
    scaled, skipped = train("resblock")
    assert full < 0.5  # of ln 8 = 2.08
    assert scaled == pytest.approx(full, abs=0.05)  # nats
    assert skipped <= NUM_UPDATES // 20


def test_one_scale_does_not():
    loss, skipped = train("2^8")  # nothing overflows, and the last layers see no gradient
    assert skipped == 0
    assert loss > math.log(VOCAB_SIZE)
    _, skipped = train("2^18", 20)  # matrices of the last layer have gradients
    assert skipped == 20
