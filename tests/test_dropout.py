# SPDX-License-Identifier: MIT
"""dropout beyond the generic tests: the mask itself, parts of a batch, recomputation, statistics, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dalle_fast.ops import _backend, dropout
from dalle_fast.ops.dropout import op
from dalle_fast.ops.dropout.reference import dropout_reference, keep_mask
from dalle_fast.ops.philox import uniform, words

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAW = {"seed": 5, "offset": 9}


@pytest.fixture(params=["cpu", "executor"])
def kernels(request, monkeypatch):
    """The CPU kernels, then the CUDA kernels on the host executor."""
    if request.param == "executor":
        monkeypatch.setattr(op, "_C", pytest.importorskip("dalle_fast._C_simt"))


needs_extension = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-300, 2.0**-32, 0.1, 0.5, 0.9, 1 - 2.0**-53])
def test_the_mask_is_the_words(p, dtype, kernels):
    """Every element of ones is 0 or the rounded 1 / (1 - p), as its word says; beside it u = (word >> 8) / 2^24."""
    x = torch.ones(7, 3, 85, dtype=dtype)
    drawn = words(5, 9, 21, 85)
    keep = torch.tensor([w >= p * 2**32 for w in drawn.flatten().tolist()]).view(x.shape)
    assert torch.equal(keep_mask(x.shape, p, **DRAW), keep)
    assert torch.equal(dropout(x, p, **DRAW), torch.where(keep, torch.tensor(1 / (1 - p)), 0.0).to(dtype))
    clear = (uniform(5, 9, 21, 85) - p).abs() > 2.0**-24
    assert torch.equal((uniform(5, 9, 21, 85) > p)[clear], keep.view(21, 85)[clear])


def test_a_word_at_the_threshold_is_kept(kernels):
    """p * 2^32 may be any of the words, and just beside it."""
    word = int(words(5, 9, 1, 8)[0, 6])
    for p, kept in ((word / 2**32, True), (math.nextafter(word / 2**32, 1), False), ((word + 1) / 2**32, False)):
        assert bool(dropout(torch.ones(8), p, **DRAW)[6] != 0) == kept
        assert bool(keep_mask(torch.Size([8]), p, **DRAW)[6]) == kept


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_levels_and_the_cuda_kernel_give_the_same_bits(dtype, monkeypatch):
    x = torch.randn(9, 4133).to(dtype)
    x[:, ::97] = torch.tensor([torch.inf, -torch.inf, -0.0], dtype=dtype).repeat(15)[: x[:, ::97].shape[1]]
    expected = dropout(x, 0.3, **DRAW).view(torch.uint8)
    try:
        for level in (0, 3, 4):
            _backend._C.set_cpu_level(level)
            assert torch.equal(dropout(x, 0.3, **DRAW).view(torch.uint8), expected)
    finally:
        _backend._C.set_cpu_level(_backend._C.best_cpu_level())
    monkeypatch.setattr(op, "_C", pytest.importorskip("dalle_fast._C_simt"))
    assert torch.equal(dropout(x, 0.3, **DRAW).view(torch.uint8), expected)


def test_a_part_of_a_batch_drops_what_the_batch_would(kernels):
    x = torch.randn(6, 5, 33)
    whole = dropout(x, 0.4, **DRAW)
    for first in range(6):
        assert torch.equal(whole[first:], dropout(x[first:], 0.4, **DRAW, row_offset=5 * first))
    assert torch.equal(whole[..., :9], dropout(x[..., :9], 0.4, **DRAW))  # columns that follow do not count
    assert torch.equal(whole, dropout(x.view(30, 33), 0.4, **DRAW).view(x.shape))


def test_a_forward_pass_that_is_computed_again_drops_the_same(kernels):
    weight = torch.randn(40, 40)
    x = torch.randn(3, 40, requires_grad=True)

    def block(x):
        return dropout((x @ weight).relu(), 0.5, **DRAW).square()

    plain, again = (f(x) for f in (block, lambda x: checkpoint(block, x, use_reentrant=False)))
    assert torch.equal(plain, again)
    (expected,), (actual,) = (torch.autograd.grad(out.sum(), x) for out in (plain, again))
    assert torch.equal(actual, expected)


def test_nothing_is_saved_for_the_backward_pass():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = dropout(torch.randn(4, 8, requires_grad=True), 0.5, **DRAW)
    out.sum().backward()
    assert saved == []


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_derivatives_of_any_order_have_the_mask(p, kernels):
    x = torch.randn(5, 21, requires_grad=True)
    mask = keep_mask(x.shape, p, **DRAW) / (1 - p)
    (first,) = torch.autograd.grad(dropout(x, p, **DRAW).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 3 * mask.pow(3) * x.square())
    torch.testing.assert_close(second, 6 * mask.pow(3) * x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_p_of_zero_copies(dtype):
    x = torch.randn(3, 7).to(dtype).t()
    out = dropout(x, 0.0, **DRAW)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert out.is_contiguous()


def test_a_dropped_element_is_zero_whatever_it_was(kernels):
    for value in (torch.nan, torch.inf):
        out = dropout(torch.full((4, 70), value), 0.5, **DRAW)
        keep = keep_mask(out.shape, 0.5, **DRAW)
        assert (out[~keep] == 0).all()
        assert torch.equal(out[keep].isnan(), torch.full_like(out[keep], value).isnan())


def test_autocast_changes_nothing():
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dropout(x, 0.5, **DRAW), dropout_reference(x, 0.5, **DRAW))


@needs_extension
def test_compiles_with_a_step_as_offset():
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 40, requires_grad=True)
    for step in (3, 4, 5, 2**40):
        ours, eager = (f(x, 0.5, seed=1, offset=step) for f in (compiled, dropout))
        assert torch.equal(ours, eager)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (ours, eager)))


# ---- statistics: 2^20 draws each, 5 standard errors


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate(p):
    keep = dropout(torch.ones(1024, 1024), p, seed=3, offset=1) != 0
    assert abs(float(keep.double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / keep.numel())
    for dim in (0, 1):  # of the 1024 columns and rows: their variance is that of a binomial
        share = keep.double().mean(dim).var() / (p * (1 - p) / 1024)
        assert abs(float(share) - 1) < 5 * math.sqrt(2 / 1023)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p):
    def centred(seed=3, offset=1):
        keep = dropout(torch.ones(1024, 1024), p, seed=seed, offset=offset) != 0
        return (keep.double() - (1 - p)) / math.sqrt(p * (1 - p))

    a = centred()
    pairs = {f"columns {d} apart": (a[:, d:], a[:, :-d]) for d in (1, 2, 3, 4, 16, 64)}
    pairs |= {f"rows {d} apart": (a[d:], a[:-d]) for d in (1, 2, 4, 64)}
    pairs |= {f"offset + {d}": (a, centred(offset=1 + d)) for d in (1, 2, 2**32)}
    pairs |= {f"seed + {d}": (a, centred(seed=3 + d)) for d in (1, 2, 2**32)}
    pairs["transposed"] = (a.tril(-1), a.t().tril(-1))
    for name, (x, y) in pairs.items():
        count = 1023 * 512 if name == "transposed" else x.numel()
        assert abs(float((x * y).sum())) < 5 * math.sqrt(count), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 1.0}, ValueError, "p: expected 0 <= p < 1, got 1.0"),
        ({"p": -0.1}, ValueError, "p: expected 0 <= p < 1, got -0.1"),
        ({"p": math.nan}, ValueError, "p: expected 0 <= p < 1, got nan"),
        ({"p": "half"}, TypeError, "p: expected a number, got 'half'"),
        ({"p": torch.tensor(0.5)}, TypeError, "p: expected a number, got tensor"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got 1.5"),
        ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
        ({"offset": -(2**63) - 1}, ValueError, "offset: expected a 64-bit integer"),
        ({"row_offset": -1}, ValueError, r"row_offset: expected 0\.\.2\^32 - 2 \(the rows of x\), got -1"),
        ({"row_offset": 2**32 - 1}, ValueError, "row_offset: expected"),
        (
            {"x": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "x: expected a floating torch.Tensor, got torch.int64",
        ),
        ({"x": [1.0]}, TypeError, "x: expected a floating torch.Tensor, got list"),
        ({"x": torch.zeros(())}, ValueError, "x: expected at least one dimension"),
        ({"x": torch.zeros(1).expand(2, 2**34 + 1)}, ValueError, r"x: expected at most 2\^34 columns"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        dropout(**{"x": torch.zeros(2, 3), "p": 0.5, **DRAW, **change})
