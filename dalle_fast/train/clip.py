# SPDX-License-Identifier: MIT
"""The ranker: a small contrastive model on the same pictures and captions (paper section 2.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ..data import Tokenizer, load_batch
from ..errors import ConfigError, require_numbers
from ..models import CLIP, CLIPConfig
from ..models.clip import TINY
from ..optim.schedules import cosine, warmup_linear
from ..parallel.world import World
from .config import LARGEST, DataConfig, LoopConfig
from .recipe import Recipe


@dataclass(frozen=True)
class CLIPTrainConfig:
    """A contrastive run."""

    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=128, clip_norm=1.0))
    model: CLIPConfig = field(default_factory=CLIPConfig)
    text_vocab_size: int = 1024
    """BPE tokens of the tokenizer that is trained on the captions."""
    learning_rate: float = 1e-3
    """Peak step size."""
    warmup_steps: int = 50
    """Updates of the linear warm-up; a cosine to zero follows."""
    weight_decay: float = 0.1
    """AdamW's decay."""
    bpe_dropout: float = 0.1
    """Share of merges that training leaves out."""

    def __post_init__(self) -> None:
        self.loop.refuse_transformer_options("clip")
        if self.loop.accumulate != 1:
            raise ConfigError("loop.accumulate: a contrastive loss needs the whole batch at once, expected 1")
        require_numbers(self, learning_rate=(0, math.inf), weight_decay=(0, math.inf), warmup_steps=(0, LARGEST))
        if not 256 <= self.text_vocab_size <= 1 << 24:
            raise ConfigError(f"text_vocab_size: expected 256 to {1 << 24}, got {self.text_vocab_size}")
        if not 0 <= self.bpe_dropout < 1:
            raise ConfigError(f"bpe_dropout: expected a number in [0, 1), got {self.bpe_dropout}")
        if self.model.architecture != TINY:
            raise ConfigError(f'model.architecture: only "{TINY}" is trained here, got {self.model.architecture!r}')


class CLIPRecipe(Recipe):
    """Symmetric contrastive cross-entropy over the batch."""

    kind = "clip"

    def __init__(self, config: CLIPTrainConfig, device: torch.device, world: World | None = None) -> None:
        super().__init__(config, device, world)
        self.image_size = config.model.image_size
        self.dataset = self.open_data()
        tokenizer = Tokenizer.train(self.dataset.captions, config.text_vocab_size)
        self.model = CLIP(config.model, tokenizer).to(device)

    def optimizer(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        config = self.config
        return torch.optim.AdamW(
            groups, config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
        )

    def learning_rate(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            return warmup_linear(step, config.learning_rate, config.warmup_steps)
        rest = max(self.loop.steps - config.warmup_steps, 1)
        return cosine(step - config.warmup_steps, config.learning_rate, 0.0, rest)

    def prepare(self, step: int) -> dict[str, Any]:
        batch = self.batch(step)
        captions = [*chain(*self.world.gather(batch.captions))]
        return {"images": batch.images.to(self.device).float() / 255, "captions": captions}

    def loss(self, inputs, rows, step):
        # a picture is compared with the captions of all ranks
        loss = self.model.loss(inputs["images"], inputs["captions"], self.rows, self.world.gather_rows)
        return loss, {}

    def evaluate(self) -> dict[str, float]:
        """How often a held-out caption finds its picture among up to 256 held-out ones."""
        dataset = self.open_data("heldout")
        batch = load_batch(dataset, range(min(256, len(dataset))), size=self.image_size)
        images = self.model.encode_image(batch.images.to(self.device).float() / 255)
        best = (self.model.encode_text(batch.captions) @ images.t()).argmax(dim=1).tolist()
        hits = [batch.captions[j] == caption for j, caption in zip(best, batch.captions, strict=True)]
        return {"retrieval": sum(hits) / len(hits)}
