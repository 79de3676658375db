# SPDX-License-Identifier: MIT
"""The update in plain torch, tensor by tensor, in place."""

from __future__ import annotations

import torch

from ..minifloat.reference import minifloat_decode_reference, minifloat_encode_reference

LARGEST_MEAN = 15.984375


def adamw16_reference(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    means: list[torch.Tensor],
    variances: list[torch.Tensor],
    emas: list[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    variance_clip: float,
    grad_scale: float,
    ema_decay: float,
) -> None:
    """The plain twin of `adamw16`; computes in the dtype of the parameters."""
    with torch.no_grad():
        for i, p in enumerate(params):
            g = grads[i].to(p.dtype) / grad_scale
            m = minifloat_decode_reference(means[i], "1-6-9").to(p.dtype)
            v = minifloat_decode_reference(variances[i], "0-6-10").to(p.dtype)
            m = (beta1 * m + (1 - beta1) * g).clamp(-LARGEST_MEAN, LARGEST_MEAN)
            v = (beta2 * v + (1 - beta2) * g * g).clamp(max=variance_clip)
            means[i].copy_(minifloat_encode_reference(m, "1-6-9"))
            variances[i].copy_(minifloat_encode_reference(v, "0-6-10"))
            root = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
            p.mul_(1 - lr * weight_decay).sub_(lr / (1 - beta1**step) * m / root)
            if emas:
                emas[i].lerp_(p, 1 - ema_decay)
