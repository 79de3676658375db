# SPDX-License-Identifier: MIT
"""Configs small enough to train inside a test."""

from __future__ import annotations

from pathlib import Path

from dalle_fast.models import CLIPConfig, DALLEConfig, DVAEConfig
from dalle_fast.train import CLIPTrainConfig, DALLETrainConfig, DataConfig, DVAETrainConfig, LoopConfig

DVAE = DVAEConfig(image_size=16, num_groups=2, blocks_per_group=1, width=8, vocab_size=16, decoder_init_width=8)
DALLE = DALLEConfig(
    width=32,
    num_layers=3,
    num_heads=2,
    head_dim=16,
    text_vocab_size=300,
    text_len=10,
    image_vocab_size=16,
    grid=(8, 8),
    kernel=3,
)
CLIP = CLIPConfig(image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2, embed_dim=8, text_len=12)


def loop(steps: int, **changes) -> LoopConfig:
    values = {"batch_size": 8, "log_every": 3, "sample_every": 0, "save_every": 1000, "precision": "fp32"}
    return LoopConfig(steps=steps, **{**values, **changes})


def dvae_config(steps: int = 4, **changes) -> DVAETrainConfig:
    return DVAETrainConfig(
        data=DataConfig("emoji"),
        loop=loop(steps, **changes),
        model=DVAE,
        learning_rate=3e-3,
        learning_rate_steps=100,
        beta_steps=20,
        tau_steps=50,
    )


def dalle_config(steps: int = 4, optimizer: str = "adamw16", schedule: str = "plateau", **changes) -> DALLETrainConfig:
    return DALLETrainConfig(
        data=DataConfig("emoji"),
        loop=loop(steps, ema_decay=0.9, ema_every=2, clip_norm=4.0, **changes),
        model=DALLE,
        warmup_steps=5,
        schedule=schedule,
        optimizer=optimizer,
        caption_dropout=0.2,
    )


def clip_config(steps: int = 4, **changes) -> CLIPTrainConfig:
    return CLIPTrainConfig(
        data=DataConfig("emoji"), loop=loop(steps, **changes), model=CLIP, text_vocab_size=300, warmup_steps=2
    )


def small_system(root: Path) -> Path:
    """Three stages of a few updates each."""
    from dalle_fast.train import run

    run(dvae_config(3), root / "dvae", quiet=True)
    run(clip_config(3), root / "clip", quiet=True)
    run(dalle_config(3), root / "dalle", quiet=True)
    return root
