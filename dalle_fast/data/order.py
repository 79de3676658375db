# SPDX-License-Identifier: MIT
"""Which sample comes when: a pure function of (seed, position), at any number of workers and after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..errors import DataError
from ..ops.philox import philox4x32
from .augment import augment_image
from .sample import Batch, PairDataset, Sample

_WORD = 0xFFFFFFFF
_MAX_TRIES = 16


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_items: int) -> np.ndarray:
    counter = torch.zeros(num_items, 4, dtype=torch.int64)
    index = torch.arange(num_items)
    counter[:, 0], counter[:, 1] = index & _WORD, index >> 32
    counter[:, 2], counter[:, 3] = epoch & _WORD, epoch >> 32
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return np.argsort(((words[:, 0] << 31) | (words[:, 1] >> 1)).numpy(), kind="stable")


def sample_indices(seed: int, start: int, count: int, num_items: int) -> list[int]:
    """Items at positions start .. start + count - 1 of the endless order.

    Position p belongs to epoch p // num_items, and each epoch is a permutation of its own.

    Raises:
        ValueError: `num_items` is not positive or `start` or `count` is negative.
    """
    if num_items < 1 or start < 0 or count < 0:
        raise ValueError(f"num_items, start, count: expected >= 1, 0, 0, got {num_items}, {start}, {count}")
    picked: list[int] = []
    while len(picked) < count:
        epoch, first = divmod(start + len(picked), num_items)
        part = _permutation(seed, epoch, num_items)[first : first + count - len(picked)]
        picked += part.tolist()
    return picked


def _read(dataset: PairDataset, index: int, seed: int, counter: int, replaced: list[str]) -> Sample:
    """The sample, or one drawn from (seed, counter) in place of one that cannot be read."""
    for attempt in range(_MAX_TRIES):
        try:
            return dataset[index]
        except DataError as error:
            replaced.append(str(error))
        words = philox4x32(
            torch.tensor([counter & _WORD, counter >> 32, attempt, 0x726570]), (seed & _WORD, seed >> 32)
        )
        index = int(words[0]) % len(dataset)
    raise DataError(f"{dataset.name}: {_MAX_TRIES} samples in a row cannot be read; the last: {replaced[-1]}")


def load_batch(
    dataset: PairDataset,
    indices: Sequence[int],
    *,
    size: int,
    augment: str = "none",
    seed: int = 0,
    counters: Sequence[int] | None = None,
) -> Batch:
    """Reads samples, crops and resizes them to one size.

    Args:
        dataset: where from.
        indices: which.
        size: side of the square pictures in pixels.
        augment: "none", "stage1" or "stage2", see `augment_image`.
        seed: of the augmentation and of replacements.
        counters: one number per sample, its position in the order: the same counter draws the same crop.

    Raises:
        DataError: no readable sample was found in place of a bad one.
    """
    counters = indices if counters is None else counters
    if len(counters) != len(indices):
        raise ValueError(f"counters: expected {len(indices)}, got {len(counters)}")
    replaced: list[str] = []
    samples = [_read(dataset, i, seed, c, replaced) for i, c in zip(indices, counters, strict=True)]
    pictures = [augment_image(s.image, size, augment, seed, c) for s, c in zip(samples, counters, strict=True)]
    stacked = np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)
    images = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    return Batch(images, [s.caption for s in samples], [s.key for s in samples], replaced)
