# SPDX-License-Identifier: MIT
"""The data set `emoji-styles`: what is trained on, and which combinations of style, thing and tone are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ...errors import DataError
from .. import emoji
from ..order import sample_indices
from ..sample import Sample, check_split, digest
from .catalogue import Drawing, catalogue
from .packages import data_folder

_SPLIT_SEED = 0x7374796C6573  # "styles"
_LEAST_STYLES = 5  # a thing drawn in fewer styles keeps them all
_SHARE = 12  # one thing of so many loses a style


def split_drawings(drawings: Sequence[Drawing], toned: frozenset[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """Indices of each split.

    Held out are (1) things in a skin tone, in every style: those that the data set `emoji` holds out; (2) of every
    twelfth thing without tones that comes in five styles or more, one style. What is drawn from the same art or called
    the same as something held out is in no split but "all".

    Args:
        drawings: ordered by key.
        toned: (concept, tone) of (1).
    """
    by_concept: dict[str, list[int]] = {}
    heldout = []
    for index, drawing in enumerate(drawings):
        if len(drawing.tones) == 1 and (drawing.concept, drawing.tones[0]) in toned:
            heldout.append(index)
        elif not drawing.tones:
            by_concept.setdefault(drawing.concept, []).append(index)
    tonal = {drawing.concept for drawing in drawings if drawing.tones}
    common = [
        concept
        for concept, indices in sorted(by_concept.items())
        if concept not in tonal and len({drawings[i].style for i in indices}) >= _LEAST_STYLES
    ]
    order = sample_indices(_SPLIT_SEED, 0, len(common), len(common)) if common else []
    for turn, which in enumerate(sorted(order[: len(common) // _SHARE])):
        indices = by_concept[common[which]]
        styles = sorted({drawings[i].style for i in indices})
        left_out = styles[turn % len(styles)]
        heldout += [i for i in indices if drawings[i].style == left_out]

    art = {drawings[i].art for i in heldout}
    captions = {drawings[i].caption for i in heldout}
    taken = set(heldout)
    train = [
        i
        for i, drawing in enumerate(drawings)
        if i not in taken and drawing.art not in art and drawing.caption not in captions
    ]
    return {
        "train": tuple(train),
        "heldout": tuple(sorted(heldout)),
        "seen": _alike(drawings, train, heldout),
        "all": tuple(range(len(drawings))),
    }


def _alike(drawings: Sequence[Drawing], train: list[int], heldout: list[int]) -> tuple[int, ...]:
    """As many of "train", with and without a tone in the same numbers."""
    picked = []
    for number, tones in enumerate((1, 0)):
        pool = [i for i in train if len(drawings[i].tones) == tones]
        count = min(sum(len(drawings[i].tones) == tones for i in heldout), len(pool))
        picked += [pool[j] for j in sample_indices(_SPLIT_SEED + 1 + number, 0, count, max(len(pool), 1))]
    return tuple(sorted(picked))


class EmojiStylesPairs:
    """About 20,000 emoji drawn in seven styles, with captions such as "a flat drawing of a red apple".

    Styles (`STYLES`): Twemoji with bare names, as in the data set `emoji`; Fluent Emoji flat, shaded and in 3D; Noto;
    EmojiOne; FxEmoji. The first call fetches the drawings with npm (36 MB) and draws them (two minutes); later ones
    read a cache. Splits: see `split_drawings`.

    Args:
        split: "train", "heldout", "seen" or "all".
        size: side in pixels.

    Raises:
        DataError: npm, resvg-py or a package is missing; says what to install.
        ConfigError: unknown split.
    """

    def __init__(self, split: str = "train", size: int = 64) -> None:
        check_split(split)
        if not 1 <= size <= 512:
            raise DataError(f"size: expected 1 to 512 pixels, got {size}")
        everything = catalogue(size, data_folder())
        self.name = f"emoji-styles/{split}"
        self.size = size
        self._pictures = everything.pictures
        self._indices = split_drawings(everything.drawings, emoji.heldout_tones())[split]
        self.drawings = [everything.drawings[i] for i in self._indices]
        """Style, thing and tones of each."""
        self.captions = [drawing.caption for drawing in self.drawings]
        self.keys = [drawing.key for drawing in self.drawings]
        self.labels = {
            "kind": [drawing.concept for drawing in self.drawings],
            "tone": [tuple(emoji.TONES[tone] for tone in drawing.tones) for drawing in self.drawings],
            "style": [drawing.style for drawing in self.drawings],
        }

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._pictures[self._indices[index]], self.captions[index], self.keys[index])

    def fingerprint(self) -> str:
        """SHA-256 of split, size, names and pictures."""
        art = hashlib.sha256(self._pictures[list(self._indices)].tobytes()).hexdigest()
        return digest([self.name, str(self.size), *self.captions, art])
