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
    if not params:
        return
    lists = (params, means, variances, emas)
    stream = stream_of(params[0])
    # elementwise, so any one memory order will do; where a parameter's tensors differ in it, copies travel
    for i in _C.adamw16_step(*lists, grads, *scalars, stream):
        mutated = [tensors[i] for tensors in lists if tensors]
        dense = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in mutated]
        dtype = torch.bfloat16 if grads[i].dtype == torch.bfloat16 else torch.float32
        _C.adamw16_step(
            *([t] for t in dense), *([[]] if not emas else []), [grads[i].to(dtype).contiguous()], *scalars, stream
        )
        for tensor, copy in zip(mutated, dense, strict=True):
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
