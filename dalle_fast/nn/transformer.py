# SPDX-License-Identifier: MIT
"""Transformer blocks: pre-norm branches in the compute dtype on a float32 identity path (paper figure 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ops import AttentionPattern, decode_attention, sparse_attention


class SparseSelfAttention(nn.Module):
    """Multi-head attention under an `AttentionPattern`: one softmax over text and image keys (section 2.2)."""

    def __init__(self, width: int, num_heads: int, head_dim: int, pattern: AttentionPattern) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.pattern = pattern
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim)
        self.out = nn.Linear(num_heads * head_dim, width)

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
    """An attention resblock and an MLP resblock; each recomputed in the backward pass when `checkpointing`."""

    def __init__(
        self, width: int, num_heads: int, head_dim: int, pattern: AttentionPattern, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SparseSelfAttention(width, num_heads, head_dim, pattern)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.checkpointing = False

    def initialize(self, std: float, output_std: float) -> None:
        """N(0, std) weights, N(0, output_std) for the two projections back into the identity path, zero biases."""
        for linear in (self.attention.qkv, self.mlp_in, self.attention.out, self.mlp_out):
            is_output = linear is self.attention.out or linear is self.mlp_out
            nn.init.normal_(linear.weight, std=output_std if is_output else std)
            nn.init.zeros_(linear.bias)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))
        return F.dropout(branch, self.dropout, self.training)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.attention(self.norm_attention(x))[0], self.dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, width] float32 -> the same."""
        if self.checkpointing and torch.is_grad_enabled():
            x = x + checkpoint(self._attend, x, use_reentrant=False)
            return x + checkpoint(self._mlp, x, use_reentrant=False)
        x = x + self._attend(x)
        return x + self._mlp(x)

    def prefill(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, and the keys and values [B, H, L, D] for a cache."""
        branch, k, v = self.attention(self.norm_attention(x))
        x = x + branch
        return x + self._mlp(x), k, v

    def step(self, x: torch.Tensor, cache: tuple[torch.Tensor, ...], position: int | torch.Tensor) -> torch.Tensor:
        """One token per sample: [B, width] -> [B, width]."""
        x = x + self.attention.step(self.norm_attention(x), cache, position)
        return x + self._mlp(x)
