# SPDX-License-Identifier: MIT
"""Drawn shapes with an exact checker: accuracy is a number, not an opinion.

Captions: "a red circle left of a blue square", "a small green triangle", "three yellow squares".
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..errors import DataError
from ..ops.philox import philox4x32
from .order import sample_indices
from .sample import Sample, check_split, digest

COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 205, 20),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {"two": 2, "three": 3}
_SPLIT_SEED = 0x736861706573  # "shapes"
_WORD = 0xFFFFFFFF
_SMALL, _LARGE = 0.31, 0.56  # sides relative to the picture
_PAPER, _NOISE = 40.0, 3.0  # darkest paper below white, standard deviation of a value; of 255
_PAIR_CAPTION = re.compile(r"^an? (\w+) (\w+) (left of|right of|above|below) an? (\w+) (\w+)$")
_ONE_CAPTION = re.compile(r"^an? (small|large) (\w+) (\w+)$")
_MANY_CAPTION = re.compile(r"^(two|three) (\w+) (\w+?)e?s$")


@dataclass(frozen=True)
class Thing:
    """A drawn object; lengths in pixels of the picture."""

    colour: str
    shape: str
    x: float
    """Left edge."""
    y: float
    """Top edge."""
    side: float


@dataclass(frozen=True)
class ShapesReading:
    """What the checker saw."""

    ok: bool
    """Whether the picture shows what the caption says, and nothing else."""
    found: str
    """The objects read, or what was wrong."""


# ---- drawing


def coverage(shape: str, height: int, width: int, y: float, x: float, side: float, supersample: int = 4) -> np.ndarray:
    """Share of each pixel that the shape covers, float [height, width]."""
    steps = (np.arange(height * supersample) + 0.5) / supersample
    v = (steps[:, None] - y) / side  # 0..1 inside
    u = ((np.arange(width * supersample) + 0.5) / supersample - x)[None] / side
    inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    if shape == "circle":
        inside &= (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    elif shape == "triangle":
        inside &= np.abs(u - 0.5) <= v / 2
    elif shape == "cross":
        inside &= (np.abs(u - 0.5) <= 1 / 6) | (np.abs(v - 0.5) <= 1 / 6)
    return inside.reshape(height, supersample, width, supersample).mean(axis=(1, 3))


def draw(things: list[Thing], size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Objects on paper, uint8 [size, size, 3].

    Args:
        things: what to draw, in this order.
        size: side of the picture in pixels.
        rng: draws the paper's grey level and the camera's noise; None: white paper without noise. On paper without
            either, a likelihood has no bound, and a dVAE falls into one code for "white".
    """
    picture = np.full((size, size, 3), 255.0 if rng is None else 255.0 - _PAPER * rng.random())
    for thing in things:
        share = coverage(thing.shape, size, size, thing.y, thing.x, thing.side)[..., None]
        picture = picture * (1 - share) + np.array(COLOURS[thing.colour]) * share
    if rng is not None:
        picture += _NOISE * rng.standard_normal(picture.shape)
    return picture.round().clip(0, 255).astype(np.uint8)


def _words(seed: int, first: int, count: int) -> list[list[int]]:
    """32 random words for each of the samples first, first + 1, ..."""
    counter = torch.zeros(count, 8, 4, dtype=torch.int64)
    index = torch.arange(first, first + count)[:, None]
    counter[..., 0], counter[..., 1], counter[..., 2] = index & _WORD, index >> 32, torch.arange(8)
    return philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD)).flatten(1).tolist()


