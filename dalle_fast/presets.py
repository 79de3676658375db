# SPDX-License-Identifier: MIT
"""Named configs: the paper's models, and small ones that a laptop trains in minutes."""

from __future__ import annotations

from typing import Any

from .errors import ConfigError
from .models import CLIPConfig, DALLEConfig, DVAEConfig
from .train import CLIPTrainConfig, DALLETrainConfig, DataConfig, DVAETrainConfig, LoopConfig

# (width, heads of 64) of the paper's table 1; all have 64 layers.
_PAPER_SIZES = {"2.8b": (1920, 30), "5.6b": (2688, 42), "12b": (3968, 62)}


def paper_dalle(size: str) -> DALLEConfig:
    """The transformer of 2.8, 5.6 or 12 billion parameters (table 1)."""
    if size not in _PAPER_SIZES:
        raise ConfigError(f"size: expected one of {', '.join(_PAPER_SIZES)}, got {size!r}")
    width, num_heads = _PAPER_SIZES[size]
    return DALLEConfig(width=width, num_heads=num_heads)


# Half of the emoji have no skin tone, and what is held out are tones.
_TONED = ", [a-z-]+ skin tone$"
_EMOJI = DataConfig(source="emoji", emphasis=_TONED, emphasis_repeats=3)


def _small_dvae(source: str) -> DVAETrainConfig:
    # docs/demo.md has the measurements. Taught codes are alive from the start: beta need not keep them so.
    return DVAETrainConfig(
        data=DataConfig(source=source),
        loop=LoopConfig(steps=1500, batch_size=32, ema_decay=0.99, sample_every=500, save_every=500),
        model=DVAEConfig(image_size=32, num_groups=3, width=24, vocab_size=256, decoder_init_width=32),
        learning_rate=4e-3,
        final_learning_rate=4e-5,
        learning_rate_steps=1500,
        beta=0.1,
        beta_steps=1,
        initial_tau=0.5,
        tau_steps=500,
        teacher_weight=1.0,
    )


def _small_clip(source: str) -> CLIPTrainConfig:
    if source == "shapes":
        return CLIPTrainConfig(
            data=DataConfig(source=source),
            loop=LoopConfig(steps=600, batch_size=128, clip_norm=1.0, ema_decay=0.98, sample_every=200, save_every=300),
            warmup_steps=50,
        )
    return CLIPTrainConfig(
        data=_EMOJI,
        loop=LoopConfig(steps=320, batch_size=128, clip_norm=1.0, ema_decay=0.98, sample_every=160, save_every=160),
        model=CLIPConfig(patch_size=8, text_len=16),
        learning_rate=2e-3,
        warmup_steps=30,
    )


def _shapes_dalle() -> DALLETrainConfig:
    return DALLETrainConfig(
        data=DataConfig(source="shapes"),
        loop=LoopConfig(
            steps=3000, batch_size=64, clip_norm=4.0, ema_decay=0.95, ema_every=5, sample_every=500, save_every=500
        ),
        model=_small_transformer(text_len=24),
        learning_rate=1.5e-3,
        warmup_steps=150,
        schedule="cosine",
        caption_dropout=0.1,
    )


def _small_transformer(text_len: int, image_vocab_size: int = 256) -> DALLEConfig:
    return DALLEConfig(
        width=256,
        num_layers=4,
        num_heads=4,
        head_dim=64,
        text_vocab_size=1024,
        text_len=text_len,
        image_vocab_size=image_vocab_size,
        grid=(8, 8),
        dropout=0.1,
    )


def _emoji_dalle() -> DALLETrainConfig:
    return DALLETrainConfig(
        data=_EMOJI,
        loop=LoopConfig(
            steps=1200, batch_size=32, clip_norm=4.0, ema_decay=0.95, ema_every=5, sample_every=400, save_every=400
        ),
        model=_small_transformer(text_len=16),
        optimizer="dion",
        learning_rate=2.5e-3,
        warmup_steps=40,
        schedule="cosine",
        bpe_dropout=0.0,
        caption_dropout=0.1,
    )


def _styles_dvae() -> DVAETrainConfig:
    """Of the system that ships, `dalle_fast.pretrain`: 64 x 64 pixels as 8 x 8 codes."""
    return DVAETrainConfig(
        data=DataConfig(source="emoji-styles"),
        loop=LoopConfig(steps=1350, batch_size=32, ema_decay=0.99, sample_every=500, save_every=250),
        model=DVAEConfig(
            image_size=64, num_groups=4, blocks_per_group=1, width=24, vocab_size=1024, decoder_init_width=64
        ),
        learning_rate=4e-3,
        final_learning_rate=4e-5,
        learning_rate_steps=1350,
        beta_steps=600,
        tau_steps=1500,
    )


def _styles_clip() -> CLIPTrainConfig:
    return CLIPTrainConfig(
        data=DataConfig(source="emoji-styles"),
        loop=LoopConfig(steps=400, batch_size=128, clip_norm=1.0, ema_decay=0.97, sample_every=200, save_every=100),
        model=CLIPConfig(image_size=64, patch_size=16, width=96, text_len=24),
        warmup_steps=30,
        bpe_dropout=0.0,
    )


def _styles_dalle() -> DALLETrainConfig:
    return DALLETrainConfig(
        data=DataConfig(source="emoji-styles"),
        loop=LoopConfig(
            steps=1850, batch_size=64, clip_norm=4.0, ema_decay=0.97, ema_every=5, sample_every=500, save_every=250
        ),
        model=_small_transformer(text_len=24, image_vocab_size=1024),
        learning_rate=4e-3,
        warmup_steps=50,
        bpe_dropout=0.0,
        schedule="cosine",
        caption_dropout=0.1,
    )


def _paper(kind: str, size: str = "12b") -> Any:
    if kind == "dvae":
        return DVAETrainConfig(loop=LoopConfig(steps=3_000_000, batch_size=512))
    loop = LoopConfig(
        steps=430_000,
        batch_size=1024,
        precision="fp16-resblock",
        clip_norm=4.0,
        ema_decay=0.99,
        ema_every=25,
        checkpointing=True,
    )
    return DALLETrainConfig(loop=loop, model=paper_dalle(size))


PRESETS: dict[str, dict[str, Any]] = {
    "dvae": {
        "emoji": lambda: _small_dvae("emoji"),
        "shapes": lambda: _small_dvae("shapes"),
        "paper": lambda: _paper("dvae"),
        "emoji-styles": _styles_dvae,
    },
    "clip": {
        "emoji": lambda: _small_clip("emoji"),
        "shapes": lambda: _small_clip("shapes"),
        "emoji-styles": _styles_clip,
    },
    "dalle": {
        "emoji": _emoji_dalle,
        "shapes": _shapes_dalle,
        **{f"paper-{size}": lambda size=size: _paper("dalle", size) for size in _PAPER_SIZES},
        "emoji-styles": _styles_dalle,
    },
}


def preset(kind: str, name: str) -> Any:
    """The train config of a stage by name.

    Raises:
        ConfigError: no such preset.
    """
    found = PRESETS[kind].get(name)
    if found is None:
        raise ConfigError(f"preset: {kind} has {', '.join(PRESETS[kind])}, got {name!r}")
    return found()
