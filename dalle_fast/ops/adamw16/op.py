# SPDX-License-Identifier: MIT
"""torch's view of adamw16: one op that mutates lists of tensors."""

from __future__ import annotations

import torch

from .._backend import _C, stream_of
from .._register import register_op

DTYPES = {
    "grads": (torch.float32, torch.bfloat16, torch.float64),
    "means": (torch.uint16,),
    "variances": (torch.uint16,),
    "emas": (torch.float32, torch.float64),
}


def _step(
    params,
    grads,
    means,
    variances,
    emas,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    variance_clip,
    grad_scale,
    ema_decay,
) -> None:
    scalars = (
        1 / grad_scale,
        beta1,
        beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** -0.5,
        eps,
        variance_clip,
        1 - ema_decay,
    )
    for i, param in enumerate(params):
        grad = grads[i].to(torch.float32) if grads[i].dtype == torch.float64 else grads[i]
        mutated = (param, means[i], variances[i], emas[i] if emas else None)
        stream = stream_of(param)
        if grad.is_contiguous() and all(tensor is None or tensor.is_contiguous() for tensor in mutated):
            _C.adamw16_step(*mutated, grad, *scalars, stream)
            continue
        # elementwise, so any one layout will do; what is not contiguous travels through a copy
        dense = [tensor if tensor is None else tensor.contiguous() for tensor in mutated]
        _C.adamw16_step(*dense, grad.contiguous(), *scalars, stream)
        for tensor, copy in zip(mutated, dense, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _step_fake(*_) -> None:
    return None


adamw16 = register_op(
    "adamw16",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] variances, Tensor(d!)[] emas, int step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float variance_clip, float grad_scale, "
    "float ema_decay) -> ()",
    _step,
    _step_fake,
)
