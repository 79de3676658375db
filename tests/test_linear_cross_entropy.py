# SPDX-License-Identifier: MIT
"""What the generic tests cannot say of linear_cross_entropy: targets, empty batches, autocast, messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle_fast.ops import _backend, linear_cross_entropy

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
