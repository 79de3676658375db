# SPDX-License-Identifier: MIT
"""Stage 2: the transformer on captions and dVAE tokens (paper section 2.2, appendix B, D)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from ..data import PairDataset, Tokenizer, load_batch
from ..errors import CheckpointError, ConfigError, require_numbers
from ..models import DALLE, DVAE, DALLEConfig
from ..models.store import find_latest, load_model, read_json
from ..nn import Noise
from ..ops import philox
from ..optim import AdamW16, Dion, ResblockGradScaler
from ..optim.schedules import PlateauHalving, cosine, warmup_linear
from ..parallel.world import World
from ..sample import SampleOptions, contact_sheet, generate_tokens, to_uint8
from .config import LARGEST, DataConfig, LoopConfig, require_betas
from .recipe import Recipe

# Data sets up to this size are encoded once when nothing is augmented.
_MAX_TOKEN_TABLE = 1 << 20


@dataclass(frozen=True)
class DALLETrainConfig:
    """Stage 2; the defaults of the schedule are the paper's, whose run takes 430,000 updates of 1024 pairs."""

    data: DataConfig = field(default_factory=lambda: DataConfig(augment="stage2"))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(clip_norm=4.0, ema_decay=0.99, ema_every=25))
    model: DALLEConfig = field(default_factory=DALLEConfig)
    dvae: str = ""
    """Run folder of the dVAE; empty: `dvae` beside this run's folder."""
    learning_rate: float = 4.5e-4
    """Peak step size."""
    warmup_steps: int = 5_000
    """Updates of the linear warm-up."""
    schedule: str = "plateau"
    """After the warm-up: "plateau" halves at training-loss plateaus, five times in all; "cosine" falls to a tenth."""
    optimizer: str = "adamw16"
    """"adamw16" (16-bit moments), "adamw", or "dion": orthonormalised momentum for the matrices of the resblocks, for
    small models (`optim.Dion`), and AdamW16 for the rest."""
    dion_rank: int = 64
    """Directions of an update by Dion."""
    dion_lr_scale: float = 2.0
    """Step size of what Dion updates, in those of AdamW16."""
    betas: tuple[float, float] = (0.9, 0.96)
    """AdamW's moments."""
    weight_decay: float = 4.5e-2
    """AdamW's decay."""
    bpe_dropout: float = 0.1
    """Share of merges that training leaves out."""
    caption_dropout: float = 0.0
    """Share of captions that training replaces by pads; sampling with guidance needs some."""

    def __post_init__(self) -> None:
        for name in ("bpe_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        require_numbers(self, learning_rate=(0, math.inf), weight_decay=(0, math.inf), warmup_steps=(0, LARGEST))
        require_betas(self.betas)
        if self.schedule not in ("plateau", "cosine"):
            raise ConfigError(f"schedule: expected plateau or cosine, got {self.schedule!r}")
        if self.optimizer not in ("adamw16", "adamw", "dion"):
            raise ConfigError(f"optimizer: expected adamw16, adamw or dion, got {self.optimizer!r}")
        if self.optimizer == "dion" and self.loop.shard > 1:
            raise ConfigError(
                f"optimizer: dion needs whole matrices; expected loop.shard 1, got {self.loop.shard} (adamw16 can)"
            )
        if self.dion_rank < 1:
            raise ConfigError(f"dion_rank: expected at least 1, got {self.dion_rank}")
        if self.dion_lr_scale < 0:
            raise ConfigError(f"dion_lr_scale: expected 0 or more, got {self.dion_lr_scale}")


class DALLERecipe(Recipe):
    """Cross-entropy of text and image tokens; the dVAE is frozen and gives its argmax tokens."""

    kind = "dalle"

    def __init__(
        self,
        config: DALLETrainConfig,
        device: torch.device,
        world: World | None = None,
        dvae: str | Path | None = None,
    ) -> None:
        super().__init__(config, device, world)
        folder = Path(dvae or config.dvae)
        self.dvae: DVAE = load_model(folder, expect="dvae").to(device, memory_format=torch.channels_last)
        self.dvae.requires_grad_(False)
        self.dvae_id = _identity(folder)
        model = config.model
        if self.dvae.config.vocab_size != model.image_vocab_size or self.dvae.grid != model.grid:
            raise ConfigError(
                f"model: {model.image_vocab_size} codes on grid {model.grid}, but the dVAE in {folder} has "
                f"{self.dvae.config.vocab_size} on {self.dvae.grid}"
            )
        self.image_size = self.dvae.config.image_size
        self.dataset = self.open_data()
        self.model = DALLE(model).to(device)
        self.model.tokenizer = Tokenizer.train(self.dataset.captions, model.text_vocab_size)
        self.model.set_checkpointing(config.loop.checkpointing)
        self.plateau = PlateauHalving() if config.schedule == "plateau" else None
        self._table: list[Any] | None = None  # tokens [n, h * w], captions
        self._evaluation: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def optimizer(self) -> torch.optim.Optimizer:
        # gains, biases and embeddings are not decayed; the paper does not say
        weights = [p for name, p in self.model.named_parameters() if p.dim() == 2 and ".weight" in name]
        chosen = set(map(id, weights))
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        config = self.config
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        if config.optimizer == "dion":
            inner = {id(p) for p in self.model.blocks.parameters()}
            matrices = [p for p in weights if id(p) in inner]
            groups[0]["params"] = [p for p in weights if id(p) not in inner]
            groups.append({"params": matrices, "rank": config.dion_rank, "lr_scale": config.dion_lr_scale})
            return Dion(groups, config.learning_rate, rank=0, betas=config.betas, weight_decay=config.weight_decay)
        if config.optimizer == "adamw16":
            return AdamW16(groups, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        return torch.optim.AdamW(
            groups, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def gradient_scaler(self) -> ResblockGradScaler | None:
        if self.loop.precision != "fp16-resblock":
            return None

        def share(flags: torch.Tensor) -> None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.world.shards)

        scaler = ResblockGradScaler(
            self.model.resblock_parameters(),
            reduce_flags=None if self.world.num_shards == 1 else share,
        )
        self.model.set_gradient_scales(scaler.scales)
        return scaler

    def learning_rate(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            return warmup_linear(step, config.learning_rate, config.warmup_steps)
        if self.plateau is not None:
            return config.learning_rate * self.plateau.factor
        rest = max(self.loop.steps - config.warmup_steps, 1)
        return cosine(step - config.warmup_steps, config.learning_rate, config.learning_rate / 10, rest)

    def after_step(self, loss: float) -> None:
        if self.plateau is not None:
            self.plateau.update(loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "dvae": self.dvae_id,
            "tokenizer": self.model.tokenizer.hash,
            "plateau": self.plateau.state_dict() if self.plateau else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["dvae"] != self.dvae_id:
            raise CheckpointError(
                "this transformer was trained on the tokens of another dVAE than the one given now; going on would "
                "mix two code books. Choose another run folder."
            )
        if state["tokenizer"] != self.model.tokenizer.hash:
            raise CheckpointError("the captions now give another tokenizer than this run began with")
        if self.plateau is not None and state["plateau"]:
            self.plateau.load_state_dict(state["plateau"])

    # ---- data

    @torch.no_grad()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> tokens [B, h * w]."""
        parts = [
            self.dvae.encode(part.to(self.device).contiguous(memory_format=torch.channels_last).float() / 255)
            for part in images.split(64)
        ]
        return torch.cat(parts).flatten(1)

    def _encode_dataset(self, dataset: PairDataset) -> tuple[torch.Tensor, list[str], list[str]]:
        """Tokens, captions, and what could not be read."""

        def encode(begin: int) -> tuple[torch.Tensor, list[str], list[str]]:
            batch = load_batch(dataset, range(begin, min(begin + 256, len(dataset))), size=self.image_size)
            return self._encode(batch.images).cpu(), batch.captions, batch.replaced

        starts = range(0, len(dataset), 256)
        mine = {begin: encode(begin) for begin in starts[self.world.rank :: self.world.size]}
        parts = {begin: part for found in self.world.gather(mine) for begin, part in found.items()}
        tokens, captions, replaced = zip(*(parts[begin] for begin in starts), strict=True)
        return torch.cat(tokens).to(self.device), [*chain(*captions)], [*chain(*replaced)]

    def _tokens(self, step: int) -> tuple[torch.Tensor, list[str]]:
        if self.data.augment != "none" or len(self.dataset) > _MAX_TOKEN_TABLE:
            batch = self.batch(step)
            return self._encode(batch.images), batch.captions
        if self._table is None:
            *self._table, replaced = self._encode_dataset(self.dataset)
            if step == 0 and self.world.is_first:  # a resumed run has listed them
                self.replaced += replaced
                self.examined += len(self.dataset)
        indices = self.indices(step)
        tokens, captions = self._table
        return tokens[torch.as_tensor(indices)], [captions[i] for i in indices]

    def prepare(self, step: int) -> dict[str, Any]:
        image, captions = self._tokens(step)
        size, config = self.loop.batch_size, self.config
        text = self.model.tokenizer.encode(
            captions,
            config.model.text_len,
            dropout=config.bpe_dropout,
            seed=self.loop.seed,
            counters=self.positions(step),
        )
        if config.caption_dropout:
            # row 0 of this key's noise; its counters never meet the Gumbel noise of another seed
            u = philox.uniform(self.loop.seed ^ 0x63617074, step, 1, size)[0, self.rows.start : self.rows.stop]
            text[u < config.caption_dropout] = -1
        counted = (text >= 0).sum()
        return {"text": text.to(self.device), "image": image, "counted": int(self.world.sum(counted))}

    def loss(self, inputs, rows, step):
        text, image = inputs["text"], inputs["image"]
        first = self.rows.start + rows.start
        noise = Noise(self.loop.seed ^ 0x64726F70, step * 2 * self.config.model.num_layers, first)  # a seed of its own
        out = self.model.loss(text[rows], image[rows], noise)
        loss = out.loss
        text_loss = out.text_loss
        parts = self.loop.accumulate * self.world.size
        if parts > 1 and not self.config.model.predict_pads:
            # parts differ in text tokens, and the text loss is a mean over those of the whole batch
            share = (text[rows] >= 0).sum() * parts / max(inputs["counted"], 1)
            loss = loss + self.config.model.text_loss_weight * (share - 1) * out.text
            text_loss = text_loss * share
        return loss, {"text_loss": text_loss, "image_loss": out.image_loss}

    # ---- looking

    def evaluation_set(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(text [n, T], tokens [n, h * w]) of up to 512 pairs of a split."""
        if split not in self._evaluation:
            dataset = self.open_data(split)
            batch = load_batch(dataset, range(min(512, len(dataset))), size=self.image_size)
            text = self.model.tokenizer.encode(batch.captions, self.config.model.text_len)
            self._evaluation[split] = (text.to(self.device), self._encode(batch.images))
        return self._evaluation[split]

    def evaluate(self) -> dict[str, float]:
        values = {}
        for split in ("seen", "heldout"):
            text, tokens = self.evaluation_set(split)
            total = 0.0
            for begin in range(0, text.shape[0], 64):
                part = slice(begin, begin + 64)
                total += float(self.model.loss(text[part], tokens[part]).image_loss) * text[part].shape[0]
            values[f"{split}_image_loss"] = total / text.shape[0]
        return values

    def pictures(self) -> Image.Image | None:
        dataset = self.open_data("heldout")
        indices = [i * len(dataset) // 6 for i in range(min(6, len(dataset)))]
        batch = load_batch(dataset, indices, size=self.image_size)
        options = SampleOptions(num_samples=6, temperature=0.7, seed=self.loop.seed)
        rows = []
        for i, caption in enumerate(batch.captions):
            text = self.model.tokenizer.encode([caption], self.config.model.text_len)[0].to(self.device)
            tokens = generate_tokens(self.model, text, options)
            images = self.dvae.decode(tokens.unflatten(1, self.model.config.grid))
            rows.append([*to_uint8(batch.images[i : i + 1].float() / 255), *to_uint8(images)])
        return contact_sheet(rows, batch.captions, headers=["held out"] + ["sample"] * 6)


def _identity(folder: Path) -> str:
    """SHA-256 of the weights that give the tokens."""
    checkpoint = folder if (folder / "manifest.json").exists() else find_latest(folder)
    if checkpoint is None:  # load_model has complained already
        raise CheckpointError(f"{folder}: no checkpoint of a dVAE")
    files = read_json(checkpoint / "manifest.json")["files"]
    return files.get("ema.safetensors", files["model.safetensors"])["sha256"]
