# SPDX-License-Identifier: MIT
"""Stage 1: the dVAE (paper section 2.1, appendix A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..data import load_batch
from ..errors import ConfigError, require_ints, require_numbers
from ..models import DVAE, DVAEConfig
from ..optim.schedules import cosine
from ..parallel.world import World
from ..sample import contact_sheet, to_uint8
from .config import LARGEST, DataConfig, LoopConfig, require_betas
from .recipe import Recipe


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
    """Temperature after tau_steps, from 1 along a cosine."""
    tau_steps: int = 150_000
    """Updates of the temperature's cosine."""
    weight_decay: float = 1e-4
    """AdamW's decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""

    def __post_init__(self) -> None:
        self.loop.refuse_transformer_options("dvae")
        if not 0 < self.final_tau <= 1:
            raise ConfigError(f"final_tau: expected a number in (0, 1], got {self.final_tau}")
        rates = ("learning_rate", "beta", "weight_decay", "final_learning_rate")
        require_numbers(self, **dict.fromkeys(rates, (0, math.inf)))
        require_ints(self, **dict.fromkeys(("learning_rate_steps", "beta_steps", "tau_steps"), LARGEST))
        require_betas(self.betas)


class DVAERecipe(Recipe):
    """Relaxed evidence lower bound with annealed temperature and KL weight."""

    kind = "dvae"

    def __init__(self, config: DVAETrainConfig, device: torch.device, world: World | None = None) -> None:
        super().__init__(config, device, world)
        self.image_size = config.model.image_size
        self.dataset = self.open_data()
        self.model = DVAE(config.model).to(device, memory_format=torch.channels_last)

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
        out = self.model(
            inputs["images"][rows],
            tau=cosine(step, 1.0, config.final_tau, config.tau_steps),
            beta=cosine(step, 0.0, config.beta, config.beta_steps),
            seed=self.loop.seed,
            offset=step,
            row_offset=(self.rows.start + rows.start) * cells,
        )
        return out.loss, {"nll": out.nll, "kl": out.kl}

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
