# SPDX-License-Identifier: MIT
"""decode_attention beyond the generic tests: token by token it is sparse_attention."""

from __future__ import annotations

import os

import pytest
import torch

import dalle_fast
from dalle_fast.ops import AttentionPattern, decode_attention, sparse_attention
from dalle_fast.ops.decode_attention import op

PATTERNS = {
    "row": AttentionPattern("row", 5, (6, 4)),
    "row_short": AttentionPattern("row", 5, (6, 4), extent=3),
    "column": AttentionPattern("column", 5, (6, 4)),
    "conv": AttentionPattern("conv", 5, (6, 4), kernel=3),
    "conv_overlapping": AttentionPattern("conv", 5, (6, 4), kernel=7),
    "conv_rows": AttentionPattern("conv", 5, (6, 4), kernel=3, wraparound=False),
    "conv_rows_wide": AttentionPattern("conv", 5, (6, 4), kernel=9, wraparound=False),
    "conv_thin": AttentionPattern("conv", 5, (9, 1), kernel=5),
    "dense": AttentionPattern("dense", 5, (6, 4)),
    "no_text": AttentionPattern("conv", 0, (6, 4), kernel=5),
}


@pytest.fixture(params=["auto", "reference", "executor"])
def backend(request, monkeypatch):
    """Back ends that run here: the processor's, plain torch, and the CUDA kernel on the host executor."""
    if request.param != "executor":
        return request.param
    if folder := os.environ.get("DALLE_FAST_SIMT"):
        monkeypatch.setattr(dalle_fast, "__path__", [folder, *dalle_fast.__path__])
    monkeypatch.setattr(op, "_C", pytest.importorskip("dalle_fast._C_simt"))
    return "cpu"


@pytest.mark.parametrize("position_as_tensor", [False, True])
@pytest.mark.parametrize("kind", PATTERNS)
def test_decoding_the_stream_equals_attention_over_it(kind, position_as_tensor, backend):
    pattern = PATTERNS[kind]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, pattern.length, 16, generator=generator)
    k, v = (torch.randn(2, 2, pattern.length, 16, generator=generator) for _ in range(2))
    expected = sparse_attention(q, k, v, pattern, backend="reference")
    text = [torch.full((2, 2, pattern.text_len, 16), torch.nan) for _ in range(2)]
    slots = pattern.image_cache_len + len(kind) % 2  # a ring may be longer than it has to be
    rings = [torch.full((2, 2, slots, 16), torch.nan) for _ in range(2)]  # unread until written
    for position in range(pattern.length):
        at = torch.tensor([position]) if position_as_tensor else position
        new = (t[:, :, position] for t in (q, k, v))
        out = decode_attention(*new, *text, *rings, pattern, at, backend=backend)
        torch.testing.assert_close(out, expected[:, :, position], rtol=2e-5, atol=5e-6)
    for cache, t in zip(text, (k, v), strict=True):
        assert torch.equal(cache, t[:, :, : pattern.text_len])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PATTERNS)
def test_a_position_on_the_device_gives_the_bits_of_an_int(kind, dtype, backend):
    """Image tokens of five samples of a caption, one after the other."""
    if backend == "reference":
        pytest.skip("gathers in one case and masks in the other")
    pattern = PATTERNS[kind]
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    text_k, text_v = draw(2, 1, 2, pattern.text_len, 8)
    rings = torch.zeros(2, 2, 5, 2, pattern.image_cache_len, 8, dtype=dtype)
    at = torch.tensor(pattern.text_len)
    for position in range(pattern.text_len, pattern.length):
        q, k, v = draw(3, 5, 2, 8)
        one = decode_attention(q, k, v, text_k, text_v, *rings[0], pattern, position, backend=backend)
        two = decode_attention(q, k, v, text_k, text_v, *rings[1], pattern, at, backend=backend)
        at += 1
        assert torch.equal(one, two)
        assert torch.equal(rings[0], rings[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [-1, -(2**62), 9, 2**32 + 4, 2**62, 2])
def test_an_impossible_position_on_the_device_gives_nan_and_writes_nothing(position, dtype, backend):
    pattern = AttentionPattern("row", text_len=3, grid=(2, 3))
    caches = [torch.randn(1, 2, 3, 8).to(dtype) for _ in range(2)] + [
        torch.randn(6, 2, 4, 8).to(dtype) for _ in range(2)
    ]
    before = [cache.clone() for cache in caches]
    q, k, v = torch.randn(3, 6, 2, 8).to(dtype)
    out = decode_attention(q, k, v, *caches, pattern, torch.tensor([position]), backend=backend)
    assert out.isnan().all()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old)


