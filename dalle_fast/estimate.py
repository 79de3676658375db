# SPDX-License-Identifier: MIT
"""What a run will cost, without running it: the model on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .models import DALLE, DVAE
from .train import CLIPTrainConfig, DVAETrainConfig


def forward_flops(model: DALLE | DVAE) -> float:
    """Of one sample; the attention core is counted by its pairs, everything else by torch."""
    with FlopCounterMode(display=False) as counter:
        if isinstance(model, DVAE):
            side = model.config.image_size
            model.decode_soft(model.encode_logits(torch.empty(1, 3, side, side, device="meta")))
            return counter.get_total_flops()
        text = torch.empty(1, model.config.text_len, dtype=torch.int64, device="meta")
        image = torch.empty(1, model.config.image_len, dtype=torch.int64, device="meta")
        states = model(text, image)
        split = model.config.text_len
        model.text_logits(states[:, :split])
        model.image_logits(states[:, split:])
    kinds = {layer: model.config.pattern(layer) for layer in range(1, model.config.num_layers + 1)}
    pairs = {pattern: pattern.num_pairs() for pattern in set(kinds.values())}
    core = sum(4 * pairs[p] * model.config.head_dim * model.config.num_heads for p in kinds.values())
    return counter.get_total_flops() + core


def estimate(config: Any) -> str:
    """Parameters, FLOPs of an update, and bytes for weights, gradients, moments and averages.

    FLOPs count a multiply-add as two; backward as twice forward, and one forward more with checkpointing.
    """
    loop = config.loop
    if isinstance(config, CLIPTrainConfig):
        return "clip: a dry run is for dvae and dalle; the size of a CLIP depends on its tokenizer"
    with torch.device("meta"):
        model = DVAE(config.model) if isinstance(config, DVAETrainConfig) else DALLE(config.model)
    count = sum(p.numel() for p in model.parameters())
    passes = 4 if loop.checkpointing else 3
    flops = forward_flops(model) * passes * loop.batch_size
    moments = 4 if getattr(config, "optimizer", "") == "adamw16" else 8
    state = count * (4 + 4 + moments + (4 if loop.ema_decay else 0))
    return (
        f"parameters          {count:,}\n"
        f"FLOPs per update    {flops:.3g}  ({loop.batch_size} samples, forward and backward)\n"
        f"FLOPs of the run    {flops * loop.steps:.3g}  ({loop.steps:,} updates)\n"
        f"memory for state    {state / 2**30:.2f} GiB  (weights, gradients, moments, averages; activations come on top)"
    )
