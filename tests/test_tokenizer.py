# SPDX-License-Identifier: MIT
"""BPE and its seeded dropout."""

from __future__ import annotations

import pytest
import tokenizers
import torch

from dalle_fast.data import EmojiPairs, Tokenizer
from dalle_fast.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def captions():
    return EmojiPairs("all").captions


@pytest.fixture(scope="module")
def tokenizer(captions):
    return Tokenizer.train(captions, 700)


def test_the_merge_loop_equals_the_library_when_nothing_is_dropped(tokenizer, captions):
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    expected = [encoding.ids for encoding in library.encode_batch(captions)]
    rows = tokenizer.encode(captions, 64)
    assert [[i for i in row if i >= 0] for row in rows.tolist()] == [ids[:64] for ids in expected]
    # a dropout too small to ever happen goes through our own loop
    own = tokenizer.encode(captions, 64, dropout=1e-300, counters=range(len(captions)))
    assert torch.equal(own, rows)


@pytest.mark.parametrize(
    "text", ["ÀÉÎ ça  va", "naïve e\u0301", "日本語 テスト", "שלום", "a\tb\nc", "🦊 fox", "x" * 300]
)
def test_any_text_survives(tokenizer, text):
    import unicodedata

    ids = tokenizer.encode([text], 2000)[0]
    plain = unicodedata.normalize("NFC", text).lower()
    assert tokenizer.decode(ids) == plain
    assert torch.equal(tokenizer.encode([text], 2000, dropout=1e-300, counters=[0])[0], ids)
    dropped = tokenizer.encode([text], 2000, dropout=0.5, counters=[1])[0]
    assert tokenizer.decode(dropped) == plain


def test_dropout_is_seeded_and_counted(tokenizer, captions):
    texts = captions[:50]

    def encode(seed, counters):
        return tokenizer.encode(texts, 64, dropout=0.1, seed=seed, counters=counters)

    first = encode(1, range(50))
    assert torch.equal(first, encode(1, range(50)))
    assert not torch.equal(first, encode(2, range(50)))
    assert not torch.equal(first, encode(1, range(50, 100)))
    # a caption's tokens depend on its own counter alone
    alone = tokenizer.encode(texts[7:8], 64, dropout=0.1, seed=1, counters=[7])
    assert torch.equal(alone[0], first[7])
    assert all(tokenizer.decode(row) == text for row, text in zip(first, texts, strict=True))
    assert (first >= 0).sum() > (tokenizer.encode(texts, 64) >= 0).sum()


def test_dropping_every_merge_leaves_bytes(tokenizer):
    ids = tokenizer.encode(["abc"], 16, dropout=1.0, counters=[0])[0]
    assert int((ids >= 0).sum()) == 4  # the leading space, and one token a byte


def test_captions_are_lower_cased_padded_and_cut(tokenizer):
    a, b = tokenizer.encode(["RED heart", "red heart"], 12)
    assert torch.equal(a, b)
    assert a.dtype == torch.int64
    assert a[-1] == -1
    assert torch.equal(tokenizer.encode(["red heart"], 1)[0], a[:1])


def test_empty_huge_and_surrogate_captions(tokenizer):
    assert (tokenizer.encode([""], 8) == -1).all()
    assert tokenizer.encode([], 8).shape == (0, 8)
    for dropout in (0.0, 0.1):
        ids = tokenizer.encode(["word " * 1_000_000, "y" * 5_000_000], 256, dropout=dropout, counters=[0, 1])
        assert (ids >= 0).all()
    assert int((tokenizer.encode(["\ud800 broken"], 16) >= 0).sum()) > 0


def test_training_repeats_and_files_round_trip(tokenizer, captions, tmp_path):
    assert Tokenizer.train(captions, 700).hash == tokenizer.hash
    assert Tokenizer.train(captions, 600).hash != tokenizer.hash
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert Tokenizer.load(path).hash == tokenizer.hash
    assert tokenizer.vocab_size == 700


def test_bad_files_and_sizes_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        Tokenizer.load(path)
    for content in (b"", b"{}", b"[1]", b'{"model": 3}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer.json"):
            Tokenizer.load(path)
    with pytest.raises(ConfigError, match="vocab_size: expected at least 256"):
        Tokenizer.train(["a"], 10)
    with pytest.raises(ValueError, match="counters: dropout needs one for each"):
        Tokenizer.train(["a"], 256).encode(["a"], 4, dropout=0.1)
    with pytest.raises(ValueError, match="length: expected at least 1"):
        Tokenizer.train(["a"], 256).encode(["a"], 0)
