# SPDX-License-Identifier: MIT
"""The update in plain torch, tensor by tensor, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..minifloat.reference import minifloat_decode_reference, minifloat_encode_reference

LARGEST_MEAN = 15.984375


def adamw16_reference(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    means: list[torch.Tensor],
    variances: list[torch.Tensor],
    emas: list[torch.Tensor],
    step: int | Sequence[torch.Tensor],
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    variance_clip: float,
    grad_scale: float | torch.Tensor,
    found_inf: torch.Tensor | None,
    ema_decay: float,
) -> None:
    """The plain twin of `adamw16`; computes in the dtype of the parameters."""

    def keep(tensor: torch.Tensor, new: torch.Tensor) -> None:
        new = new.to(tensor.dtype)
        if found_inf is not None:
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            new = torch.where(found_inf.eq(0).view(()), new.view(bits), tensor.view(bits)).view(tensor.dtype)
        tensor.copy_(new)

    # one element of any shape
    lr, grad_scale = (t.view(()) if isinstance(t, torch.Tensor) else t for t in (lr, grad_scale))
    with torch.no_grad():
        for i, p in enumerate(params):
            number: int | torch.Tensor
            if isinstance(step, int):
                number = step
            else:
                keep(step[i], step[i] + 1)
                number = step[i].double().view(())
            g = grads[i].to(p.dtype) / grad_scale
            m = minifloat_decode_reference(means[i], "1-6-9").to(p.dtype)
            v = minifloat_decode_reference(variances[i], "0-6-10").to(p.dtype)
            m = (beta1 * m + (1 - beta1) * g).clamp(-LARGEST_MEAN, LARGEST_MEAN)
            v = (beta2 * v + (1 - beta2) * g * g).clamp(max=variance_clip)
            keep(means[i], minifloat_encode_reference(m, "1-6-9"))
            keep(variances[i], minifloat_encode_reference(v, "0-6-10"))
            root = v.sqrt() / (1 - beta2**number) ** 0.5 + eps
            keep(p, p * (1 - lr * weight_decay) - lr / (1 - beta1**number) * m / root)
            if emas:
                keep(emas[i], emas[i].lerp(p, 1 - ema_decay))
