# SPDX-License-Identifier: MIT
"""What the generic tests cannot say of linear_cross_entropy: targets, empty batches, autocast, messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle_fast.ops import _backend, linear_cross_entropy
from dalle_fast.ops.linear_cross_entropy import op


@pytest.fixture
def executor(monkeypatch):
    """The CUDA kernels on CPU tensors."""
    monkeypatch.setattr(op, "_C", pytest.importorskip("dalle_fast._C_simt"))


pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


def data(num_rows=13, width=8, num_codes=21):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(num_codes, width, generator=generator, requires_grad=True)
    return x, weight, torch.randint(num_codes, (num_rows,), generator=generator)


@pytest.mark.parametrize("wrong", [-1, 21, 2**40])
def test_a_target_out_of_range_is_named(wrong):
    x, weight, target = data()
    target[3] = wrong
    with pytest.raises(IndexError, match=rf"^target: expected values in \[0, 21\) .*got {wrong} in row 3"):
        linear_cross_entropy(x, weight, target, backend="cpu")


@pytest.mark.parametrize("wrong", [-1, 21, 2**40, -(2**40)])
def test_on_cuda_a_target_out_of_range_makes_loss_and_gradients_nan(wrong, executor):
    x, weight, target = data()
    target[3] = wrong
    loss = linear_cross_entropy(x, weight, target, backend="cpu")
    loss.backward()
    assert loss.isnan()
    assert x.grad[3].isnan().all()
    assert x.grad[torch.arange(13) != 3].isfinite().all()
    assert weight.grad.isnan().all()


def test_on_cuda_float16_gradients_do_not_underflow(executor):
    """4096 rows of nearly certain predictions: dlogits below 6e-8 / 2, the least float16 knows."""
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(*s, generator=generator).half() / 4 for s in ((4096, 8), (21, 8)))
    target = (x.float() @ weight.float().t()).argmax(1)
    x, weight = (x * 8).requires_grad_(), (weight * 8).requires_grad_()
    linear_cross_entropy(x, weight, target, backend="cpu").backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    F.cross_entropy(exact_x @ exact_weight.t(), target).backward()
    for actual, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 2e-3, error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_act_as_in_torch(value, executor):
    x, weight, target = data()
    bias = torch.zeros(21)
    bias[4] = value
    target[:] = 3
    actual = linear_cross_entropy(x, weight, target, bias, backend="cpu")
    torch.testing.assert_close(actual, F.cross_entropy(F.linear(x, weight, bias), target), equal_nan=True)


def test_another_ignore_index():
    x, weight, target = data()
    target[::2] = 7
    actual = linear_cross_entropy(x, weight, target, ignore_index=7, backend="cpu")
    torch.testing.assert_close(actual, F.cross_entropy(x @ weight.t(), target, ignore_index=7))


def test_no_target_counts():
    x, weight, target = data()
    loss = linear_cross_entropy(x, weight, torch.full_like(target, -100), backend="cpu")
    assert loss.isnan()
    loss.backward()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_no_rows():
    x, weight, target = data(num_rows=0)
    loss = linear_cross_entropy(x, weight, target, backend="cpu")
    assert loss.isnan()
    loss.backward()
    assert not weight.grad.any()


def test_only_the_gradients_asked_for():
    x, weight, target = data()
    linear_cross_entropy(x, weight.detach(), target, backend="cpu").backward()
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.t(), target), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_chunks_do_not_change_the_loss():
    x, weight, target = data(num_rows=50)
    whole = linear_cross_entropy(x, weight, target, backend="cpu")
    parts = linear_cross_entropy(x, weight, target, chunk_rows=7, backend="cpu")
    torch.testing.assert_close(parts, whole)


def test_autocast_computes_products_in_bfloat16_and_the_loss_in_float32():
    x, weight, target = data()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, backend="cpu")
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(x @ weight.t(), target)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    assert loss != exact
    loss.backward()
    assert x.grad.dtype == torch.float32


def test_huge_logits_stay_finite():
    x, weight, target = data()
    actual = linear_cross_entropy(x * 1e4, weight, target, backend="cpu")
    torch.testing.assert_close(actual, F.cross_entropy(x * 1e4 @ weight.t(), target))


def test_wrong_arguments_are_named():
    x, weight, target = data()
    with pytest.raises(ValueError, match=r"^weight: expected shape \[V, 8\]"):
        linear_cross_entropy(x, weight[:, :5], target)
    with pytest.raises(ValueError, match=r"^target: expected shape \[13\]"):
        linear_cross_entropy(x, weight, target[:4])
    with pytest.raises(TypeError, match=r"^target: expected an int64"):
        linear_cross_entropy(x, weight, target.int())
    with pytest.raises(TypeError, match=r"^weight: expected the dtype of x"):
        linear_cross_entropy(x, weight.bfloat16(), target)
    with pytest.raises(ValueError, match=r"^chunk_rows: expected at least 1"):
        linear_cross_entropy(x, weight, target, chunk_rows=0)


@pytest.mark.parametrize("weight", [0.875, 0.3, 0.0])
@pytest.mark.parametrize("expected", [True, False])
def test_an_expected_upstream_gradient_changes_no_gradient(weight, expected):
    args = [torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)]
    target = torch.randint(9, (6,))
    loss = linear_cross_entropy(*args, target, upstream=weight if expected else 2.0, backend="cpu")
    actual = torch.autograd.grad(weight * loss, args)
    reference = torch.autograd.grad(weight * F.cross_entropy(args[0] @ args[1].t(), target), args)
    for a, r in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, r)
    with pytest.raises(ValueError, match="upstream: expected a finite number, got nan"):
        linear_cross_entropy(*args, target, upstream=float("nan"))


@pytest.mark.parametrize("chunk", [None, 550])
def test_float32_products_in_parts_are_right_and_the_same_bits_at_any_number_of_threads(chunk):
    """Sums over rows and codes long enough for several parts, and products large enough for threads."""
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((600, 70), (1050, 70)))
    bias, target = torch.randn(1050, generator=generator), torch.randint(1050, (600,), generator=generator)

    def run(*leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        options = {"chunk_rows": chunk, "backend": "cpu"} if leaves[0].dtype == torch.float32 else {}
        loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(run(x, weight, bias))
    torch.set_num_threads(threads)
    for first, *others, exact in zip(*results, run(x.double(), weight.double(), bias.double())):
        assert all(torch.equal(first, other) for other in others)
        torch.testing.assert_close(first.double(), exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_channels_leave_the_bias_alone(backend):
    target = torch.zeros(4, dtype=torch.int64)
    loss = linear_cross_entropy(torch.randn(4, 0), torch.randn(5, 0), target, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
