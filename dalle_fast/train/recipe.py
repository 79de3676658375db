# SPDX-License-Identifier: MIT
"""What a stage tells the loop about itself."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..data import PairDataset, load_batch, open_dataset, sample_indices
from ..errors import DataError
from ..optim import ResblockGradScaler
from ..parallel.world import World
from .config import DataConfig, LoopConfig


def emphasized(captions: Sequence[str], data: DataConfig) -> list[int]:
    """The numbers of an epoch's samples: all once, and those with emphasis again."""
    chosen = [i for i, caption in enumerate(captions) if re.search(data.emphasis, caption)]
    return [*range(len(captions)), *chosen * (data.emphasis_repeats - 1)]


class Recipe(ABC):
    """A stage: its model, data, optimizer, schedule and loss. The loop owns time, files and signals."""

    kind: str
    """"dvae", "clip" or "dalle"."""
    image_size: int
    """Side of its pictures in pixels."""
    model: nn.Module
    dataset: PairDataset

    def __init__(self, config: Any, device: torch.device, world: World | None = None) -> None:
        self.config = config
        self.world = world or World()
        self.loop: LoopConfig = config.loop
        self.data: DataConfig = config.data
        self.device = device
        self.rows = self.world.rows(self.loop.batch_size, self.loop.accumulate)
        """The samples of each batch that this rank computes."""
        self.replaced: list[str] = []
        """Samples that could not be read, each with its reason, since the loop last looked."""
        self.examined = 0
        """Samples that were read or replaced since then."""
        self._epoch: list[int] | None = None

    def open_data(self, split: str | None = None) -> PairDataset:
        """The dataset of a split (default: the training one).

        Raises:
            DataError: it is empty.
        """
        dataset = open_dataset(self.data.source, split or self.data.split, self.image_size)
        if len(dataset) == 0:
            raise DataError(f"{self.data.source}: no pictures in split {split or self.data.split!r}")
        return dataset

    def positions(self, step: int) -> range:
        """Where this rank's samples of an update lie in the endless order."""
        start = step * self.loop.batch_size
        return range(start + self.rows.start, start + self.rows.stop)

    def indices(self, step: int) -> list[int]:
        """Their numbers in the data set."""
        positions = self.positions(step)
        if not self.data.emphasis:
            return sample_indices(self.loop.seed, positions.start, len(positions), len(self.dataset))
        if self._epoch is None:
            self._epoch = emphasized(self.dataset.captions, self.data)
        drawn = sample_indices(self.loop.seed, positions.start, len(positions), len(self._epoch))
        return [self._epoch[i] for i in drawn]

    def batch(self, step: int):
        """This rank's samples of an update: a pure function of (seed, step) and its rows."""
        indices = self.indices(step)
        batch = load_batch(
            self.dataset,
            indices,
            size=self.image_size,
            augment=self.data.augment,
            seed=self.loop.seed,
            counters=self.positions(step),
        )
        self.replaced += batch.replaced
        self.examined += len(indices)
        return batch

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimizer over the model's parameters."""

    def blocks(self) -> list[nn.Module]:
        """Modules whose parameters are gathered and dropped one by one when they are sharded."""
        return []

    def gradient_scaler(self) -> ResblockGradScaler | None:
        """Fresh scales that the model's backward pass works with from now on; None: gradients carry no scale."""
        return None

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Step size of update `step`, counted from 0."""

    @abstractmethod
    def prepare(self, step: int) -> dict[str, Any]:
        """Everything the loss of update `step` needs, for this rank's rows of the batch, on the device."""

    @abstractmethod
    def loss(self, inputs: dict[str, Any], rows: slice, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of some of this rank's rows, counted from its first, such that the mean over equal parts of all ranks is
        the loss of the batch; and metrics to average."""

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics with the weights as they are."""
        return {}

    def pictures(self) -> Image.Image | None:
        """Something to look at, with the weights as they are."""
        return None

    def after_step(self, loss: float) -> None:  # noqa: B027 - most schedules are functions of the step alone
        """Told the loss of each update."""

    def state_dict(self) -> dict[str, Any]:
        """JSON state beside weights and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes `state_dict` back."""
