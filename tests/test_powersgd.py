# SPDX-License-Identifier: MIT
"""What one PowerSGD update promises: error feedback, healing, clamps, equal results in both layouts."""

from __future__ import annotations

import importlib

import pytest
import torch

from dalle_fast.ops import (
    minifloat_decode,
    minifloat_encode,
    orthonormalize,
    powersgd_project,
    powersgd_reconstruct,
)

try:
    from dalle_fast import _C_simt
except ImportError:
    _C_simt = None
needs_executor = pytest.mark.skipif(_C_simt is None, reason="no host executor")

LARGEST = 15.984375


@pytest.fixture(autouse=True, params=["cpu", pytest.param("executor", marks=needs_executor)])
def kernels(request, monkeypatch):
    """All of this file on the CPU kernels and on the CUDA ones, on the host executor."""
    if request.param == "executor":
        monkeypatch.setattr(importlib.import_module("dalle_fast.ops.powersgd.op"), "_C", _C_simt)


def codes(x: torch.Tensor) -> torch.Tensor:
    return minifloat_encode(x, "1-6-9")


def values(code: torch.Tensor) -> torch.Tensor:
    return minifloat_decode(code, "1-6-9")


def test_full_rank_gives_the_gradient_back_and_leaves_no_error():
    grad = torch.randn(24, 40)
    error = codes(torch.zeros(24, 40))
    p, _ = powersgd_project(error, torch.randn(40, 24), grad, scale=0.25)
    basis = orthonormalize(p)
    q, status = powersgd_project(error.mT, basis)
    got = powersgd_reconstruct(basis, q, error)
    assert status.tolist() == [1, 1, 1]
    assert (got - grad).norm() < 5e-3 * grad.norm()  # rounding of the basis and of Q to 9 bits
    assert values(error).norm() < 5e-3 * grad.norm()


def test_what_is_not_sent_stays_in_the_error_buffer():
    grad = torch.randn(30, 50)
    error = codes(torch.zeros(30, 50))
    before = values(codes(grad))
    p, _ = powersgd_project(error, torch.randn(50, 4), grad, scale=0.25)
    basis = orthonormalize(p)
    q, _ = powersgd_project(error.mT, basis)
    sent = powersgd_reconstruct(basis, q, error)
    torch.testing.assert_close(sent + values(error), before, rtol=2e-3, atol=2e-3)
    assert sent.norm() < 0.9 * before.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_leaves_the_buffer_alone(bad):
    error = codes(torch.randn(70, 90))
    expected = error.clone()
    grad = torch.randn(70, 90)
    grad[69, 3] = bad
    code, status = powersgd_project(error, torch.ones(90, 2), grad, scale=0.01)
    assert status.tolist() == [0, 1, 1]
    assert torch.equal(error, expected)
    assert torch.equal(code, powersgd_project(expected, torch.ones(90, 2), scale=0.01).code)


def test_a_contaminated_buffer_and_an_overflow_are_told_apart():
    error = codes(torch.ones(5, 6))
    code, status = powersgd_project(error, torch.full((6, 2), 100.0))
    assert status.tolist() == [1, 1, 0]
    assert values(code).eq(LARGEST).all()
    code, status = powersgd_project(error, torch.full((6, 2), -100.0))
    assert values(code).eq(-LARGEST).all()
    _, status = powersgd_project(error, torch.zeros(6, 2), torch.full((5, 6), 1e6))
    assert status.tolist() == [1, 0, 0]  # the sum overflows the buffer; Inf times zero is NaN


def test_a_transposed_view_gives_the_same():
    error, grad = codes(torch.randn(33, 65)), torch.randn(33, 65)
    factor = torch.randn(65, 9)
    column_major = error.mT.contiguous().mT
    a = powersgd_project(error, factor, grad, scale=0.05)
    b = powersgd_project(column_major, factor, grad, scale=0.05)
    assert torch.equal(a.code, b.code)
    assert torch.equal(error, column_major)
    p, q = a.code, codes(torch.randn(65, 9))
    assert torch.equal(powersgd_reconstruct(p, q, error), powersgd_reconstruct(p, q, column_major))
    assert torch.equal(error, column_major)


@pytest.mark.parametrize("error_layout", ["none", "rows", "columns", "neither"])
@pytest.mark.parametrize("layout", ["rows", "columns", "misaligned rows", "misaligned columns", "neither"])
def test_a_gradient_is_written_where_it_is_wanted(layout, error_layout):
    def placed(x: torch.Tensor, how: str) -> torch.Tensor:
        return x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] if how == "neither" else laid(x, how)

    p, q = codes(torch.randn(33, 7)), codes(torch.randn(70, 7))
    start = codes(torch.randn(33, 70))
    error, expected = start.clone(), placed(torch.full((33, 70), torch.nan), layout)
    storage = expected.untyped_storage().nbytes()
    want = powersgd_reconstruct(p, q, error, grad_factor=0.5)
    mine = None if error_layout == "none" else placed(start, error_layout)
    assert powersgd_reconstruct(p, q, mine, grad_factor=0.5, out=expected) is expected
    assert torch.equal(expected, want)
    assert expected.untyped_storage().nbytes() == storage
    assert mine is None or torch.equal(mine, error)


def laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy with its rows or columns dense, and aligned or not."""
    x = x.mT if "columns" in layout else x
    pad = 3 if "misaligned" in layout else 0
    storage = x.new_zeros(x.shape[0], x.shape[1] + pad)
    view = storage[:, pad:]
    view.copy_(x)
    return view.mT if "columns" in layout else view


@pytest.mark.parametrize("layout", ["rows", "columns", "misaligned rows", "misaligned columns"])
@pytest.mark.parametrize(("m", "n", "r"), [(40, 136, 1), (136, 72, 7), (33, 70, 112), (16, 64, 130), (130, 65, 3)])
def test_numbers_of_all_sizes_within_float32(m, n, r, layout):
    start, factor = codes(torch.randn(m, n)), torch.randn(n, r)
    grad = torch.randn(m, n)
    error = laid(start, layout)
    code, status = powersgd_project(error, factor, laid(grad, layout), inverse_grad_scale=0.3, scale=0.05)
    added = (values(start) + grad * 0.3).double()
    assert status.tolist() == [1, 1, 1]
    e = values(error.contiguous()).double()
    torch.testing.assert_close(e, added, rtol=2**-10 * 1.01, atol=1e-12)
    exact, size = e @ factor.double() * 0.05, e.abs() @ factor.double().abs() * 0.05
    assert ((values(code) - exact).abs() <= 2**-10 * exact.abs() + 1e-6 * size).all()
    p, q = codes(torch.randn(m, r)), codes(torch.randn(n, r))
    got = powersgd_reconstruct(p, q, error, grad_factor=0.5, error_factor=0.25)
    product = values(p).double() @ values(q).double().mT
    size = values(p).double().abs() @ values(q).double().abs().mT
    assert ((got - 0.5 * product).abs() <= 1e-6 * size).all()
    left, bound = e - 0.25 * product, 2**-10 * 1.01
    finite = left.abs() < LARGEST
    gap = (values(error.contiguous()).double() - left).abs()
    assert (gap <= bound * left.abs() + 1e-6 * size)[finite].all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_float32_factor_is_not_cut_short(layout):
    # 1 + 2^-10 alone is a tie that goes down to 1
    factor = torch.full((24, 5), 1 + 2**-10 + 2**-19)
    code, _ = powersgd_project(laid(codes(torch.eye(24)), layout), factor)
    assert values(code).eq(1 + 2**-9).all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_the_buffer_stays_and_is_told(bad, layout):
    start = torch.randn(40, 72) / 8
    start[37, 70] = bad
    factor = torch.rand(72, 3) + 0.1  # with low parts of either sign
    for grad in (None, torch.randn(40, 72)):
        error = laid(codes(start), layout)
        code, status = powersgd_project(error, factor, grad, scale=0.1)
        assert status.tolist() == [1, 0, 0]
        x = values(error.contiguous())
        assert torch.equal(x.isfinite(), start.isfinite())
        torch.testing.assert_close(x[37, 70], torch.tensor(bad), equal_nan=True)
        expected = torch.full((3,), bad).clamp(-LARGEST, LARGEST)
        torch.testing.assert_close(values(code)[37], expected, equal_nan=True)
        assert values(code)[:37].isfinite().all()


def test_float64_and_float16_gradients_are_taken():
    grad = torch.randint(-4, 5, (8, 8)).float() / 8
    results = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        error = codes(torch.zeros(8, 8))
        results.append(powersgd_project(error, torch.eye(8), grad.to(dtype)).code)
    for result in results:
        assert torch.equal(values(result), grad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: powersgd_project(torch.zeros(3, 4), torch.zeros(4, 1)), TypeError, "error: expected a uint16"),
        (
            lambda: powersgd_project(codes(torch.zeros(3, 4)), torch.zeros(3, 1)),
            ValueError,
            r"factor: expected shape \[4, r\]",
        ),
        (lambda: powersgd_project(codes(torch.zeros(3, 4)), torch.zeros(4, 1).double()), TypeError, "factor: expected"),
        (
            lambda: powersgd_project(codes(torch.zeros(3, 4)), torch.zeros(4, 1), torch.zeros(4, 3)),
            ValueError,
            r"grad: expected shape \[3, 4\]",
        ),
        (
            lambda: powersgd_reconstruct(codes(torch.zeros(3, 2)), codes(torch.zeros(4, 3))),
            ValueError,
            r"q: expected shape \[n, 2\]",
        ),
        (
            lambda: powersgd_reconstruct(codes(torch.zeros(3, 2)), codes(torch.zeros(4, 2)), codes(torch.zeros(4, 3))),
            ValueError,
            r"error: expected shape \[3, 4\]",
        ),
        (
            lambda: powersgd_reconstruct(
                codes(torch.zeros(3, 2)), codes(torch.zeros(4, 2)), out=torch.zeros(3, 4).double()
            ),
            TypeError,
            "out: expected a float32",
        ),
        (
            lambda: powersgd_reconstruct(codes(torch.zeros(3, 2)), codes(torch.zeros(4, 2)), out=torch.zeros(4, 3)),
            ValueError,
            r"out: expected shape \[3, 4\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
