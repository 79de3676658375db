# SPDX-License-Identifier: MIT
"""Thin modules over the ops: what the models are put together from."""

from __future__ import annotations

from .dvae import Conv2d, DecoderBlock, EncoderBlock, MaxPool2d
from .embedding import Embedding
from .losses import categorical_kl, logit_laplace_nll, map_pixels, unmap_pixels
from .precision import Linear, full_precision, scaled_branch
from .transformer import Noise, TransformerBlock

__all__ = [
    "Conv2d",
    "DecoderBlock",
    "Embedding",
    "EncoderBlock",
    "Linear",
    "MaxPool2d",
    "Noise",
    "TransformerBlock",
    "categorical_kl",
    "full_precision",
    "logit_laplace_nll",
    "map_pixels",
    "scaled_branch",
    "unmap_pixels",
]
