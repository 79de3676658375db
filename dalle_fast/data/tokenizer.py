# SPDX-License-Identifier: MIT
"""Byte-level BPE of the captions, with a BPE dropout that can be seeded (paper section 2.3)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
import torch

from ..errors import ConfigError, DataError, shown
from ..files import parse_json, read_bytes

# More characters than this per token of the result are never looked at: a 5 MB caption costs no more than its start.
_CHARACTERS_PER_TOKEN = 64


class Tokenizer:
    """Lower-cased byte-level BPE in the format of the library `tokenizers`: any text is encodable.

    Example:
        >>> tokenizer = Tokenizer.train(["a red circle", "a blue square"], vocab_size=300)
        >>> tokenizer.encode(["A red square"], length=8)
        tensor([[...]])
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        self._json = library.to_str()
        model = json.loads(self._json)["model"]
        self._ids: dict[str, int] = model["vocab"]
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        self._ranks: dict[tuple[str, str], int] = {pair: rank for rank, pair in enumerate(pairs)}
        self._split = lru_cache(maxsize=1 << 16)(self._split_uncached)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns merges from captions.

        Args:
            captions: the training captions.
            vocab_size: ids at most, at least 256 (one per byte); few captions give fewer.

        Raises:
            ConfigError: `vocab_size` is below 256.
        """
        if vocab_size < 256:
            raise ConfigError(f"vocab_size: expected at least 256 (one id per byte), got {vocab_size}")
        library = _untrained()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        library.train_from_iterator((_clean(c)[:10_000] for c in captions), trainer)
        return cls(library)

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> Tokenizer:
        """Reads the text of a tokenizer.json, as `train` makes them: only vocabulary and merges may differ.

        The library's format has much more in it, which may hang (regular expressions), fill the memory (padding) or
        give ids that no model has.

        Raises:
            DataError: it is not one.
        """
        try:
            given = parse_json(text)
            _require_trained_form(given)
            return cls(tokenizers.Tokenizer.from_str(text))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises plain Exception, and panics, which are not even that
            raise DataError(
                f"{name}: not a tokenizer of this library ({' '.join(str(error).split())[:300]})"
            ) from error

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads a tokenizer.json.

        Raises:
            DataError: missing or damaged; names the file.
        """
        try:
            text = read_bytes(path).decode()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        return cls.from_json(text, str(path))

    def save(self, path: Path | str) -> None:
        """Writes a tokenizer.json."""
        Path(path).write_text(self._json, encoding="utf-8")

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._json

    @property
    def hash(self) -> str:
        """SHA-256 of the tokenizer."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._ids)

    def encode(
        self,
        captions: Sequence[str],
        length: int,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        counters: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Captions -> int64 [B, length], -1 where there is no token; longer captions are cut.

        Args:
            captions: any text.
            length: tokens.
            dropout: probability that a possible merge is left out (Provilkov et al. 2020); 0 equals the library.
            seed: of the dropout.
            counters: one number per caption, its position in the data order; the same counter drops the same merges.

        Raises:
            ValueError: `length` is not positive, `dropout` is not in [0, 1], or counters are missing or too few.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number in [0, 1], got {dropout}")
        texts = [_clean(caption[: length * _CHARACTERS_PER_TOKEN]) for caption in captions]
        if dropout == 0:
            encoded = [e.ids for e in self._library.encode_batch(texts, add_special_tokens=False)]
        else:
            if counters is None or len(counters) != len(texts):
                raise ValueError(f"counters: dropout needs one for each of {len(texts)} captions")
            encoded = [
                self._encode_dropped(text, dropout, random.Random((seed << 64) | counter), length)
                for text, counter in zip(texts, counters, strict=True)
            ]
        ids = torch.full((len(texts), length), -1, dtype=torch.int64)
        for row, tokens in enumerate(encoded):
            tokens = tokens[:length]
            if tokens:
                ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Ids -> text; -1 is passed over."""
        values = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        return self._library.decode([i for i in values if i >= 0]).strip()

    def _split_uncached(self, text: str) -> tuple[str, ...]:
        normalized = self._library.normalizer.normalize_str(text)
        return tuple(word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normalized))

    def _encode_dropped(self, text: str, dropout: float, rng: random.Random, length: int) -> list[int]:
        ids: list[int] = []
        for word in self._split(text):
            ids += self._merge(word, dropout, rng)
            if len(ids) >= length:
                break
        return ids

    def _merge(self, word: str, dropout: float, rng: random.Random) -> list[int]:
        ranks, draw = self._ranks, rng.random
        symbols = list(word)
        while len(symbols) > 1:
            best, at = -1, -1
            for i in range(len(symbols) - 1):
                rank = ranks.get((symbols[i], symbols[i + 1]))
                if rank is not None and draw() >= dropout and (best < 0 or rank < best):
                    best, at = rank, i
            if best < 0:
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self._ids[symbol] for symbol in symbols]


def _untrained() -> tokenizers.Tokenizer:
    """What is the same in all of ours."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def _require_trained_form(given: Any) -> None:
    """Raises ValueError where a file says more than vocabulary and merges, or where these are not whole."""
    form = json.loads(_untrained().to_str())
    if not isinstance(given, dict) or not isinstance(given.get("model"), dict):
        raise ValueError("expected an object with a model")
    model = {**form["model"], **given["model"]}  # older files lack some keys
    for where, expected, found in (("", form, given), ("model.", form["model"], model)):
        for key in sorted({*expected, *found} - {"model", "vocab", "merges", "version"}):
            if found.get(key) != expected.get(key):
                raise ValueError(f"{where}{key}: expected {shown(expected.get(key))}, got {shown(found.get(key))}")
    vocab = given["model"].get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError("model.vocab: expected tokens with their ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"model.vocab: expected each id from 0 to {len(vocab) - 1} once")
    if missing := sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()):
        raise ValueError(f"model.vocab: expected a token for each byte, {missing[0]!r} is missing")


def _clean(text: str) -> str:
    """Without lone surrogates, which no UTF-8 text has."""
    return text.encode("utf-8", "replace").decode("utf-8")
