# SPDX-License-Identifier: MIT
"""DALLE-pytorch as a peer of the training step, where a clone of it and what it imports are there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..models import DALLEConfig
from .rows import Call

KINDS = {
    "axial": ("axial_row", "axial_col", "axial_row", "axial_row"),
    "full": ("full",),
    "conv": ("conv_like",),
}


def clone_peers(
    folder: str, config: DALLEConfig, text: torch.Tensor, image: torch.Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], Call]]:
    """name -> maker of forward and backward of a model of the same width, depth, heads and tokens; {} for no folder.

    It adds rotary embeddings and shifted tokens, its defaults, and has one vocabulary for text and image together.
    """
    if not folder:
        return {}
    return {
        f"DALLE-pytorch {name}": lambda kinds=kinds: _step(folder, config, kinds, text, image, dtype)
        for name, kinds in KINDS.items()
    }


def _step(folder, config: DALLEConfig, kinds: tuple[str, ...], text, image, dtype: torch.dtype) -> Call:
    if not (Path(folder) / "dalle_pytorch").is_dir():
        raise FileNotFoundError(f"{folder} has no dalle_pytorch/")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    theirs = importlib.import_module("dalle_pytorch")
    side = config.grid[0]
    vae = theirs.DiscreteVAE(image_size=8 * side, num_layers=3, num_tokens=config.image_vocab_size, hidden_dim=8)
    torch.manual_seed(0)
    model = theirs.DALLE(
        dim=config.width, vae=vae, num_text_tokens=config.text_vocab_size, text_seq_len=config.text_len,
        depth=config.num_layers, heads=config.num_heads, dim_head=config.head_dim, attn_types=kinds,
    )  # fmt: skip

    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(text, image, return_loss=True)
        loss.backward()
        return loss.detach()

    return run
