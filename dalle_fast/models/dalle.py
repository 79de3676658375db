# SPDX-License-Identifier: MIT
"""The autoregressive transformer over text and image tokens (paper section 2.2, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..errors import ConfigError, require_ints, require_numbers, shown
from ..nn import Embedding, Noise, TransformerBlock, full_precision
from ..ops import AttentionPattern, linear_cross_entropy


@dataclass(frozen=True)
class DALLEConfig:
    """Sizes of a transformer; the defaults are the paper's 12-billion-parameter model."""

    width: int = 3968
    """Channels of the identity path."""
    num_layers: int = 64
    """Attention layers; each brings an MLP of width 4 * width."""
    num_heads: int = 62
    """Attention heads."""
    head_dim: int = 64
    """Channels of a head."""
    text_vocab_size: int = 16384
    """BPE tokens."""
    text_len: int = 256
    """Text positions, filled up with pads."""
    image_vocab_size: int = 8192
    """Codes of the dVAE."""
    grid: tuple[int, int] = (32, 32)
    """(height, width) of a picture in tokens."""
    kernel: int = 11
    """Side of the convolutional attention window of the last layer, odd."""
    text_loss_weight: float = 1 / 8
    """Share of the text cross-entropy in the loss; the image has the rest."""
    dropout: float = 0.0
    """Share of the channels of each branch that training drops; the paper has none. Small data sets want some."""
    predict_pads: bool = False
    """Whether text positions after the caption are trained to predict one extra "end" id."""

    def __post_init__(self) -> None:
        require_ints(
            self,
            width=1 << 17,
            num_layers=1 << 10,
            num_heads=1 << 12,
            head_dim=1 << 12,
            text_vocab_size=1 << 24,
            text_len=1 << 16,
            image_vocab_size=1 << 24,
        )
        sides = self.grid if isinstance(self.grid, (tuple, list)) else ()
        if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= 1 << 10 for side in sides):
            raise ConfigError(f"grid: expected (height, width), both positive ints to 1024, got {shown(self.grid)}")
        object.__setattr__(self, "grid", tuple(sides))
        if type(self.kernel) is not int or not 1 <= self.kernel < 1 << 11 or self.kernel % 2 == 0:
            raise ConfigError(f"kernel: expected a positive odd int below 2048, got {shown(self.kernel)}")
        require_numbers(self, dropout=(0, 1), text_loss_weight=(0, 1))
        if self.dropout == 1:
            raise ConfigError(f"dropout: expected a number in [0, 1), got {self.dropout!r}")
        if not isinstance(self.predict_pads, bool):
            raise ConfigError(f"predict_pads: expected a bool, got {shown(self.predict_pads)}")

    @property
    def image_len(self) -> int:
        """Tokens of a picture."""
        return self.grid[0] * self.grid[1]

    def pattern(self, layer: int) -> AttentionPattern:
        """What layer 1..num_layers attends to: convolutional in the last, column in 2, 6, 10, ..., else row."""
        if layer == self.num_layers:
            kind = "conv"
        elif (layer - 2) % 4 == 0:
            kind = "column"
        else:
            kind = "row"
        return AttentionPattern(kind, text_len=self.text_len, grid=self.grid, kernel=self.kernel)


class DALLELoss(NamedTuple):
    """Cross-entropies in nats per token."""

    loss: torch.Tensor
    """text_loss_weight * text_loss + (1 - text_loss_weight) * image_loss."""
    text_loss: torch.Tensor
    """Mean over the text tokens; 0 when there are none."""
    image_loss: torch.Tensor
    """Mean over the image tokens."""
    text: torch.Tensor
    """`text_loss` with its gradient."""


class DecodeCache(NamedTuple):
    """Keys and values of one layer: text [Bt, H, T, D] shared by B / Bt samples, image rings [B, H, R, D]."""

    text_k: torch.Tensor
    text_v: torch.Tensor
    image_k: torch.Tensor
    image_v: torch.Tensor


