# SPDX-License-Identifier: MIT
"""A judge that nothing trains: what a picture shows is what its nearest original shows, in a fixed space.

The space is ink, 1 - pixel of RGB on white, averaged over 8 x 8 squares: as fine as what few tokens keep. The distance
|g s - o|^2 / |o|^2 of a picture s and an original o is the least over shifts by a 32nd of the side and over gains g in
[3/4, 4/3]: blur takes contrast away, and without the gain every faint picture is nearest to the same faint originals. A
picture fainter than that has another tone, and is told so.

What it says of 404 toned emoji (every fourth) at 32 pixels; kind is the exact concept, so "woman" for "man" is wrong:

    picture                                               kind    tone
    original                                              1.00    1.00
    moved by a pixel each way                             1.00    1.00
    blurred (sigma 1.2), or noise (sigma 0.1)             1.00    1.00
    a fifth of the ink gone; half of it                   1.00    1.00;  0.95  0.41
    dVAE's reconstruction, mse 0.017; 0.028               0.97    0.91;  0.93  0.83
    the five tones of its kind, averaged                  1.00    0.20 (one answer for five)
    all kinds of its tone, averaged                       0.01    0.40
    another emoji; another toned one                      0.00    0.09;  0.00  0.20

Other spaces, on the same reconstructions of mse 0.017: these squares without gain 0.92 and 0.77; 16 x 16 with any gain
0.94 and 0.74; CIE Lab of 16 x 16 without gain 0.76 and 0.73, with any 0.92 and 0.73, of 8 x 8 with any 0.95 and 0.80:
dark shades are stretched there, and so is what the dVAE loses of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from ..data import open_dataset

GRID = 8
MAX_GAIN = 4 / 3
_MAX_PRODUCTS = 1 << 22  # distances held at once
_BLANK = 1e-3  # mean square of the ink of an empty picture


@dataclass(frozen=True)
class Judgement:
    """What N pictures show, and whether it is what their captions say."""

    nearest: np.ndarray
    """[N] int64: the nearest original's place in the catalogue; -1 for a picture without ink."""
    right: dict[str, np.ndarray]
    """label -> [N] bool; "all" is every label at once, of one original."""

    @property
    def kind(self) -> np.ndarray:
        """[N] bool: the person or activity is right."""
        return self.right["kind"]

    @property
    def tone(self) -> np.ndarray:
        """[N] bool: all skin tones are right, in their order; of a caption without any: nothing has one."""
        return self.right["tone"]