class _Draws:
    """Random numbers of one sample."""

    def __init__(self, words: list[int]) -> None:
        self._words = iter(words)

    def below(self, n: int) -> int:
        return next(self._words) * n >> 32

    def pick(self, items):
        return items[self.below(len(items))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * (next(self._words) / 2**32)


@lru_cache(maxsize=1)
def heldout_combinations() -> frozenset[tuple[str, str, str]]:
    """(colour, shape, relation) triples that training never shows: one relation for each colour and shape."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    order = sample_indices(_SPLIT_SEED, 0, len(pairs), len(pairs))
    return frozenset((*pairs[p], RELATIONS[k % len(RELATIONS)]) for k, p in enumerate(order) if k % 2 == 0)


def _pair_is_heldout(first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    held = heldout_combinations()
    return (*first, relation) in held or (*second, INVERSE[relation]) in held


@lru_cache(maxsize=16)
def _pairs_of(relation: str, heldout: bool | None) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [
        (a, b)
        for a in kinds
        for b in kinds
        if a != b and (heldout is None or _pair_is_heldout(a, relation, b) == heldout)
    ]


def _snap(length: float, size: int) -> int:
    """To a sixteenth of the picture, so that a small dVAE meets an outline often enough to learn it."""
    step = max(size // 16, 1)
    return round(length / step) * step


def _pair(d: _Draws, size: int, heldout: bool | None) -> tuple[list[Thing], str]:
    relation = d.pick(RELATIONS)
    first, second = d.pick(_pairs_of(relation, heldout))
    side = [_snap(d.between(0.36, 0.44) * size, size) for _ in range(2)]
    gap = max(2.0, 0.08 * size)
    along = [0.0, 0.0]  # first and second, along the relation
    free = size - side[0] - side[1] - gap
    along[0] = d.between(0, free * 0.6)
    along[1] = along[0] + side[0] + gap + d.between(0, free - along[0])
    if relation in ("right of", "below"):
        along = [size - along[0] - side[0], size - along[1] - side[1]]
    across = [d.between(0.15 * size, 0.85 * size - s) for s in side]
    horizontal = relation in ("left of", "right of")
    things = []
    for (colour, shape), a, c, s in zip((first, second), along, across, side, strict=True):
        x, y = (a, c) if horizontal else (c, a)
        things.append(Thing(colour, shape, _snap(x, size), _snap(y, size), s))
    caption = f"a {first[0]} {first[1]} {relation} a {second[0]} {second[1]}"
    return things, caption


def _one(d: _Draws, size: int) -> tuple[list[Thing], str]:
    colour, shape, large = d.pick(list(COLOURS)), d.pick(SHAPES), d.below(2)
    side = _snap((_LARGE if large else _SMALL) * size, size)
    x, y = (_snap(d.between(0.06 * size, 0.94 * size - side), size) for _ in range(2))
    return [Thing(colour, shape, x, y, side)], f"a {'large' if large else 'small'} {colour} {shape}"


def _many(d: _Draws, size: int) -> tuple[list[Thing], str]:
    colour, shape, word = d.pick(list(COLOURS)), d.pick(SHAPES), d.pick(list(COUNTS))
    side = _snap(0.36 * size, size)
    corners = [(0.08, 0.08), (0.58, 0.08), (0.08, 0.58), (0.58, 0.58)]
    skip = d.below(4)
    places = [c for i, c in enumerate(corners) if i != skip][: COUNTS[word]]
    things = []
    for cx, cy in places:
        x, y = (_snap((c + d.between(0, 0.06)) * size, size) for c in (cx, cy))
        things.append(Thing(colour, shape, x, y, side))
    return things, f"{word} {colour} {shape}{'es' if shape == 'cross' else 's'}"


def _sample(words: list[int], size: int, heldout: bool | None) -> tuple[list[Thing], str]:
    """Objects and caption; `heldout`: pairs with a held-out combination (True), without (False), both (None)."""
    d = _Draws(words)
    kind = d.below(10)
    if heldout or kind < 7:
        return _pair(d, size, heldout)
    return _one(d, size) if kind < 9 else _many(d, size)


class ShapesPairs:
    """Procedural pictures with captions.

    Args:
        split: "train", "heldout" (pairs with a (colour, shape, relation) that training lacks), "seen" (pairs of the
            training distribution, other pictures) or "all".
        size: side in pixels, at least 24.
        num_samples: of the split; None takes 40,000 for "train" and "all" and 512 for the others.
        seed: of the drawing.

    Raises:
        DataError: the size is too small.
        ConfigError: unknown split.
    """

    def __init__(self, split: str = "train", size: int = 32, num_samples: int | None = None, seed: int = 0) -> None:
        check_split(split)
        if size < 24:
            raise DataError(f"size: shapes need at least 24 pixels, got {size}")
        self.name = f"shapes/{split}"
        self.size = size
        self.split = split
        self._length = num_samples or (512 if split in ("heldout", "seen") else 40_000)
        self._seed = (seed << 8) + {"train": 0, "heldout": 1, "seen": 2, "all": 3}[split]
        made = [self._make(words) for words in _words(self._seed, 0, self._length)]
        self._things = [things for things, _ in made]
        self.captions = [caption for _, caption in made]
        self.keys = [f"{split}-{i:06d}" for i in range(self._length)]
        self._drawn: dict[int, np.ndarray] = {}

    def _make(self, words: list[int]) -> tuple[list[Thing], str]:
        if self.split == "seen":  # pairs only, like the held-out ones
            return _pair(_Draws(words), self.size, False)
        return _sample(words, self.size, {"train": False, "heldout": True, "all": None}[self.split])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        picture = self._drawn.get(index)
        if picture is None:
            rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, index], dtype=np.uint64)))
            picture = self._drawn[index] = draw(self._things[index], self.size, rng)
        return Sample(picture, self.captions[index], self.keys[index])

    def fingerprint(self) -> str:
        """SHA-256 of captions and geometry."""
        return digest([self.name, str(self.size), f"paper {_PAPER} noise {_NOISE}", *self.captions, repr(self._things)])


# ---- the checker


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Masks of the 8-connected regions."""
    left = mask.copy()
    found = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        region = np.zeros_like(mask)
        queue = deque([start])
        left[start] = False
        while queue:
            y, x = queue.popleft()
            region[y, x] = True
            for v in range(max(y - 1, 0), min(y + 2, mask.shape[0])):
                for u in range(max(x - 1, 0), min(x + 2, mask.shape[1])):
                    if left[v, u]:
                        left[v, u] = False
                        queue.append((v, u))
        found.append(region)
    return found


def read_things(image: np.ndarray) -> list[Thing]:
    """Objects in a picture, by nearest colour and best-fitting outline; specks below 1.2 % of the area are ignored."""
    size = image.shape[0]
    values = image.astype(np.float64)
    bright = np.linalg.norm(255.0 - values, axis=2) < 105
    paper = np.median(values[bright], axis=0) if bright.any() else np.full(3, 255.0)
    distance = np.linalg.norm(paper - values, axis=2)
    things = []
    for region in _components(distance > 90):
        region &= distance > 0.45 * np.quantile(distance[region], 0.8)  # edges are partly paper
        if region.sum() < 0.012 * size * size:
            continue
        weight = distance * region
        core = weight >= np.quantile(weight[region], 0.6)
        mean = values[core & region].mean(axis=0)
        colour = min(COLOURS, key=lambda name: float(np.linalg.norm(mean - np.array(COLOURS[name]))))
        ys, xs = np.nonzero(region)
        y, x = ys.min(), xs.min()
        height, width = ys.max() - y + 1, xs.max() - x + 1
        side = max(height, width)
        shape = _best_shape(region, y + height / 2, x + width / 2, side)
        things.append(Thing(colour, shape, float(x), float(y), float(side)))
    return sorted(things, key=lambda t: (t.x, t.y))


def _best_shape(region: np.ndarray, cy: float, cx: float, side: float) -> str:
    best, best_score = SHAPES[0], -1.0
    for shape in SHAPES:
        for scale in (-1, -0.5, 0, 0.5, 1):
            s = side + scale
            for dy in (-0.5, 0, 0.5):
                outline = coverage(shape, *region.shape, cy - s / 2 + dy, cx - s / 2, s, 2) > 0.5
                score = (outline & region).sum() / max((outline | region).sum(), 1)
                if score > best_score:
                    best, best_score = shape, score
    return best


def _describe(things: list[Thing]) -> str:
    return ", ".join(f"{t.colour} {t.shape} at ({t.x:.0f}, {t.y:.0f}) side {t.side:.0f}" for t in things) or "nothing"


def _relates(a: Thing, relation: str, b: Thing) -> bool:
    ax, ay, bx, by = (t + s.side / 2 for s, t in ((a, a.x), (a, a.y), (b, b.x), (b, b.y)))
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation] and (
        abs(ax - bx) >= abs(ay - by) * 0.5 if relation.endswith("of") else abs(ay - by) >= abs(ax - bx) * 0.5
    )