class DALLE(nn.Module):
    """One stream of text_len text slots and height * width image slots.

    Slot 0 is start-of-text, slots 1.. hold the caption shifted by one; a text slot without a token holds a learned pad
    of its own, an ordinary key for everybody. Slot text_len is start-of-image, then the image tokens shifted by one;
    row and column embeddings index the token that a slot predicts. The identity path is float32.

    Example:
        >>> dalle = DALLE(DALLEConfig(width=64, num_layers=2, num_heads=2, head_dim=32, text_vocab_size=100,
        ...                           text_len=8, image_vocab_size=16, grid=(4, 4)))
        >>> dalle.loss(torch.full((1, 8), -1), torch.zeros(1, 16, dtype=torch.int64)).image_loss
        tensor(2.7...)
    """

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        self.config = config
        width, (height, columns) = config.width, config.grid
        self.text_embedding = Embedding(config.text_vocab_size, width)
        self.image_embedding = Embedding(config.image_vocab_size, width)
        self.text_position = nn.Parameter(torch.empty(config.text_len, width))
        self.pad = nn.Parameter(torch.empty(config.text_len, width))
        self.row_position = nn.Parameter(torch.empty(height, width))
        self.column_position = nn.Parameter(torch.empty(columns, width))
        self.start_of_text = nn.Parameter(torch.empty(width))
        self.start_of_image = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.num_heads, config.head_dim, config.pattern(i + 1), config.dropout)
            for i in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocab_size + config.predict_pads)
        self.image_head = nn.Linear(width, config.image_vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02); projections into the identity path 0.02 / sqrt(2 num_layers); zero biases."""
        std = 0.02
        for tensor in (self.text_embedding.weight, self.image_embedding.weight, self.text_position, self.pad,
                       self.row_position, self.column_position, self.start_of_text, self.start_of_image,
                       self.text_head.weight, self.image_head.weight):  # fmt: skip
            nn.init.normal_(tensor, std=std)
        for head in (self.text_head, self.image_head):
            nn.init.zeros_(head.bias)
        for block in self.blocks:
            block.initialize(std, std * (2 * self.config.num_layers) ** -0.5)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each resblock in the backward pass instead of keeping its activations (section 2.4)."""
        for block in self.blocks:
            block.checkpointing = on

    def resblock_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each of the 2 * num_layers resblocks, attention and MLP in turn."""
        return [parameters for block in self.blocks for parameters in block.resblock_parameters()]

    def set_gradient_scales(self, scales: torch.Tensor | None) -> None:
        """Branches of `forward` in float16, gradients of resblock i times scales[i] (appendix D); None: no scales.

        Args:
            scales: float32 [2 * num_layers], kept by reference; `ResblockGradScaler.scales`.

        Raises:
            ValueError: another shape or dtype.
        """
        if scales is not None and (scales.shape != (2 * len(self.blocks),) or scales.dtype != torch.float32):
            raise ValueError(
                f"scales: expected float32 [{2 * len(self.blocks)}], got {scales.dtype} {list(scales.shape)}"
            )
        for i, block in enumerate(self.blocks):
            block.gradient_scales = None if scales is None else scales[2 * i : 2 * i + 2]

    # ---- embeddings

    def _check_text(self, text: torch.Tensor) -> None:
        if text.dtype != torch.int64:
            raise TypeError(f"text: expected int64, got {text.dtype}")
        if text.dim() != 2 or text.shape[1] != self.config.text_len:
            raise ValueError(f"text: expected [B, {self.config.text_len}], got {list(text.shape)}")
        if text.device.type == "cpu" and text.numel():
            low, high = text.aminmax()
            if int(low) < -1 or int(high) >= self.config.text_vocab_size:
                raise ValueError(
                    f"text: expected tokens in [0, {self.config.text_vocab_size}) or -1, got {int(low)} to {int(high)}"
                )

    def _check_image(self, image: torch.Tensor, batch: int) -> None:
        if image.dtype != torch.int64:
            raise TypeError(f"image: expected int64, got {image.dtype}")
        if image.dim() != 2 or image.shape[0] != batch or image.shape[1] > self.config.image_len:
            raise ValueError(f"image: expected [{batch}, n] with n <= {self.config.image_len}, got {list(image.shape)}")
        if image.device.type == "cpu" and image.numel():
            low, high = image.aminmax()
            if int(low) < 0 or int(high) >= self.config.image_vocab_size:
                raise ValueError(
                    f"image: expected tokens in [0, {self.config.image_vocab_size}), got {int(low)} to {int(high)}"
                )

    def embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """Caption tokens [B, text_len] int64, -1 where there is none -> slots 0..text_len-1 [B, text_len, width]."""
        shifted = text[:, :-1]  # [B, T - 1]; the last token is only predicted
        there = (shifted >= 0).unsqueeze(-1)
        tokens = self.text_embedding(shifted.clamp(min=0)) + self.text_position[1:]
        start = (self.start_of_text + self.text_position[0]).expand(text.shape[0], 1, -1)
        return torch.cat((start, torch.where(there, tokens, self.pad[1:])), dim=1)

    def image_position(self) -> torch.Tensor:
        """[height * width, width]: row plus column embedding of the token a slot predicts."""
        return (self.row_position[:, None] + self.column_position[None]).flatten(0, 1)

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        """The first n image tokens [B, n] -> start-of-image and the tokens that have a slot [B, min(n + 1, h w), w]."""
        tokens = self.image_embedding(image[:, : self.config.image_len - 1])
        start = self.start_of_image.expand(image.shape[0], 1, -1)
        x = torch.cat((start, tokens), dim=1)
        return x + self.image_position()[: x.shape[1]]

    # ---- training

    def forward(
        self, text: torch.Tensor, image: torch.Tensor | None = None, noise: Noise | None = None
    ) -> torch.Tensor:
        """Final states of all slots.

        Args:
            text: [B, text_len] int64, -1 where there is no token.
            image: [B, n] int64 image tokens, the first n of the picture; None for the text slots alone.
            noise: decides what dropout drops, by `offset` .. `offset + 2 * num_layers - 1`; None: torch's generator.

        Returns:
            [B, L, width] float32 after the last layer norm. State i < text_len predicts caption token i, state
            text_len + j image token j.

        Raises:
            TypeError, ValueError: a tensor has the wrong dtype, shape or, on CPU, values; the message names it. On CUDA
                the host never waits for values: the embeddings' kernels assert the range.
        """
        self._check_text(text)
        x = self.embed_text(text)
        if image is not None:
            self._check_image(image, text.shape[0])
            x = torch.cat((x, self.embed_image(image)), dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, noise and noise._replace(offset=noise.offset + 2 * i))
        return self.norm(x)

    def text_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits over the BPE vocabulary (and "end" with predict_pads)."""
        with full_precision(states):
            return self.text_head(states.float())

    def image_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits over the codes."""
        with full_precision(states):
            return self.image_head(states.float())

    def text_targets(self, text: torch.Tensor) -> torch.Tensor:
        """[B, text_len]: what text states predict; -100 where nothing counts."""
        return torch.where(text < 0, self.config.text_vocab_size if self.config.predict_pads else -100, text)

    def loss(self, text: torch.Tensor, image: torch.Tensor, noise: Noise | None = None) -> DALLELoss:
        """1/8 of the text's and 7/8 of the image's cross-entropy, each per token of its kind (section 2.2).

        Args:
            text: [B, text_len] int64, -1 where there is no token.
            image: [B, height * width] int64.
            noise: see `forward`.

        On CUDA the host does not wait for the device. A token out of range makes the loss NaN there, if the embeddings'
        kernels have not stopped at it.
        """
        if image.dim() != 2 or image.shape[1] != self.config.image_len:
            raise ValueError(f"image: expected [B, {self.config.image_len}], got {list(image.shape)}")
        states = self(text, image, noise)
        text_len = self.config.text_len
        text_states = states[:, :text_len].flatten(0, 1)
        image_states = states[:, text_len:].flatten(0, 1)
        targets = self.text_targets(text).flatten()
        weight = self.config.text_loss_weight
        with full_precision(states):  # logits are 32-bit (section 2.4)
            counted = targets != -100
            if counted.device.type == "cpu":  # the products of other rows are saved; elsewhere the host would wait
                text_states, targets = text_states[counted], targets[counted]
            text_loss = linear_cross_entropy(
                text_states.float(), self.text_head.weight, targets, self.text_head.bias, upstream=weight
            )
            text_loss = torch.where(counted.any(), text_loss, 0.0)  # a mean over nothing is NaN, its gradients are 0
            image_loss = linear_cross_entropy(
                image_states.float(), self.image_head.weight, image.flatten(), self.image_head.bias, upstream=1 - weight
            )
        loss = weight * text_loss + (1 - weight) * image_loss
        return DALLELoss(loss, text_loss.detach(), image_loss.detach(), text_loss)

    # ---- decoding

    @torch.no_grad()
    def prefill(self, text: torch.Tensor, num_samples: int, image: torch.Tensor | None = None) -> list[DecodeCache]:
        """Runs the text and the image tokens that are kept, in one pass, and makes the caches that decoding fills.

        Args:
            text: [Bt, text_len] int64.
            num_samples: B, a multiple of Bt: sample b belongs to text b // (B / Bt).
            image: [Bt, P] int64, the first P tokens of every sample's picture; decoding goes on with token P.

        Returns:
            One cache per layer; the text part is shared, the image rings have only the slots the layer looks back on.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        self._check_text(text)
        if num_samples < 1 or num_samples % text.shape[0]:
            raise ValueError(f"num_samples: expected a multiple of {text.shape[0]} texts, got {num_samples}")
        kept = 0
        x = self.embed_text(text)
        if image is not None:
            self._check_image(image, text.shape[0])
            kept = image.shape[1]
        if kept:  # slot j holds token j - 1, so `kept` slots need one token less
            x = torch.cat((x, self.embed_image(image[:, : kept - 1])), dim=1)
        text_len = self.config.text_len
        caches = []
        for block in self.blocks:
            x, k, v = block.prefill(x)
            slots = block.attention.pattern.image_cache_len
            index = torch.arange(max(kept - slots, 0), kept, device=x.device)  # what the layer still looks back on
            rings = []
            for t in (k, v):
                ring = t.new_zeros(num_samples, self.config.num_heads, slots, self.config.head_dim)
                rows = t[:, :, text_len + index].repeat_interleave(num_samples // text.shape[0], dim=0)
                ring[:, :, index % slots] = rows
                rings.append(ring)
            caches.append(DecodeCache(k[:, :, :text_len].contiguous(), v[:, :, :text_len].contiguous(), *rings))
        return caches

    @torch.no_grad()
    def decode(
        self, caches: list[DecodeCache], index: int | torch.Tensor, last: torch.Tensor | None, num_samples: int
    ) -> torch.Tensor:
        """Logits of image token `index`, given the one before it.

        Args:
            caches: from `prefill`; this slot's keys and values are written into them.
            index: raster index of the token to predict; call with P, P + 1, ... in turn, P being the tokens prefilled.
                An int, or an int64 tensor [1] on the device of the model: then the host never needs its value, and a
                CUDA graph of one step serves all.
            last: [B] int64, token index - 1; None for index 0.
            num_samples: B.

        Returns:
            [B, V] float32.
        """
        x = self.start_of_image.expand(num_samples, -1) if last is None else self.image_embedding(last)
        columns = self.config.grid[1]
        x = x + self.row_position[index // columns] + self.column_position[index % columns]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.step(x, cache, self.config.text_len + index)
        return self.image_logits(self.norm(x))