class Judge:
    """Compares pictures with every original of a catalogue.

    Originals of one picture stand for each other, as do those of one caption: what is nearest to "norway" shows
    "svalbard & jan mayen" as well.

    Args:
        pictures: uint8 [M, H, W, 3] on white, H = W.
        captions: one for each.
        labels: name -> one value for each, such as {"kind": [...], "tone": [...]}; equal values are the same thing.

    Raises:
        ValueError: shapes, dtypes or lengths do not fit.
    """

    def __init__(self, pictures: np.ndarray, captions: Sequence[str], labels: Mapping[str, Sequence[Hashable]]) -> None:
        self.size = pictures.shape[1] if pictures.ndim == 4 else 0
        if pictures.dtype != np.uint8 or pictures.shape != (len(pictures), self.size, self.size, 3) or not self.size:
            raise ValueError(f"pictures: expected uint8 [M, H, H, 3], got {pictures.dtype} {list(pictures.shape)}")
        columns = {"captions": captions, **labels}
        for name, values in columns.items():
            if len(values) != len(pictures):
                raise ValueError(f"{name}: expected {len(pictures)}, one for each picture, got {len(values)}")
        self.labels = {name: list(values) for name, values in labels.items()}
        self.labels["all"] = list(zip(*self.labels.values(), strict=True))
        self._ink = _ink(_to_float(pictures))  # [M, D]
        self._energy = self._ink.square().sum(1).clamp(min=1e-12)  # [M]
        content = [picture.tobytes() for picture in pictures]
        self._twins = _groups(content)
        self._content = content
        self._entries = _groups(captions)

    def nearest(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> [N] int64, places in the catalogue; -1 where there is no ink.

        Raises:
            ValueError: wrong shape or dtype.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3):
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"images: expected uint8 [N, {self.size}, {self.size}, 3], got {got}")
        step = max(1, _MAX_PRODUCTS // (9 * len(self._ink)))
        parts = [self._nearest(_to_float(images[i : i + step])) for i in range(0, len(images), step)]
        return torch.cat(parts).numpy() if parts else np.empty(0, np.int64)

    def _nearest(self, images: torch.Tensor) -> torch.Tensor:
        shifted = _shifts(images, max(1, self.size // 32))  # [N, 9, 3, H, W]
        ink = _ink(shifted.flatten(0, 1))
        energy = ink.square().sum(1, keepdim=True)  # [N * 9, 1]
        product = ink @ self._ink.t()  # [N * 9, M]
        gain = (product / energy.clamp(min=1e-12)).clamp_(1 / MAX_GAIN, MAX_GAIN)
        distance = gain.square().mul_(energy).sub_(gain.mul_(product), alpha=2).div_(self._energy)
        best = distance.unflatten(0, shifted.shape[:2]).amin(1).argmin(1)
        blank = energy.unflatten(0, shifted.shape[:2]).amax((1, 2)) < _BLANK * ink.shape[1]
        return best.masked_fill_(blank, -1)

    def judge(self, images: np.ndarray, captions: Sequence[str]) -> Judgement:
        """Judges pictures of captions that are in the catalogue.

        Args:
            images: uint8 [N, H, W, 3].
            captions: one for each picture.

        Raises:
            ValueError: wrong shape or dtype, or a caption that no original has.
        """
        if len(captions) != len(images):
            raise ValueError(f"captions: expected {len(images)}, one for each picture, got {len(captions)}")
        nearest = self.nearest(images)
        return Judgement(nearest, self.compare(nearest, captions))

    def compare(self, nearest: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """label -> [N] bool: do these originals show what the captions say?"""
        wanted = [self._lookup(caption) for caption in captions]
        shown = [self._twins[self._content[i]] if i >= 0 else [] for i in nearest]
        return {
            name: np.array(
                [not {values[i] for i in a}.isdisjoint(values[j] for j in b) for a, b in zip(shown, wanted)], bool
            )
            for name, values in self.labels.items()
        }

    def has(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """label -> [N] bool: does the caption have a value for it? "apple" has no tone, and () none either."""
        wanted = [self._lookup(caption) for caption in captions]
        return {
            name: np.array([any(bool(values[i]) for i in entries) for entries in wanted], bool)
            for name, values in self.labels.items()
        }

    def chance(self, nearest: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """label -> how often these pictures are right for the captions of the others: what ignores captions scores."""
        count = len(captions)
        if count < 2:
            return dict.fromkeys(self.labels, 0.0)
        others = [(i, j) for i in range(count) for j in range(count) if i != j]
        right = self.compare(np.array([nearest[i] for i, _ in others]), [captions[j] for _, j in others])
        return {name: float(values.mean()) for name, values in right.items()}

    def _lookup(self, caption: str) -> list[int]:
        found = self._entries.get(caption)
        if found is None:
            raise ValueError(f"captions: no original is called {caption!r}")
        return found


@lru_cache(maxsize=4)
def judge_for(source: str, size: int) -> Judge | None:
    """The judge of a data source whose pictures carry labels, over all its splits; None for the others.

    Args:
        source: "emoji", say; see `open_dataset`.
        size: side of the pictures in pixels.

    Raises:
        DataError: the source cannot be opened.
    """
    dataset = open_dataset(source, "all", size)
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return None
    pictures = np.stack([dataset[i].image for i in range(len(dataset))])
    return Judge(pictures, dataset.captions, labels)


def _groups(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    return groups


def _to_float(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def _ink(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] in [0, 1] -> [N, 3 * GRID * GRID]."""
    return (1 - F.adaptive_avg_pool2d(images, GRID)).flatten(1)


def _shifts(images: torch.Tensor, reach: int) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 9, 3, H, W]: moved by -reach, 0 or reach pixels each way, white coming in."""
    height, width = images.shape[2:]
    padded = F.pad(images, (reach, reach, reach, reach), value=1.0)
    offsets = range(0, 2 * reach + 1, reach)
    return torch.stack([padded[:, :, y : y + height, x : x + width] for y in offsets for x in offsets], 1)
