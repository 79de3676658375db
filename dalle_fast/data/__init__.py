# SPDX-License-Identifier: MIT
"""Pictures with captions, in an order that can be repeated."""

from __future__ import annotations

from . import shapes
from .augment import augment_image
from .emoji import EmojiPairs
from .emoji_styles import EmojiStylesPairs
from .images import decode_image, read_image
from .open import open_dataset
from .order import load_batch, sample_indices
from .pairs import FolderPairs, TarPairs
from .sample import Batch, PairDataset, Sample
from .shapes import ShapesPairs
from .tokenizer import Tokenizer

__all__ = [
    "Batch",
    "EmojiPairs",
    "EmojiStylesPairs",
    "FolderPairs",
    "PairDataset",
    "Sample",
    "ShapesPairs",
    "TarPairs",
    "Tokenizer",
    "augment_image",
    "decode_image",
    "load_batch",
    "open_dataset",
    "read_image",
    "sample_indices",
    "shapes",
]
