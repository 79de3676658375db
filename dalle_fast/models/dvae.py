# SPDX-License-Identifier: MIT
"""The discrete VAE: pictures to a grid of codes and back (paper section 2.1, appendix A)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..errors import ConfigError, require_ints
from ..nn import (
    Conv2d,
    DecoderBlock,
    EncoderBlock,
    MaxPool2d,
    full_precision,
    logit_laplace_nll,
    map_pixels,
    unmap_pixels,
)
from ..ops import vq_bottleneck


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes of a dVAE; the defaults are the paper's."""

    image_size: int = 256
    """Side of the square pictures in pixels."""
    num_groups: int = 4
    """Groups of blocks; all but the last halve the side, so the token grid is image_size / 2^(num_groups - 1)."""
    blocks_per_group: int = 2
    """Residual blocks in a group."""
    width: int = 256
    """Channels of the first encoder group; each group doubles them."""
    vocab_size: int = 8192
    """Codes."""
    decoder_init_width: int = 128
    """Channels of the codebook, the decoder's first 1x1 convolution."""

    def __post_init__(self) -> None:
        require_ints(
            self,
            image_size=1 << 14,
            num_groups=12,
            blocks_per_group=64,
            width=1 << 14,
            vocab_size=1 << 22,
            decoder_init_width=1 << 16,
        )
        if self.image_size % self.downsampling:
            raise ConfigError(f"image_size: expected a multiple of {self.downsampling}, got {self.image_size}")
        if self.width % 4:
            raise ConfigError(f"width: expected a multiple of 4, got {self.width}")

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return 2 ** (self.num_groups - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens."""
        side = self.image_size // self.downsampling
        return side, side


class DVAELoss(NamedTuple):
    """All per pixel value (divided by H * W * 3) and averaged over the batch, in nats."""

    loss: torch.Tensor
    """nll + beta * kl."""
    nll: torch.Tensor
    """Logit-Laplace negative log-likelihood."""
    kl: torch.Tensor
    """KL to the uniform prior, without beta."""
    stats: torch.Tensor
    """[B, 6, H, W] decoder output (mu, ln b), detached: for pictures and errors."""
    taught: torch.Tensor | None = None
    """Mean cross-entropy of the codes with `targets`, with its gradient; not part of the loss. None without targets."""


class _Coder(nn.Module):
    """A stack `blocks` whose state dict has the names of the released encoder and decoder."""

    def __init__(self, blocks: OrderedDict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def _group(block: type[nn.Module], num_in: int, num_out: int, config: DVAEConfig, upsample: bool = False):
    num_layers = config.num_groups * config.blocks_per_group
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(config.blocks_per_group):
        first = i == 0
        layers[f"block_{i + 1}"] = block(num_in if first else num_out, num_out, num_layers, upsample=first and upsample)
    return nn.Sequential(layers)


def _encoder(config: DVAEConfig) -> _Coder:
    blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, config.width, 7))
    num_in = config.width
    for g in range(config.num_groups):
        num_out = config.width * 2**g
        group = _group(EncoderBlock, num_in, num_out, config)
        if g + 1 < config.num_groups:
            group.add_module("pool", MaxPool2d())
        blocks[f"group_{g + 1}"] = group
        num_in = num_out
    head = Conv2d(num_in, config.vocab_size, 1, full_precision=True)
    blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
    return _Coder(blocks)


def _decoder(config: DVAEConfig) -> _Coder:
    stem = Conv2d(config.vocab_size, config.decoder_init_width, 1, full_precision=True)
    blocks: OrderedDict[str, nn.Module] = OrderedDict(input=stem)
    num_in = config.decoder_init_width
    for g in range(config.num_groups):
        num_out = config.width * 2 ** (config.num_groups - 1 - g)
        blocks[f"group_{g + 1}"] = _group(DecoderBlock, num_in, num_out, config, upsample=g > 0)
        num_in = num_out
    blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(num_in, 6, 1)))
    return _Coder(blocks)


class DVAE(nn.Module):
    """Encoder, Gumbel-softmax relaxation and decoder; the decoder's first convolution is the codebook.

    Example:
        >>> dvae = DVAE(DVAEConfig(image_size=32, num_groups=3, width=24, vocab_size=256, decoder_init_width=32))
        >>> tokens = dvae.encode(torch.rand(4, 3, 32, 32))   # [4, 8, 8] int64
        >>> images = dvae.decode(tokens)                     # [4, 3, 32, 32] in [0, 1]
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens."""
        return self.config.grid

    def encode_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Unrelaxed logits over the codes.

        Args:
            images: [B, 3, H, W] floating, in [0, 1]; H and W multiples of `config.downsampling`.

        Returns:
            [B, V, h, w] float32.

        Raises:
            TypeError: `images` is not floating.
            ValueError: the shape does not fit.
        """
        self._check(images)
        return self.encoder(map_pixels(images))

    def _check(self, images: torch.Tensor) -> None:
        side = self.config.downsampling
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating dtype in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"images: expected [B, 3, H, W] with H, W multiples of {side}, got {list(images.shape)}")

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens by plain argmax, without noise: [B, 3, H, W] in [0, 1] -> [B, h, w] int64 (section 2.2)."""
        return self.encode_logits(images).argmax(dim=1)

    def decode_soft(self, z: torch.Tensor) -> torch.Tensor:
        """Relaxed one-hot codes [B, V, h, w] -> [B, 6, H, W]: mu, then ln b, of R, G, B (appendix A.3)."""
        return self.decoder(z)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pictures of tokens: [B, h, w] int64 -> [B, 3, H, W] float32 in [0, 1].

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: wrong rank, or a token outside [0, V).
        """
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: expected int64, got {tokens.dtype}")
        if tokens.dim() != 3:
            raise ValueError(f"tokens: expected [B, h, w], got {list(tokens.shape)}")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size):
            raise ValueError(
                f"tokens: expected values in [0, {self.config.vocab_size}), got {int(tokens.min())} to "
                f"{int(tokens.max())}"
            )
        stem = self.decoder.blocks.input  # a 1x1 convolution of a one-hot is a row of its weight
        x = torch.nn.functional.embedding(tokens, stem.w[:, :, 0, 0].t()) + stem.b  # [B, h, w, n_init]
        return self.reconstruction(self.decoder.blocks[1:](x.permute(0, 3, 1, 2)))

    @staticmethod
    def reconstruction(stats: torch.Tensor) -> torch.Tensor:
        """[B, 6, H, W] decoder output -> pictures in [0, 1]; the scale ln b is ignored (appendix A.3)."""
        return unmap_pixels(torch.sigmoid(stats[:, :3].float()))

    def forward(
        self,
        images: torch.Tensor,
        *,
        tau: float,
        beta: float,
        seed: int = 0,
        offset: int = 0,
        row_offset: int = 0,
        targets: torch.Tensor | None = None,
    ) -> DVAELoss:
        """The relaxed evidence lower bound (section 2.1).

        Args:
            images: [B, 3, H, W] floating, in [0, 1].
            tau: temperature of the relaxation.
            beta: weight of the KL term.
            seed: seed of the Gumbel noise.
            offset: which noise under that seed: the training step.
            row_offset: index of the first grid cell in the global batch, for data-parallel and accumulated batches.
            targets: [B, h, w] int64, codes that the encoder is to learn; see `taught`.

        Returns:
            Scalars and the detached decoder output.
        """
        self._check(images)
        *blocks, head = self.encoder.blocks
        stem, *rest = self.decoder.blocks
        x = map_pixels(images)
        for block in blocks:
            x = block(x)
        x = head.relu(x)
        taught = None
        if targets is not None:
            with full_precision(x):
                taught = torch.nn.functional.cross_entropy(head.conv(x), targets)
        with full_precision(x):  # codes that are never laid out: z is the stem's output
            z, kl = vq_bottleneck(
                x.to(head.conv.w.dtype),
                head.conv.w,
                head.conv.b,
                stem.w,
                tau,
                seed,
                offset,
                codebook_bias=stem.b,
                row_offset=row_offset,
            )  # [B, n_init, h, w], [B, h, w]
        stats = z
        for block in rest:
            stats = block(stats)
        values = images[0].numel()
        nll = logit_laplace_nll(stats, map_pixels(images)).mean()
        kl = kl.sum() / (images.shape[0] * values)
        return DVAELoss(nll + beta * kl, nll.detach(), kl.detach(), stats.detach(), taught)
