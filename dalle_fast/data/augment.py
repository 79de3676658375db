# SPDX-License-Identifier: MIT
"""Crops of the two stages (paper appendix A.1, appendix B.1), parametric in the target size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from ..ops.philox import philox4x32

AUGMENTATIONS = ("none", "jitter", "stage1", "stage2")
_WORD = 0xFFFFFFFF


def _words(seed: int, counter: int) -> list[int]:
    """Eight random words of a sample."""
    counters = torch.tensor([[counter & _WORD, counter >> 32, block, 0x61756700] for block in (0, 1)])
    return philox4x32(counters, (seed & _WORD, (seed >> 32) & _WORD)).flatten().tolist()


def _between(word: int, low: int, high: int) -> int:
    """Uniform in low..high, both included."""
    return low + ((word * (high - low + 1)) >> 32)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area resize of uint8 [H, W, 3] (a pixel is the mean of what it covers), rounded to uint8."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def augment_image(image: np.ndarray, size: int, augment: str, seed: int = 0, counter: int = 0) -> np.ndarray:
    """A square picture for training.

    "none": the central square, resized. "jitter": the same, moved by up to a sixteenth of its side each way, its border
    repeated; for small drawings. "stage1": a random square of the shorter side, resized to a random side t in
    [9/8 size, 12/8 size] (at most the shorter side), a random crop, a random flip. "stage2": a square from the middle
    of the free range, t in [size, 9/8 size], a random crop, never a flip: text must stay readable. Pictures smaller
    than `size` are enlarged.

    Args:
        image: uint8 [H, W, 3].
        size: side of the result in pixels.
        augment: see above.
        seed: of the random numbers.
        counter: which of them; the same counter draws the same crop.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ConfigError: `augment` is unknown.
    """
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"augment: expected one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    height, width = image.shape[:2]
    short = min(height, width)
    if augment == "none":
        top, left = (height - short) // 2, (width - short) // 2
        return resize(image[top : top + short, left : left + short], size, size)
    if augment == "jitter":
        reach = max(size // 16, 1)
        picture = augment_image(image, size, "none")
        padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        words = _words(seed, counter)
        y, x = _between(words[0], 0, 2 * reach), _between(words[1], 0, 2 * reach)
        return np.ascontiguousarray(padded[y : y + size, x : x + size])
    words = _words(seed, counter)
    if augment == "stage1":
        top, left = _between(words[0], 0, height - short), _between(words[1], 0, width - short)
        low, high = round(9 / 8 * size), round(12 / 8 * size)
    else:
        top, left = (_middle(words[i], side - short) for i, side in ((0, height), (1, width)))
        low, high = size, round(9 / 8 * size)
    t = max(size, _between(words[2], min(short, low), min(short, high)))
    square = resize(image[top : top + short, left : left + short], t, t)
    y, x = _between(words[3], 0, t - size), _between(words[4], 0, t - size)
    crop = square[y : y + size, x : x + size]
    if augment == "stage1" and words[5] & 1:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(crop)


def _middle(word: int, free: int) -> int:
    low = 3 * free // 8
    return _between(word, low, max(low + 1, 5 * free // 8) - 1)
