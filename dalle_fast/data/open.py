# SPDX-License-Identifier: MIT
"""Names of data sets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..errors import DataError
from .emoji import EmojiPairs
from .emoji_styles import EmojiStylesPairs
from .pairs import FolderPairs, TarPairs
from .sample import PairDataset
from .shapes import ShapesPairs

_BUILT_IN = {"emoji": EmojiPairs, "emoji-styles": EmojiStylesPairs, "shapes": ShapesPairs}


@lru_cache(maxsize=8)
def _built_in(source: str, split: str, size: int) -> PairDataset:
    return _BUILT_IN[source](split, size)


def open_dataset(source: str, split: str = "train", size: int = 32) -> PairDataset:
    """Opens "emoji", "emoji-styles", "shapes", a folder of pairs, or a .tar file (or a glob of several).

    Args:
        source: which.
        split: "train", "heldout", "seen" or "all".
        size: side in pixels of drawn pictures; users' own come in their own size.

    Raises:
        DataError: nothing of that name.
        ConfigError: unknown split.
    """
    if source in _BUILT_IN:
        return _built_in(source, split, size)
    if source.endswith(".tar"):
        return TarPairs(source, split)
    if Path(source).is_dir():
        return FolderPairs(source, split)
    raise DataError(
        f"{source}: expected emoji, emoji-styles, shapes, a folder of pictures with captions, or a .tar file"
    )
