# SPDX-License-Identifier: MIT
"""Transformer blocks: pre-norm branches in the compute dtype on a float32 identity path (paper figure 4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ops import AttentionPattern, decode_attention, dropout, sparse_attention
from .precision import Linear, scaled_branch


class Noise(NamedTuple):
    """Which channels dropout drops: the same at any number of parts, processes, and when recomputed."""

    seed: int
    offset: int
    """Of the first resblock; each has one of its own."""
    first: int = 0
    """Number of the first sample within its batch."""


class SparseSelfAttention(nn.Module):
    """Multi-head attention under an `AttentionPattern`: one softmax over text and image keys (section 2.2)."""

    def __init__(self, width: int, num_heads: int, head_dim: int, pattern: AttentionPattern) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.pattern = pattern
        self.qkv = Linear(width, 3 * num_heads * head_dim)
        self.out = Linear(num_heads * head_dim, width)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, L, 3, H, D]
        q, k, v = packed.unbind(-3)
        return q, k, v

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, L, width] -> the same, and the keys and values [B, H, L, D] as views of the packed projection."""
        q, k, v = (t.transpose(1, 2) for t in self._split(x))
        out = sparse_attention(q, k, v, self.pattern)  # [B, H, L, D]
        return self.out(out.transpose(1, 2).flatten(2)), k, v

    def step(self, x: torch.Tensor, cache: tuple[torch.Tensor, ...], position: int | torch.Tensor) -> torch.Tensor:
        """One token per sample: [B, width] -> [B, width]; writes its key and value into `cache`."""
        q, k, v = self._split(x)  # [B, H, D]
        return self.out(decode_attention(q, k, v, *cache, self.pattern, position).flatten(1))


class TransformerBlock(nn.Module):
    """An attention resblock and an MLP resblock; each recomputed in the backward pass when `checkpointing`.

    `dropout` of the branches' channels are dropped in training. With `gradient_scales`, a float32 tensor [2], the
    branches of `forward` run in float16 (`scaled_branch`); `on_gradient(i, g)` is given the gradient of resblock i's
    output in the backward pass.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, pattern: AttentionPattern, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SparseSelfAttention(width, num_heads, head_dim, pattern)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = Linear(width, 4 * width)
        self.mlp_out = Linear(4 * width, width)
        self.checkpointing = False
        self.gradient_scales: torch.Tensor | None = None
        self.on_gradient: Callable[[int, torch.Tensor], None] | None = None

    def initialize(self, std: float, output_std: float) -> None:
        """N(0, std) weights, N(0, output_std) for the two projections back into the identity path, zero biases."""
        for linear in (self.attention.qkv, self.mlp_in, self.attention.out, self.mlp_out):
            is_output = linear is self.attention.out or linear is self.mlp_out
            nn.init.normal_(linear.weight, std=output_std if is_output else std)
            nn.init.zeros_(linear.bias)

    def resblock_parameters(self) -> list[list[nn.Parameter]]:
        """Those of the attention resblock and of the MLP resblock."""
        modules = ((self.norm_attention, self.attention), (self.norm_mlp, self.mlp_in, self.mlp_out))
        return [[p for module in resblock for p in module.parameters()] for resblock in modules]

    def _attend(self, h: torch.Tensor) -> torch.Tensor:
        return self.attention(h)[0]

    def _feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(h)))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self._feed_forward(self.norm_mlp(x))

    def _resblock(
        self, index: int, x: torch.Tensor, norm: nn.LayerNorm, branch: Callable, noise: Noise | None
    ) -> torch.Tensor:
        """x + dropout(branch(norm(x)))."""
        scales = self.gradient_scales

        def dropped(h: torch.Tensor) -> torch.Tensor:
            y = branch(h)
            if not (self.training and self.dropout):
                return y
            seed, offset, first = noise or Noise(int(torch.randint(2**62, ())), 0)
            return dropout(y, self.dropout, seed=seed, offset=offset + index, row_offset=first * y.shape[1])

        def run(x: torch.Tensor) -> torch.Tensor:
            return dropped(norm(x)) if scales is None else scaled_branch(x, norm, dropped, scales[index])

        recompute = self.checkpointing and torch.is_grad_enabled()
        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        if self.on_gradient is not None and y.requires_grad:
            y.register_hook(partial(self.on_gradient, index))
        return x + y

    def forward(self, x: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
        """[B, L, width] float32 -> the same; without `noise` torch's generator draws what is dropped."""
        x = self._resblock(0, x, self.norm_attention, self._attend, noise)
        return self._resblock(1, x, self.norm_mlp, self._feed_forward, noise)

    def prefill(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, and the keys and values [B, H, L, D] for a cache."""
        branch, k, v = self.attention(self.norm_attention(x))
        x = x + branch
        return x + self._mlp(x), k, v

    def step(self, x: torch.Tensor, cache: tuple[torch.Tensor, ...], position: int | torch.Tensor) -> torch.Tensor:
        """One token per sample: [B, width] -> [B, width]."""
        x = x + self.attention.step(self.norm_attention(x), cache, position)
        return x + self._mlp(x)
