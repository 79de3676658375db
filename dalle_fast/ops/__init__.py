# SPDX-License-Identifier: MIT
"""The ops. Each is a room of its own: `dalle_fast/ops/<room>` with csrc/<room> behind it."""

from __future__ import annotations

from .conv2d import conv2d
from .decode_attention import decode_attention
from .dropout import dropout
from .gumbel_softmax import gumbel_softmax
from .householder import orthonormalize
from .linear_cross_entropy import linear_cross_entropy
from .max_pool2d import max_pool2d
from .minifloat import minifloat_decode, minifloat_encode
from .null import null
from .pattern import AttentionPattern
from .powersgd import powersgd_project, powersgd_reconstruct
from .sparse_attention import sparse_attention
from .vq_bottleneck import vq_bottleneck

__all__ = [
    "AttentionPattern",
    "conv2d",
    "decode_attention",
    "dropout",
    "gumbel_softmax",
    "linear_cross_entropy",
    "max_pool2d",
    "minifloat_decode",
    "minifloat_encode",
    "null",
    "orthonormalize",
    "powersgd_project",
    "powersgd_reconstruct",
    "sparse_attention",
    "vq_bottleneck",
]
