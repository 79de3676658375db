# SPDX-License-Identifier: MIT
"""The contrastive model that ranks samples (paper section 2.6): open_clip's, by name or a tiny one trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Tokenizer
from ..errors import CheckpointError, ConfigError, require_ints, shown

TINY = "tiny"


@dataclass(frozen=True)
class CLIPConfig:
    """Which contrastive model; the sizes count for architecture "tiny" alone."""

    architecture: str = TINY
    """"tiny", or a name of open_clip such as "ViT-B-32"."""
    checkpoint: str = ""
    """Local weights for a named architecture (.safetensors, .bin or .pt); nothing is ever downloaded."""
    image_size: int = 32
    """Side of the pictures it looks at, in pixels."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    width: int = 128
    """Channels of both towers."""
    num_layers: int = 3
    """Layers of each tower."""
    num_heads: int = 4
    """Heads of each tower."""
    embed_dim: int = 64
    """Channels of the common space."""
    text_len: int = 32
    """Text tokens, the end token included."""

    def __post_init__(self) -> None:
        for name in ("architecture", "checkpoint"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: expected a string, got {shown(getattr(self, name))}")
        require_ints(
            self,
            image_size=1 << 12,
            patch_size=1 << 12,
            width=1 << 14,
            num_layers=256,
            num_heads=1 << 10,
            embed_dim=1 << 14,
            text_len=1 << 12,
        )
        if self.text_len < 2:
            raise ConfigError(f"text_len: expected at least 2, got {self.text_len!r}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"patch_size: expected a divisor of image_size {self.image_size}, got {self.patch_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads: expected a divisor of width {self.width}, got {self.num_heads}")


class CLIP(nn.Module):
    """Image and text towers with a common space; scores are cosine similarities.

    Args:
        config: which model.
        tokenizer: the captions' BPE; needed for "tiny", unused by named architectures, which bring their own.

    Raises:
        ConfigError: the architecture is unknown, or "tiny" came without a tokenizer.
        CheckpointError: the checkpoint file is missing or does not fit.
    """

    def __init__(self, config: CLIPConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        import open_clip  # slow to import, and only rerankers need it

        self.config = config
        self.tokenizer = tokenizer
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        if config.architecture == TINY:
            if tokenizer is None:
                raise ConfigError('tokenizer: architecture "tiny" reads captions with the BPE of its data; give one')
            from open_clip.model import CLIPTextCfg, CLIPVisionCfg

            vision = CLIPVisionCfg(
                layers=config.num_layers,
                width=config.width,
                head_width=config.width // config.num_heads,
                patch_size=config.patch_size,
                image_size=config.image_size,
            )
            text = CLIPTextCfg(
                context_length=config.text_len,
                vocab_size=tokenizer.vocab_size + 2,  # 0 is padding, the last id ends a caption
                width=config.width,
                heads=config.num_heads,
                layers=config.num_layers,
            )
            self.model = open_clip.CLIP(config.embed_dim, vision, text)
            self.image_size = config.image_size
            self._tokenize = self._tokenize_tiny
        else:
            self.model, self.image_size, (mean, std) = _named(config)
            self._tokenize = open_clip.get_tokenizer(config.architecture)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def _tokenize_tiny(self, captions: list[str]) -> torch.Tensor:
        ids = self.tokenizer.encode(captions, self.config.text_len - 1) + 1  # -1 (none) becomes 0 (padding)
        ids = F.pad(ids, (0, 1))
        ends = (ids > 0).sum(dim=1, keepdim=True)
        return ids.scatter(1, ends, self.tokenizer.vocab_size + 1)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] floating in [0, 1], any size -> unit vectors [B, embed_dim]."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected floating [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self.model.encode_image((images - self.mean) / self.std, normalize=True).float()

    def encode_text(self, captions: list[str]) -> torch.Tensor:
        """Captions -> unit vectors [B, embed_dim]."""
        tokens = self._tokenize(captions).to(self.mean.device)
        return self.model.encode_text(tokens, normalize=True).float()

    @torch.no_grad()
    def score(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Cosine similarity of each picture with its caption, [B]; one caption counts for all pictures."""
        if len(captions) not in (1, images.shape[0]):
            raise ValueError(f"captions: expected 1 or {images.shape[0]}, got {len(captions)}")
        return (self.encode_image(images) * self.encode_text(captions)).sum(dim=1)

    def loss(
        self,
        images: torch.Tensor,
        captions: list[str],
        rows: range | None = None,
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> torch.Tensor:
        """Symmetric cross-entropy over the batch; equal captions count as matches of each other's pictures.

        Args:
            images: [n, 3, H, W] floating in [0, 1].
            captions: of the whole batch.
            rows: those of the batch that `images` holds; None: all.
            gather: vectors [n, embed_dim] of these rows -> those of the whole batch, with their gradient.

        Returns:
            Mean over the rows.
        """
        rows = range(len(captions)) if rows is None else rows
        own = slice(rows.start, rows.stop)
        image, text = self.encode_image(images), self.encode_text(captions[own])
        scale = self.model.logit_scale.exp()
        ids = {caption: i for i, caption in enumerate(captions)}
        group = torch.tensor([ids[caption] for caption in captions], device=image.device)
        same = (group[own, None] == group[None]).to(image.dtype)
        target = same / same.sum(dim=1, keepdim=True)
        by_image = F.cross_entropy(scale * image @ gather(text).t(), target)
        by_text = F.cross_entropy(scale * text @ gather(image).t(), target)
        return (by_image + by_text) / 2


def _named(config: CLIPConfig):
    import open_clip

    if config.architecture not in open_clip.list_models():
        raise ConfigError(
            f'architecture: expected "{TINY}" or a model of open_clip (such as ViT-B-32), got {config.architecture!r}'
        )
    if not config.checkpoint:
        raise ConfigError(f"checkpoint: architecture {config.architecture} needs local weights, got none")
    if not Path(config.checkpoint).is_file():
        raise CheckpointError(f"{config.checkpoint}: no such file (checkpoint of {config.architecture})")
    model = open_clip.create_model(config.architecture, pretrained=None)
    try:
        open_clip.load_checkpoint(model, config.checkpoint, weights_only=True)
    except Exception as error:  # whatever the file's reader raises: the file is the user's
        raise CheckpointError(f"{config.checkpoint}: not weights of {config.architecture} ({error})") from error
    size = model.visual.image_size
    preprocess = getattr(model.visual, "preprocess_cfg", None) or {}
    mean = preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)
    std = preprocess.get("std", open_clip.OPENAI_DATASET_STD)
    return model, size[0] if isinstance(size, (tuple, list)) else size, (mean, std)
