# SPDX-License-Identifier: MIT
"""Codes that are clusters of patches: an encoder learns to name, a decoder to draw, a transformer to order them.

The relaxation of the paper finds its codes slowly: they come alive one by one. Clusters of patches (k-means) all mean
something from the first update, need seconds, and leave no gap between the codes that a transformer is trained on and
those that the decoder knows. What comes out is a dVAE like any other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..data import PairDataset, load_batch, sample_indices
from ..errors import CheckpointError
from ..models import DVAEConfig
from ..models.store import read_tensors, serialize, write_atomic
from ..nn import logit_laplace_nll, map_pixels
from ..optim.dion import Dion
from ..parallel.world import World
from .codes import nearest
from .dalle import DALLERecipe, DALLETrainConfig
from .dvae import DVAERecipe, DVAETrainConfig


def patches_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, H / side, W / side, 3 * side * side] in [0, 1]."""
    x = images.unflatten(2, (-1, side)).unflatten(4, (-1, side))  # [B, 3, h, side, w, side]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).float() / 255


def fit_codes(dataset: PairDataset, model: DVAEConfig, seed: int, num_patches: int = 150_000, rounds: int = 15):
    """k-means of a data set's patches; code 0 is white, which a quarter of all patches are.

    Args:
        dataset: pictures.
        model: its `vocab_size` clusters of patches of its `downsampling` pixels a side.
        seed: of the pictures, the patches and the first centres.
        num_patches: that are clustered, white ones aside.
        rounds: of assigning and averaging.

    Returns:
        float32 [V, 3 * side * side].
    """
    generator = torch.Generator().manual_seed(seed)
    order = sample_indices(seed, 0, len(dataset), len(dataset))
    parts, count = [], 0
    for begin in range(0, len(order), 256):
        batch = load_batch(dataset, order[begin : begin + 256], size=model.image_size)
        part = patches_of(batch.images, model.downsampling).flatten(0, 2)
        part = part[(part < 0.99).any(dim=1)]
        parts.append(part[torch.randperm(len(part), generator=generator)[: len(part) // 2]])
        count += len(parts[-1])
        if count >= num_patches:
            break
    points = torch.cat(parts)[:num_patches]
    first = torch.randperm(len(points), generator=generator)[: model.vocab_size - 1]
    centres = torch.cat([torch.ones(1, points.shape[1]), points[first]])
    for _ in range(rounds):
        owner = nearest(points, centres)
        size = torch.bincount(owner, minlength=len(centres))
        total = torch.zeros_like(centres).index_add_(0, owner, points)
        empty = size == 0
        centres = total / size.clamp(min=1)[:, None]
        again = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        centres[empty] = points[again]
        centres[0] = 1
    return centres


class PatchCodes:
    """The clusters, and which one each patch of a picture belongs to."""

    def __init__(self, centres: torch.Tensor, side: int) -> None:
        self.centres, self.side = centres, side

    @classmethod
    def load(cls, path: Path, side: int) -> PatchCodes:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: missing or damaged.
        """
        return cls(read_tensors(path)["centres"], side)

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, serialize({"centres": self.centres}))

    @property
    def hash(self) -> str:
        """SHA-256 of the clusters."""
        return hashlib.sha256(self.centres.numpy().tobytes()).hexdigest()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> [B, h, w] int64."""
        points = patches_of(images, self.side)
        return nearest(points.flatten(0, 2), self.centres).view(points.shape[:3])


class PatchDVAERecipe(DVAERecipe):
    """The encoder learns to name the cluster of each patch (cross-entropy), the decoder to draw pictures from them."""

    def __init__(
        self, config: DVAETrainConfig, device: torch.device, codes: PatchCodes, world: World | None = None
    ) -> None:
        super().__init__(config, device, world)
        self.codes = codes
        # a codebook that begins with what its codes look like: their largest principal components
        centred = codes.centres - codes.centres.mean(dim=0)
        components = torch.linalg.svd(centred, full_matrices=False)[0]
        stem = self.model.decoder.blocks.input
        count = min(stem.w.shape[0], components.shape[1])
        with torch.no_grad():
            values = components[:, :count] * len(centred) ** 0.5
            stem.w[:count, :, 0, 0] = values.t() * values.new_tensor([0.85**i for i in range(count)])[:, None] * 2

    def prepare(self, step: int) -> dict[str, Any]:
        batch = self.batch(step)
        images = batch.images.to(self.device, non_blocking=True)
        labels = self.codes.encode(batch.images).to(self.device)
        return {"images": images.contiguous(memory_format=torch.channels_last).float() / 255, "labels": labels}

    def loss(self, inputs, rows, step):
        images, labels = inputs["images"][rows], inputs["labels"][rows]
        named = F.cross_entropy(self.model.encode_logits(images).float(), labels)
        stem, *rest = self.model.decoder.blocks
        x = F.embedding(labels, stem.w[:, :, 0, 0].t()) + stem.b  # [B, h, w, n_init]
        x = x.permute(0, 3, 1, 2)
        for block in rest:
            x = block(x)
        nll = logit_laplace_nll(x, map_pixels(images)).mean()
        error = (self.model.reconstruction(x.detach()) - images).square().mean()
        return nll + named, {"nll": nll.detach(), "named": named.detach(), "drawn_mse": error}

    def evaluate(self) -> dict[str, float]:
        images = self._heldout(256)
        labels = self.codes.encode((images * 255).round().to(torch.uint8).cpu()).to(images.device)
        tokens = torch.cat([self.model.encode(part) for part in images.split(64)])
        found = {"mse": tokens, "drawn_mse": labels}
        values = {}
        for name, chosen in found.items():
            decoded = torch.cat([self.model.decode(part) for part in chosen.split(64)])
            values[name] = float((decoded - images).square().mean())
        return {
            **values,
            "right": float((tokens == labels).float().mean()),
            "codes_used": float(tokens.unique().numel()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"codes": self.codes.hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["codes"] != self.codes.hash:
            raise CheckpointError("this dVAE was trained on other codes than those of now; choose another run folder")


class PatchDALLERecipe(DALLERecipe):
    """The transformer on the clusters themselves; Dion for the matrices of its blocks."""

    def __init__(
        self,
        config: DALLETrainConfig,
        device: torch.device,
        codes: PatchCodes,
        dvae: Path,
        world: World | None = None,
    ) -> None:
        super().__init__(config, device, world, dvae)
        self.codes = codes
        self.dvae_id = codes.hash  # the decoder may go on learning; the codes stay

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.codes.encode(images.cpu()).flatten(1).to(self.device)

    def optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        blocks = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        chosen = set(map(id, blocks))
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        groups = [{"params": blocks}, {"params": others, "weight_decay": 0.0, "rank": 0}]
        return Dion(groups, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)

    def learning_rate(self, step: int) -> float:
        """A linear warm-up, a level stretch, and over the last third of all updates a line to a twentieth."""
        config = self.config
        last = config.loop.steps // 3
        left = max(config.loop.steps - step, 0) / max(last, 1)
        return config.learning_rate * min((step + 1) / max(config.warmup_steps, 1), 1.0, 0.05 + 0.95 * left)
