# SPDX-License-Identifier: MIT
"""sparse_attention beyond the generic tests: the pattern header, causality, packed views, bad input."""

from __future__ import annotations

import pytest
import torch

from dalle_fast.ops import AttentionPattern, _backend, sparse_attention
from dalle_fast.ops.sparse_attention.reference import sparse_attention_reference

pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")

KINDS = ["row", "column", "conv", "dense"]


def kernel_mask(pattern, length):
    from dalle_fast.ops.sparse_attention.op import kernel_mask

    return kernel_mask(pattern.integers(), length)


@pytest.mark.parametrize(
    ("kind", "pairs"), [("row", 328_304), ("column", 311_936), ("conv", 352_209), ("dense", 819_840)]
)
def test_the_header_has_the_papers_pair_counts(kind, pairs):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    assert int(kernel_mask(pattern, pattern.length).sum()) == pairs


def test_the_header_is_the_mask_for_random_patterns():
    generator = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for trial in range(150):
        kind = KINDS[trial % 4]
        extent = draw(1, 20) if kind == "row" and trial % 3 else None
        pattern = AttentionPattern(
            kind,
            text_len=draw(0, 9),
            grid=(draw(1, 9), draw(1, 9)),
            extent=extent,
            kernel=2 * draw(0, 6) + 1,
            wraparound=bool(draw(0, 1)),
        )
        length = draw(0, pattern.length)
        assert torch.equal(kernel_mask(pattern, length), pattern.mask(length)), pattern


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_what_comes_later_or_lies_outside_its_pattern(kind):
    pattern = AttentionPattern(kind, text_len=5, grid=(4, 3), kernel=3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, pattern.length, 8, generator=generator) for _ in range(3))
    base = sparse_attention(q, k, v, pattern, backend="cpu")
    mask = pattern.mask()
    for key in range(pattern.length):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, key] += 3
        v2[:, :, key] -= 2
        changed = (sparse_attention(q, k2, v2, pattern, backend="cpu") != base).any(-1).any(1)[0]
        assert torch.equal(changed, mask[:, key]), f"key {key}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wraparound", [True, False])
def test_random_patterns_forward_and_backward(kind, wraparound):
    generator = torch.Generator().manual_seed(11)
    for trial in range(12):
        height, width, text_len = (int(torch.randint(1, 12, (1,), generator=generator)) for _ in range(3))
        pattern = AttentionPattern(kind, text_len * 4, (height, width), kernel=5, wraparound=wraparound)
        length = pattern.length - int(torch.randint(0, height * width, (1,), generator=generator))
        inputs = [torch.randn(2, 2, length, 12, generator=generator, requires_grad=True) for _ in range(3)]
        out = sparse_attention(*inputs, pattern, backend="cpu")
        wide = [t.detach().double().requires_grad_() for t in inputs]
        expected = sparse_attention_reference(*wide, pattern)
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=5e-6)
        upstream = torch.randn(out.shape, generator=generator)
        actual = torch.autograd.grad(out, inputs, upstream)
        wanted = torch.autograd.grad(expected, wide, upstream.double())
        for a, e in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=3e-5, msg=f"{pattern} trial {trial}")


def test_views_of_a_packed_projection_are_read_in_place():
    pattern = AttentionPattern("row", text_len=6, grid=(3, 3))
    packed = torch.randn(2, pattern.length, 3, 2, 16)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    assert not q.is_contiguous()
    expected = sparse_attention(*(t.contiguous() for t in (q, k, v)), pattern)
    assert torch.equal(sparse_attention(q, k, v, pattern), expected)


def test_large_scores_do_not_overflow():
    pattern = AttentionPattern("dense", text_len=2, grid=(2, 2))
    q = torch.full((1, 1, 6, 4), 1e4)
    v = torch.randn(1, 1, 6, 4)
    out = sparse_attention(q, q, v, pattern, backend="cpu")
    torch.testing.assert_close(out, sparse_attention_reference(q, q, v, pattern))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 8, 16)}, ValueError, r"q: expected shape \[B, H, L, D\], got \[2, 8, 16\]"),
        ({"k": torch.zeros(1, 3, 8, 16)}, ValueError, "k: expected a number of heads that divides the 2 of q, got 3"),
        ({"k": torch.zeros(1, 2, 7, 16)}, ValueError, "k: expected"),
        ({"v": torch.zeros(1, 1, 8, 16)}, ValueError, "v: expected 2 heads"),
        ({"v": torch.zeros(1, 2, 8, 16).double()}, TypeError, "v: expected the dtype of q"),
        ({"q": "text"}, TypeError, "q: expected a floating torch.Tensor, got str"),
        ({"pattern": "row"}, TypeError, "pattern: expected an AttentionPattern, got str"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {name: torch.zeros(1, 2, 8, 16) for name in ("q", "k", "v")}
    arguments["pattern"] = AttentionPattern("row", text_len=4, grid=(2, 2))
    with pytest.raises(error, match=message):
        sparse_attention(**{**arguments, **change})


def test_more_positions_than_the_pattern_has_are_refused():
    with pytest.raises(ValueError, match="q: expected at most 8 positions, as the pattern has, got 9"):
        sparse_attention(*torch.zeros(3, 1, 1, 9, 4), AttentionPattern("row", text_len=4, grid=(2, 2)))
