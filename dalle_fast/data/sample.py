# SPDX-License-Identifier: MIT
"""What a data set is: pictures with captions, counted from 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

SPLITS = ("train", "heldout", "seen", "all")


@dataclass(frozen=True)
class Sample:
    """A picture and what it shows."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    caption: str
    key: str
    """Unique within the data set; says where it came from."""


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    images: torch.Tensor
    """uint8 [B, 3, size, size]."""
    captions: list[str]
    keys: list[str]
    replaced: list[str] = field(default_factory=list)
    """One message for each sample that could not be read and gave its place to another."""


class PairDataset(Protocol):
    """Pictures with captions. Splits: "train", "heldout" (combinations that "train" lacks), "seen" (as many of "train",
    for comparison) and "all"."""

    name: str
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Reads a sample; DataError when it cannot be read."""

    def fingerprint(self) -> str:
        """SHA-256 in hex of what defines the data."""


def digest(parts: Iterable[str]) -> str:
    """SHA-256 of strings, in order."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def check_split(split: str) -> None:
    """Raises ConfigError for an unknown split."""
    if split not in SPLITS:
        from ..errors import ConfigError

        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
