# SPDX-License-Identifier: MIT
"""Stage 1: the dVAE (paper section 2.1, appendix A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..data import load_batch, sample_indices
from ..errors import ConfigError, require_ints, require_numbers
from ..models import DVAE, DVAEConfig
from ..optim.schedules import cosine
from ..parallel.world import World
from ..sample import contact_sheet, to_uint8
from .codes import CodeTeacher
from .config import LARGEST, DataConfig, LoopConfig, require_betas
from .recipe import Recipe

_PICTURES_FOR_CODES = 512


@dataclass(frozen=True)
class DVAETrainConfig:
    """Stage 1; the defaults of the schedule are the paper's, whose run takes 3,000,000 updates of 512 pictures."""

    data: DataConfig = field(default_factory=lambda: DataConfig(augment="stage1"))
    loop: LoopConfig = field(default_factory=LoopConfig)
    model: DVAEConfig = field(default_factory=DVAEConfig)
    learning_rate: float = 1e-4
    """Step size of the first update."""
    final_learning_rate: float = 1.25e-6
    """Step size after learning_rate_steps, along a cosine."""
    learning_rate_steps: int = 1_200_000
    """Updates of the step size's cosine."""
    beta: float = 6.6
    """Weight of the KL term after beta_steps, from 0 along a cosine."""
    beta_steps: int = 5_000
    """Updates of the KL weight's cosine."""
    final_tau: float = 1 / 16
    """Temperature after tau_steps, from initial_tau along a cosine."""
    initial_tau: float = 1.0
    """Temperature of the first update."""
    tau_steps: int = 150_000
    """Updates of the temperature's cosine."""
    weight_decay: float = 1e-4
    """AdamW's decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    teacher_weight: float = 0.0
    """Weight of a cross-entropy that teaches the encoder codes found by k-means on pixels (`train.codes`), all in use
    from the start; 0 as in the paper. For runs too short to find codes of their own."""

    def __post_init__(self) -> None:
        self.loop.refuse_transformer_options("dvae")
        if not 0 < self.final_tau <= 1:
            raise ConfigError(f"final_tau: expected a number in (0, 1], got {self.final_tau}")
        rates = ("learning_rate", "beta", "weight_decay", "final_learning_rate", "teacher_weight")
        require_numbers(self, **dict.fromkeys(rates, (0, math.inf)), initial_tau=(0, math.inf))
        require_ints(self, **dict.fromkeys(("learning_rate_steps", "beta_steps", "tau_steps"), LARGEST))
        require_betas(self.betas)
        if self.initial_tau < self.final_tau:
            raise ConfigError(f"initial_tau: expected at least final_tau {self.final_tau}, got {self.initial_tau}")


class DVAERecipe(Recipe):
    """Relaxed evidence lower bound with annealed temperature and KL weight."""

    kind = "dvae"

    def __init__(self, config: DVAETrainConfig, device: torch.device, world: World | None = None) -> None:
        super().__init__(config, device, world)
        self.image_size = config.model.image_size
        self.dataset = self.open_data()
        self.model = DVAE(config.model).to(device, memory_format=torch.channels_last)
        self.teacher = self._find_codes() if config.teacher_weight else None

    def _find_codes(self) -> CodeTeacher:
        """From pictures that the seed chooses; the same on all ranks."""
        seed, count = self.loop.seed, min(_PICTURES_FOR_CODES, len(self.dataset))
        chosen = sample_indices(seed, 0, count, len(self.dataset))
        images = load_batch(self.dataset, chosen, size=self.image_size).images.to(self.device).float() / 255
        model = self.config.model
        teacher = CodeTeacher(images, model.vocab_size, model.downsampling, seed)
        self.world.spread(teacher.centres)
        teacher.set_codebook(self.model, seed)
        return teacher

    def optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            self.model.parameters(),
            config.learning_rate,
            betas=config.betas,
            eps=1e-8,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def learning_rate(self, step: int) -> float:
        config = self.config
        return cosine(step, config.learning_rate, config.final_learning_rate, config.learning_rate_steps)

    def prepare(self, step: int) -> dict[str, Any]:
        batch = self.batch(step)
        images = batch.images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return {"images": images.float() / 255}

    def loss(self, inputs, rows, step):
        config = self.config
        cells = self.model.grid[0] * self.model.grid[1]
        images = inputs["images"][rows]
        out = self.model(
            images,
            tau=cosine(step, config.initial_tau, config.final_tau, config.tau_steps),
            beta=cosine(step, 0.0, config.beta, config.beta_steps),
            seed=self.loop.seed,
            offset=step,
            row_offset=(self.rows.start + rows.start) * cells,
            targets=None if self.teacher is None else self.teacher.tokens(images),
        )
        if self.teacher is None:
            return out.loss, {"nll": out.nll, "kl": out.kl}
        loss = out.loss + config.teacher_weight * out.taught
        return loss, {"nll": out.nll, "kl": out.kl, "taught": out.taught.detach()}

    def _heldout(self, count: int) -> torch.Tensor:
        dataset = self.open_data("heldout")
        batch = load_batch(dataset, range(min(count, len(dataset))), size=self.image_size)
        return batch.images.to(self.device).float() / 255

    def evaluate(self) -> dict[str, float]:
        images = self._heldout(256)
        tokens = torch.cat([self.model.encode(part) for part in images.split(64)])
        decoded = torch.cat([self.model.decode(part) for part in tokens.split(64)])
        return {
            "mse": float((decoded - images).square().mean()),
            "codes_used": float(tokens.unique().numel()),
        }

    def pictures(self) -> Image.Image | None:
        images = self._heldout(16)
        decoded = self.model.decode(self.model.encode(images))
        return contact_sheet([list(to_uint8(images)), list(to_uint8(decoded))], ["held-out pictures", "reconstructed"])