def test_a_position_on_the_device_compiles_without_a_break():
    pattern = AttentionPattern("column", text_len=3, grid=(2, 3))
    caches = [torch.randn(1, 2, 3, 8) for _ in range(2)] + [torch.randn(2, 2, 6, 8) for _ in range(2)]
    q, k, v = torch.randn(3, 2, 2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    for position in (4, 7):
        expected = decode_attention(q, k, v, *(c.clone() for c in caches), pattern, position)
        torch.testing.assert_close(compiled(q, k, v, *caches, pattern, torch.tensor([position])), expected)


def test_samples_of_one_caption_share_its_text():
    pattern = AttentionPattern("row", text_len=3, grid=(2, 2))
    text_k, text_v = torch.randn(2, 2, 2, 3, 8)
    rings = torch.zeros(2, 6, 2, pattern.image_cache_len, 8)
    q, k, v = torch.randn(3, 6, 2, 8)
    shared = decode_attention(q, k, v, text_k, text_v, *rings.clone(), pattern, 3)
    full = decode_attention(
        q, k, v, text_k.repeat_interleave(3, 0), text_v.repeat_interleave(3, 0), *rings.clone(), pattern, 3
    )
    torch.testing.assert_close(shared, full)


def test_the_token_is_written_into_its_ring_slot_and_nothing_else_changes():
    pattern = AttentionPattern("row", text_len=2, grid=(3, 3))
    ring = pattern.image_cache_len
    text_k, text_v = torch.randn(2, 1, 1, 2, 4)
    image_k, image_v = torch.randn(2, 1, 1, ring, 4)
    before = image_k.clone(), image_v.clone(), text_k.clone()
    q, k, v = torch.randn(3, 1, 1, 4)
    decode_attention(q, k, v, text_k, text_v, image_k, image_v, pattern, 2 + 7)
    slot = 7 % ring
    assert torch.equal(image_k[:, :, slot], k)
    assert torch.equal(image_v[:, :, slot], v)
    others = [i for i in range(ring) if i != slot]
    assert torch.equal(image_k[:, :, others], before[0][:, :, others])
    assert torch.equal(image_v[:, :, others], before[1][:, :, others])
    assert torch.equal(text_k, before[2])


def arguments():
    pattern = AttentionPattern("row", text_len=3, grid=(2, 2))
    return {
        "q": torch.zeros(2, 2, 8),
        "k": torch.zeros(2, 2, 8),
        "v": torch.zeros(2, 2, 8),
        "text_k": torch.zeros(1, 2, 3, 8),
        "text_v": torch.zeros(1, 2, 3, 8),
        "image_k": torch.zeros(2, 2, 3, 8),
        "image_v": torch.zeros(2, 2, 3, 8),
        "pattern": pattern,
        "position": 4,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"position": 7}, ValueError, "position: expected 0 to 6, got 7"),
        ({"position": -1}, ValueError, "position: expected 0 to 6, got -1"),
        ({"position": 1.0}, TypeError, "position: expected an int"),
        ({"position": torch.tensor([1, 2])}, TypeError, "position: expected an int or an int64 tensor of one element"),
        (
            {"position": torch.zeros(1, dtype=torch.int64, device="meta")},
            ValueError,
            "position: expected the device of q",
        ),
        ({"position": 1}, ValueError, "text_k: a text position needs 2 rows"),
        ({"image_k": torch.zeros(2, 2, 2, 8)}, ValueError, "image_"),
        ({"text_k": torch.zeros(1, 2, 4, 8)}, ValueError, r"text_k: expected \[1, 2, 3, 8\]"),
        ({"k": torch.zeros(2, 3, 8)}, ValueError, "k: expected a number of heads that divides the 2 of q, got 3"),
        ({"v": torch.zeros(2, 2, 8).bfloat16()}, TypeError, "v: expected the dtype of q"),
        ({"q": None}, TypeError, "q: expected a floating torch.Tensor, got NoneType"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        decode_attention(**{**arguments(), **change})


def test_no_heads_are_refused():
    """They were a division by zero."""
    pattern = AttentionPattern("dense", text_len=1, grid=(1, 1))
    caches = [torch.zeros(1, 1, n, 4) for n in (1, 1, 2, 2)]
    with pytest.raises(ValueError, match=r"^q: expected at least one head and one channel, got shape \[1, 0, 4\]"):
        decode_attention(torch.zeros(1, 0, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), *caches, pattern, 1)
