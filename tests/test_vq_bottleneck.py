# SPDX-License-Identifier: MIT
"""vq_bottleneck beyond the generic tests: its noise, KL, extremes, chunks, memory, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rooms import tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_fast.ops import _backend, gumbel_softmax, vq_bottleneck
from dalle_fast.ops.vq_bottleneck import op
from dalle_fast.ops.vq_bottleneck.reference import vq_bottleneck_reference

pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


def data(batch=3, channels=6, side=4, codes=37, width=5, *, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((batch, channels, side, side), (codes, channels, 1, 1), (codes,), (width, codes, 1, 1))
    x, weight, bias, codebook = (torch.randn(shape, generator=generator) for shape in shapes)
    weight *= scale
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias, codebook))


def composed(x, weight, bias, codebook, tau, seed=0, offset=0, row_offset=0):
    """As the dVAE would without the op."""
    logits = F.conv2d(x, weight, bias)
    y = gumbel_softmax(logits, tau, 1, seed, offset, row_offset=row_offset)
    log_q = F.log_softmax(logits, 1)
    return F.conv2d(y, codebook), (log_q.exp() * log_q).sum(1) + math.log(len(weight))


@pytest.mark.parametrize("tau", [1.0, 1 / 16])
def test_the_noise_is_that_of_gumbel_softmax(tau):
    inputs = data()
    out, kl = vq_bottleneck(*inputs, tau, seed=5, offset=2**40 + 1, row_offset=7)
    expected, expected_kl = composed(*inputs, tau, 5, 2**40 + 1, 7)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-5)
    upstream = [torch.randn_like(out), torch.randn_like(kl)]
    grads = torch.autograd.grad([out, kl], inputs, upstream)
    for actual, wanted in zip(grads, torch.autograd.grad([expected, expected_kl], inputs, upstream), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


def test_a_shard_draws_what_the_batch_would():
    x, *others = data()
    whole, _ = vq_bottleneck(x, *others, 0.5, seed=1)
    part, _ = vq_bottleneck(x[1:], *others, 0.5, seed=1, row_offset=16)
    assert torch.equal(whole[1:], part)


def test_kl_is_that_of_torch_distributions():
    x, weight, bias, codebook = data()
    _, kl = vq_bottleneck(x, weight, bias, codebook, 0.3)
    logits = F.conv2d(x, weight, bias).movedim(1, -1)
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(logits))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5)
    _, none = vq_bottleneck(x, torch.zeros_like(weight), None, codebook, 0.3)
    assert none.abs().max() < 1e-5


@pytest.mark.parametrize("tau", [1 / 16, 1e-3, 5.0])
def test_large_logits_and_any_temperature_stay_finite(tau):
    inputs = data(scale=300.0)
    out, kl = vq_bottleneck(*inputs, tau, seed=1)
    wide = [t.detach().double() for t in inputs]
    expected, expected_kl = vq_bottleneck_reference(*wide, tau, 1)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-4, atol=1e-4)
    if tau > 1e-2:  # below, the rounding of logits of 1000 decides
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.sum() + kl.sum(), inputs)
    assert all(g.isfinite().all() for g in grads)


def test_nan_and_inf_act_as_in_torch_softmax():
    x = torch.randn(4, 3)
    weight, codebook = torch.randn(20, 3), torch.randn(2, 20)
    bias = torch.zeros(20)
    x[0, 1] = torch.nan
    bias[6] = -torch.inf
    x.requires_grad_()
    codebook[:, 6] = 1e6  # would be seen with any weight
    out, kl = vq_bottleneck(x, weight, bias, codebook, 0.5, seed=1)
    assert out[0].isnan().all()
    assert kl[0].isnan()
    assert out[1:].abs().max() < 1e3
    q = F.softmax(F.linear(x, weight, bias), 1)[1:]
    torch.testing.assert_close(kl[1:], torch.special.xlogy(q, q).sum(1) + math.log(20), rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(out.sum() + kl.sum(), x)
    assert dx[0].isnan().all()
    assert dx[1:].isfinite().all()
    for wrong in (torch.full((20,), -torch.inf), F.one_hot(torch.tensor(3), 20) * torch.inf):
        out, kl = vq_bottleneck(x, weight, wrong, codebook, 0.5)
        assert out.isnan().all()
        assert kl.isnan().all()


def test_chunks_do_not_change_the_result(monkeypatch):
    inputs = data(batch=4, side=5)
    upstream = None
    results = []
    for rows in (100, 33, 1):
        monkeypatch.setattr(op, "chunk_rows", lambda *args, rows=rows, **kwargs: rows)
        outputs = vq_bottleneck(*inputs, 0.5, seed=2)
        upstream = upstream or [torch.randn_like(t) for t in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_result_does_not_depend_on_threads_at_the_sizes_of_the_demo():
    inputs = data(batch=8, channels=96, side=8, codes=256, width=32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = vq_bottleneck(*inputs, 0.5, seed=2)
            results.append([*outputs, *torch.autograd.grad([o.sum() for o in outputs], inputs)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that ops returned and that still exist, at their peak."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            self.alive[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("chunked", [False, True])
def test_memory_stays_far_below_the_logits(chunked, monkeypatch):
    """8 x 1024 cells x 8192 codes: the logits would be 268 MB. `chunked`: as on CUDA, without the kernels."""
    x, weight, bias, codebook = data(8, 16, 32, 8192, 16)
    if chunked:
        nothing = type("Nothing", (), {"__getattr__": lambda self, name: lambda *args: None})()
        monkeypatch.setattr(op, "_C", nothing)
        monkeypatch.setattr(op, "_is_whole", lambda x: False)
    with PeakMemory() as memory:
        out, kl = op.vq_bottleneck(x, weight[:, :, 0, 0], bias, codebook[:, :, 0, 0], None, 0.5, 0, 0, 0, x.dtype)[:2]
        (out.sum() + kl.sum()).backward()
    assert 1e6 < memory.peak < 268e6 / 4


def test_only_the_gradients_asked_for():
    x, weight, bias, codebook = data()
    out, kl = vq_bottleneck(x, weight.detach(), bias.detach(), codebook.detach(), 0.5)
    (dx,) = torch.autograd.grad(out.sum() + kl.sum(), x)
    out, kl = vq_bottleneck(x, weight, bias, codebook, 0.5)
    torch.testing.assert_close(dx, torch.autograd.grad(out.sum() + kl.sum(), x)[0])
    out, kl = vq_bottleneck(x.detach(), weight.detach(), bias.detach(), codebook, 0.5)
    out.sum().backward()
    assert x.grad is None
    assert codebook.grad.any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_order_of_memory_is_kept(memory_format):
    x, *others = data()
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    out, _ = vq_bottleneck(x, *others, 0.5)
    assert out.is_contiguous(memory_format=memory_format)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_rounds_operands_but_not_logits(backend):
    inputs = data()
    with torch.autocast("cpu", torch.bfloat16):
        out, kl = vq_bottleneck(*inputs, 0.5, backend=backend)
    assert (out.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_kl = vq_bottleneck(*inputs, 0.5)
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-2)
    if backend == "cpu":
        rounded = [t.bfloat16().float() for t in inputs[:2]] + [inputs[2]]
        torch.testing.assert_close(kl, vq_bottleneck(*rounded, inputs[3], 0.5)[1], rtol=1e-2, atol=2e-3)
    (out.sum() + kl.sum()).backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    assert exact_kl.dtype == torch.float32


def test_compiles_with_a_step_as_offset():
    torch._dynamo.reset()
    inputs = data()
    compiled = torch.compile(vq_bottleneck, fullgraph=True, backend="aot_eager")
    for step in (1, 2, 3):
        for actual, expected in zip(compiled(*inputs, 0.5, 1, step), vq_bottleneck(*inputs, 0.5, 1, step), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x: expected shape \[B, C, h, w\] or \[N, C\], got \[2, 3, 4\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x: expected a floating torch.Tensor"),
        ({"head_weight": torch.zeros(7, 4)}, ValueError, r"head_weight: expected shape \[V, 3\]"),
        ({"head_weight": torch.zeros(7, 3, 3, 3)}, ValueError, "head_weight: expected shape"),
        ({"head_weight": torch.zeros(0, 3)}, ValueError, "head_weight: expected at least one code"),
        ({"head_weight": torch.zeros(7, 3).double()}, TypeError, "head_weight: expected the dtype of x"),
        ({"head_bias": torch.zeros(6)}, ValueError, r"head_bias: expected shape \[7\], got \[6\]"),
        ({"codebook": torch.zeros(2, 6)}, ValueError, r"codebook: expected shape \[D, 7\]"),
        ({"codebook": None}, TypeError, "codebook: expected a floating torch.Tensor, got NoneType"),
        ({"codebook_bias": torch.zeros(3)}, ValueError, r"codebook_bias: expected shape \[2\]"),
        ({"tau": 0.0}, ValueError, "tau: expected a finite temperature > 0"),
        ({"tau": "1"}, TypeError, "tau: expected a number, got '1'"),
        ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
        ({"offset": 0.5}, TypeError, "offset: expected an int, got 0.5"),
        ({"row_offset": 2**32}, ValueError, r"row_offset: expected 0..2\^32 - 2 \(the rows of x\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "head_weight": torch.zeros(7, 3),
        "head_bias": None,
        "codebook": torch.zeros(2, 7),
        "tau": 1.0,
    }
    with pytest.raises(error, match=message):
        vq_bottleneck(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 3, 2), (0, 4, 3, 2)])
def test_sizes_of_zero_are_answered(shape):
    x, head, codebook = torch.randn(shape, requires_grad=True), torch.randn(7, shape[1]), torch.randn(5, 7)
    out, kl = vq_bottleneck(x, head, None, codebook, 0.5, seed=1, backend="cpu")
    expected, expected_kl = vq_bottleneck(x, head, None, codebook, 0.5, seed=1, backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kl, expected_kl)
    assert torch.autograd.grad(out.sum() + kl.sum(), x)[0].shape == shape