def check(image: np.ndarray, caption: str) -> ShapesReading:
    """Reads a picture back and compares it with its caption.

    Args:
        image: uint8 [H, W, 3], H = W >= 24.
        caption: in the form that `ShapesPairs` writes.

    Raises:
        DataError: the caption has another form.
        ValueError: `image` is no uint8 picture.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    things = read_things(image)
    text = caption.lower().strip()
    found = _describe(things)
    kinds = sorted((t.colour, t.shape) for t in things)
    if match := _PAIR_CAPTION.match(text):
        c1, s1, relation, c2, s2 = match.groups()
        _require_words((c1, c2), (s1, s2), caption)
        ok = kinds == sorted([(c1, s1), (c2, s2)])
        if ok:
            first = next(t for t in things if (t.colour, t.shape) == (c1, s1))
            second = next(t for t in things if t is not first)
            ok = _relates(first, relation, second)
        return ShapesReading(ok, found)
    if match := _ONE_CAPTION.match(text):
        word, colour, shape = match.groups()
        _require_words((colour,), (shape,), caption)
        middle = (_SMALL + _LARGE) / 2 * image.shape[0]
        ok = kinds == [(colour, shape)] and (things[0].side > middle) == (word == "large")
        return ShapesReading(ok, found)
    if match := _MANY_CAPTION.match(text):
        word, colour, shape = match.groups()
        shape = {"cros": "cross", "cross": "cross"}.get(shape, shape)
        shape = shape if shape in SHAPES else shape + "e"
        _require_words((colour,), (shape,), caption)
        return ShapesReading(kinds == [(colour, shape)] * COUNTS[word], found)
    raise DataError(f"caption: expected one that ShapesPairs writes, got {caption!r}")


def _require_words(colours: tuple[str, ...], shapes: tuple[str, ...], caption: str) -> None:
    for word, known in [(c, COLOURS) for c in colours] + [(s, SHAPES) for s in shapes]:
        if word not in known:
            raise DataError(f"caption: {word!r} is not one of {', '.join(known)} ({caption!r})")
