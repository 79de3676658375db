# SPDX-License-Identifier: MIT
"""conv2d in torch's ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    gain: float = 1.0,
    relu: bool = False,
    upsample: bool = False,
) -> torch.Tensor:
    """The plain twin of `conv2d`."""
    if 0 in x.shape or 0 in weight.shape:  # torch refuses most of these
        scale = 1 + upsample
        shape = (x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3])
        y = bias.view(1, -1, 1, 1).expand(shape) + 0 * (x.sum() + weight.sum())
        return y * gain if residual is None else residual + y * gain
    if upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    y = F.conv2d(F.relu(x) if relu else x, weight, bias, padding=weight.shape[-1] // 2)
    if residual is not None:
        return torch.add(residual, y, alpha=gain)
    return y if gain == 1 else y * gain
