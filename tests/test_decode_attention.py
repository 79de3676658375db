# SPDX-License-Identifier: MIT
"""decode_attention beyond the generic tests: token by token it is sparse_attention."""

from __future__ import annotations

import pytest
import torch

from dalle_fast.ops import AttentionPattern, decode_attention, sparse_attention


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("position_as_tensor", [False, True])
@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
def test_decoding_the_stream_equals_attention_over_it(kind, position_as_tensor, backend):
    pattern = AttentionPattern(kind, text_len=5, grid=(6, 4), kernel=3)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, pattern.length, 16, generator=generator)
    k, v = (torch.randn(2, 2, pattern.length, 16, generator=generator) for _ in range(2))
    expected = sparse_attention(q, k, v, pattern, backend="reference")
    text = [torch.full((2, 2, 5, 16), torch.nan) for _ in range(2)]
    rings = [torch.full((2, 2, pattern.image_cache_len, 16), torch.nan) for _ in range(2)]  # unread until written
    for position in range(pattern.length):
        at = torch.tensor([position]) if position_as_tensor else position
        new = (t[:, :, position] for t in (q, k, v))
        out = decode_attention(*new, *text, *rings, pattern, at, backend=backend)
        torch.testing.assert_close(out, expected[:, :, position], rtol=2e-5, atol=5e-6)


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
