# SPDX-License-Identifier: MIT
"""What QR promises beyond the values of one decomposition: any condition number, any scale, lists, codes."""

from __future__ import annotations

import pytest
import torch

from dalle_fast.ops import minifloat_decode, minifloat_encode, orthonormalize


def conditioned(m: int, r: int, condition: float) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    return (u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)) @ v


def loss_of_orthogonality(q: torch.Tensor) -> float:
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1])).norm())


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e7, 1e30])
@pytest.mark.parametrize(("m", "r"), [(496, 112), (300, 7), (65, 64)])
def test_the_columns_are_orthonormal_and_span_p(m, r, condition):
    p = conditioned(m, r, condition)
    q = orthonormalize(p.float(), eps=0.0)
    assert loss_of_orthogonality(q) < 1e-5
    rest = p - q.double() @ (q.double().mT @ p)
    assert rest.norm() < 1e-5 * p.norm()


def test_a_matrix_without_full_rank_still_gets_a_basis():
    p = torch.randn(90, 3) @ torch.randn(3, 40)
    p[:, 17] = 0
    q = orthonormalize(p)
    assert loss_of_orthogonality(q) < 1e-5
    assert (p - q @ (q.T @ p)).norm() < 1e-4 * p.norm()
    assert loss_of_orthogonality(orthonormalize(torch.zeros(50, 20))) == 0.0


def test_a_power_of_two_changes_nothing():
    p = torch.randn(64, 30)
    q = orthonormalize(p, eps=0.0)
    for scale in (2.0**-90, 2.0**90):
        assert torch.equal(orthonormalize(p * scale, eps=0.0), q)


def test_codes_are_decoded_and_encoded():
    code = minifloat_encode(torch.randn(4, 96, 24), "1-6-9")
    q = orthonormalize(code, eps=1e-6)
    assert q.dtype == torch.uint16
    exact = orthonormalize(minifloat_decode(code, "1-6-9").double())
    assert (minifloat_decode(q, "1-6-9") - exact).abs().max() < 2.0**-10  # half a step below 1, and rounding
    strided = code.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(orthonormalize(strided), q)


def test_a_list_of_shapes_in_one_call():
    ps = [torch.randn(33, 9), torch.randn(2, 50, 17), torch.randn(16, 16)]
    qs = orthonormalize(ps)
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(q, orthonormalize(p))
    assert orthonormalize([]) == []


@pytest.mark.parametrize("shape", [(48, 48), (50, 37), (300, 70), (5, 1)])
@pytest.mark.parametrize("column", [0, -1])
def test_one_number_that_is_not_finite_leaves_nothing(shape, column):
    for value in (torch.nan, torch.inf):
        p = torch.randn(shape)
        p[-1, column] = value
        assert orthonormalize(p).isnan().all()
        codes = minifloat_encode(p, "1-6-9")
        assert minifloat_decode(orthonormalize(codes), "1-6-9").isnan().all()


def test_a_matrix_of_a_batch_does_not_see_another():
    p = torch.randn(3, 40, 10)
    alone = orthonormalize(p[2])
    p[0, 3, 3] = torch.nan
    p[1, 7, 2] = torch.inf
    q = orthonormalize(p)
    assert q[0].isnan().all()
    assert q[1].isnan().all()
    assert torch.equal(q[2], alone)


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"p: expected shape \[m, r\] or \[N, m, r\] with m >= r, got \[3, 4\]"),
        (torch.zeros(5), ValueError, "p: expected shape"),
        (torch.zeros(5, 2, dtype=torch.int64), TypeError, "p: expected a float32, float64 or uint16"),
        (3, TypeError, "p: expected a torch.Tensor or a sequence of them, got 3"),
        ([torch.zeros(5, 2), torch.zeros(5, 2).double()], ValueError, r"p\[1\]: expected torch.float32 on cpu"),
    ],
)
def test_bad_input(p, error, message):
    with pytest.raises(error, match=message):
        orthonormalize(p)


def test_eps_must_be_finite():
    with pytest.raises(ValueError, match="eps: expected a finite number"):
        orthonormalize(torch.zeros(3, 2), eps=float("nan"))


def test_dependent_columns_have_a_basis_without_eps():
    """What they leave of each other shrinks with each reflection until its squares vanish: found by `make fuzz`."""
    generator = torch.Generator().manual_seed(0)
    for p in (
        torch.randn(6, 1, generator=generator).expand(6, 5),
        torch.randn(1, 15, generator=generator).expand(16, 15),
    ):
        q = orthonormalize(p, eps=0.0).double()
        torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64), rtol=0, atol=2e-6)
        torch.testing.assert_close(q @ (q.T @ p.double()), p.double(), rtol=0, atol=1e-5)
