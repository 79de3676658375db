# SPDX-License-Identifier: MIT
"""gumbel_softmax beyond the generic tests: the noise itself, shards, distribution, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_fast.ops import _backend, gumbel_softmax
from dalle_fast.ops.gumbel_softmax import op
from dalle_fast.ops.gumbel_softmax.reference import gumbel_noise, gumbel_softmax_reference
from dalle_fast.ops.philox import philox4x32


@pytest.fixture(params=["cpu", "executor"])
def kernels(request, monkeypatch):
    """The CPU kernels, then the CUDA kernels on the host executor."""
    if request.param == "executor":
        monkeypatch.setattr(op, "_C", pytest.importorskip("dalle_fast._C_simt"))


needs_extension = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


@needs_extension
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_scalar_generator_has_the_published_answers(counter, key, words):
    assert tuple(_backend._C.gumbel_softmax_philox(*counter, *key)) == words


@needs_extension
def test_the_scalar_generator_is_the_references_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    for words in torch.randint(0, 2**32, (200, 6), generator=generator).tolist():
        *counter, k0, k1 = words
        expected = philox4x32(torch.tensor(counter), (k0, k1)).tolist()
        assert list(_backend._C.gumbel_softmax_philox(*counter, k0, k1)) == expected


@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_the_noise_is_the_references(layout, kernels):
    """With tau = 1 and flat logits, y is softmax(noise): its log differs from the noise by a constant a row."""
    num_rows, num_codes = 40, 70
    logits = torch.zeros(num_codes, num_rows).t() if layout == "codes" else torch.zeros(num_rows, num_codes)
    dim = 1
    if layout == "codes":
        logits = torch.zeros(1, num_codes, num_rows)
    y = gumbel_softmax(logits, 1.0, dim=dim, seed=5, offset=9).double().log()
    y = y[0].t() if layout == "codes" else y
    noise = gumbel_noise(num_rows, num_codes, seed=5, offset=9)
    difference = y - noise
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=5e-5)


def test_the_largest_draw_is_finite_and_accurate(kernels):
    """u next to 1: float32 cannot hold it, so the kernel goes through 1 - u."""
    num_codes = 1 << 16
    y = gumbel_softmax(torch.zeros(8, num_codes), 1.0, seed=123)
    noise = gumbel_noise(8, num_codes, seed=123, offset=0)
    assert float(noise.max()) > 12
    torch.testing.assert_close(y.double(), noise.softmax(1), rtol=2e-4, atol=0)


def test_hard_is_the_argmax_of_soft(kernels):
    logits = torch.randn(4, 33, 5, 6)
    soft = gumbel_softmax(logits, 0.3, seed=2, offset=4)
    hard = gumbel_softmax(logits, 0.3, seed=2, offset=4, hard=True)
    assert hard.dtype == torch.int64
    assert torch.equal(soft.argmax(1), hard)


def test_a_shard_draws_what_the_batch_would(kernels):
    logits = torch.randn(6, 17, 4)
    whole = gumbel_softmax(logits, 0.5, seed=1, offset=2)
    half = gumbel_softmax(logits[3:], 0.5, seed=1, offset=2, row_offset=3 * 4)
    assert torch.equal(whole[3:], half)


def test_seeds_and_offsets_draw_other_noise():
    logits = torch.zeros(8, 32)
    draws = [gumbel_softmax(logits, 1.0, seed=s, offset=o) for s in (0, 1, 2**40) for o in (0, 1, 2**40)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.equal(a, b)


def test_hard_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 40_000
    hard = gumbel_softmax(logits.expand(count, 4), 1.0, seed=11, hard=True)
    found = torch.bincount(hard, minlength=4).double() / count
    expected = logits.double().softmax(0)
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5 * sigma).all()


def test_low_temperature_approaches_one_hot_and_rows_sum_to_one():
    y = gumbel_softmax(torch.randn(64, 50), 1e-3, seed=3)
    torch.testing.assert_close(y.sum(1), torch.ones(64), rtol=1e-5, atol=1e-5)
    assert (y.max(1).values > 0.99).float().mean() > 0.9


@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_a_sum_over_many_codes_keeps_its_accuracy(layout):
    """One float32 sum from the first code to the last would be off by some 2e-5."""
    y = gumbel_softmax(torch.randn(1, 8192, 70) if layout == "rows" else torch.randn(70, 8192), 0.9, seed=4)
    assert (y.double().sum(1) - 1).abs().max() < 4e-6


@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_nan_and_inf_act_as_in_torch(layout, kernels):
    logits = torch.randn(6, 20)
    logits[0, 7] = torch.nan
    logits[1, 3] = -torch.inf
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    logits[4, 2:9] = torch.nan
    if layout == "rows":
        logits = logits.t().contiguous()[None]  # [1, V, rows]
    y = gumbel_softmax(logits, 1.0, seed=1)
    hard = gumbel_softmax(logits, 1.0, seed=1, hard=True).flatten()
    torch.testing.assert_close(y, gumbel_softmax_reference(logits, 1.0, seed=1), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert torch.equal(hard, gumbel_softmax_reference(logits, 1.0, seed=1, hard=True).flatten())
    assert hard[[0, 2, 3, 4]].tolist() == [7, 5, 0, 2]


@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_the_paper_s_lowest_temperature(layout, kernels):
    """tau = 1/16 multiplies what the noise is off by 16; the rarest draws, g > 6, are off most."""
    logits = torch.randn(1, 500, 16) if layout == "rows" else torch.randn(16, 500)
    y = gumbel_softmax(logits, 1 / 16, seed=4)
    exact = gumbel_softmax_reference(logits.double(), 1 / 16, seed=4)
    torch.testing.assert_close(y.double(), exact, rtol=6e-5, atol=1e-7)


def test_a_softmax_that_falls_behind_its_shift(kernels):
    """Logits that rise along the codes: what was added up before has to be scaled down again and again."""
    logits = torch.arange(70.0)[None, :, None].expand(2, 70, 16) * 9
    y = gumbel_softmax(logits.contiguous(), 0.1, seed=4)
    torch.testing.assert_close(y.double(), gumbel_softmax_reference(logits.double(), 0.1, seed=4), rtol=1e-4, atol=1e-7)


# ---- with the KL


def arranged(logits: torch.Tensor, layout: str) -> torch.Tensor:
    """[rows, V] with dense codes, or [1, V, rows] with dense rows."""
    return logits if layout == "codes" else logits.t().contiguous()[None]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", op.DTYPES)
@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_the_kl_comes_beside_the_same_sample(layout, dtype, hard, kernels):
    logits = arranged(torch.randn(18, 70) * 3, layout).to(dtype)
    sample, kl = gumbel_softmax(logits, 0.5, seed=2, offset=4, hard=hard, return_kl=True)
    assert torch.equal(sample, gumbel_softmax(logits, 0.5, seed=2, offset=4, hard=hard))
    assert kl.dtype == torch.float32
    _, exact = gumbel_softmax_reference(logits.double(), 0.5, seed=2, offset=4, hard=hard, return_kl=True)
    torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("used", ["sample", "kl", "both"])
@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_gradients_of_either_result_and_of_both(layout, used, kernels):
    logits = arranged(torch.randn(18, 70) * 3, layout)
    dy, dkl = torch.randn(logits.shape), arranged(torch.randn(18, 1), layout).squeeze(1)

    def gradient(function, logits):
        x = logits.detach().requires_grad_()
        y, kl = function(x, 0.5, seed=2, return_kl=True)
        terms = {"sample": (y * dy).sum(), "kl": (kl * dkl).sum()}
        return torch.autograd.grad(sum(terms.values()) if used == "both" else terms[used], x)[0]

    exact = gradient(gumbel_softmax_reference, logits.double())
    torch.testing.assert_close(gradient(gumbel_softmax, logits).double(), exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_the_kl_of_extreme_logits(layout, hard, kernels):
    """Rows of +-1e4, impossible codes, equal logits, one sure code; NaN where softmax has it."""
    logits = torch.randn(9, 70)
    logits[0] *= 1e4
    logits[1] = torch.linspace(-1e4, 1e4, 70)
    logits[2] += 1e4
    logits[3, ::2] = -torch.inf
    logits[4] = -1e4
    logits[5, 3] = 1e4
    logits[6, 7] = torch.nan
    logits[7, 5] = torch.inf
    logits[8] = -torch.inf
    logits = arranged(logits, layout).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    results = []
    for x, function in ((logits, gumbel_softmax), (exact, gumbel_softmax_reference)):
        _, kl = function(x, 1.0, seed=1, hard=hard, return_kl=True)
        results.append((kl, torch.autograd.grad(kl.sum(), x)[0]))
    (kl, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(kl.double(), expected, rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=2e-6, equal_nan=True)
    kl = kl.flatten().tolist()
    assert kl[4:6] == pytest.approx([0, math.log(70)], abs=1e-6)
    assert all(map(math.isnan, kl[6:]))


@pytest.mark.parametrize("layout", ["rows", "codes"])
def test_a_kl_over_many_codes_keeps_its_accuracy(layout):
    logits = arranged(torch.randn(70, 8192), layout)
    _, kl = gumbel_softmax(logits, 0.9, seed=4, return_kl=True)
    _, exact = gumbel_softmax_reference(logits.double(), 0.9, seed=4, return_kl=True)
    assert (kl - exact).abs().max() < 6e-6  # the sum of q ln q is 8.5


def test_a_kl_that_falls_behind_its_shift(kernels):
    """Logits that rise along the codes: what was added up before has to be scaled down again and again."""
    for step in (0.3, 9.0):
        logits = (torch.arange(70.0)[None, :, None].expand(2, 70, 16) * step).contiguous()
        _, kl = gumbel_softmax(logits, 1.0, return_kl=True)
        _, exact = gumbel_softmax_reference(logits.double(), 1.0, return_kl=True)
        torch.testing.assert_close(kl.double(), exact, rtol=2e-6, atol=1e-6)


@needs_extension
@pytest.mark.parametrize("hard", [False, True])
def test_the_kl_compiles_as_one_graph(hard):
    def loss(logits):
        sample, kl = gumbel_softmax(logits, 0.5, seed=3, hard=hard, return_kl=True)
        return kl.mean() if hard else kl.mean() + sample.square().sum()

    logits = torch.randn(2, 13, 3, 5, requires_grad=True)
    expected = torch.autograd.grad(loss(logits), logits)[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits)[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau: expected a finite temperature > 0 .*, got 0.0"),
        ({"tau": 1e-40}, ValueError, "tau: expected a finite temperature > 0"),
        ({"tau": "1"}, TypeError, "tau: expected a number, got '1'"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got 1.5"),
        ({"tau": float("inf")}, ValueError, "tau"),
        ({"dim": 2}, ValueError, "dim: expected -2..1"),
        ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
        ({"offset": -(2**63) - 1}, ValueError, "offset: expected a 64-bit integer"),
        ({"row_offset": -1}, ValueError, "row_offset: expected"),
        ({"row_offset": 2**32}, ValueError, "row_offset: expected"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits: expected a floating"),
        ({"logits": torch.zeros(2, 0), "hard": True}, ValueError, "logits: expected at least one code"),
        ({"logits": torch.zeros(2, 0), "return_kl": True}, ValueError, "logits: expected at least one code"),
        ({"logits": torch.zeros(())}, ValueError, "logits: expected at least one dimension"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        gumbel_softmax(**{"logits": torch.zeros(2, 3), "tau": 1.0, **change})
