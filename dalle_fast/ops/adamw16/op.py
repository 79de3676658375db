# SPDX-License-Identifier: MIT
"""torch's view of adamw16: ops that mutate lists of tensors."""

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


def _update(lists, grads, scalars, found_inf, numbers) -> None:
    """`lists`: params, means, variances, emas; `scalars`: of each parameter, in memory, or None."""
    stream = stream_of(lists[0][0])
    # elementwise, so any one memory order will do; where a parameter's tensors differ in it, copies travel
    for i in _C.adamw16_step(*lists, grads, scalars, found_inf, *numbers, stream):
        mutated = [tensors[i] for tensors in lists if tensors]
        dense = [torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in mutated]
        dtype = torch.bfloat16 if grads[i].dtype == torch.bfloat16 else torch.float32
        grad = grads[i].to(dtype).contiguous()
        row = None if scalars is None else scalars[i : i + 1]
        emas = [] if lists[3] else [[]]
        _C.adamw16_step(*([t] for t in dense), *emas, [grad], row, found_inf, *numbers, stream)
        for tensor, copy in zip(mutated, dense, strict=True):
            tensor.copy_(copy)


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
    if params:
        numbers = (step, lr, grad_scale, beta1, beta2, eps, weight_decay, variance_clip, 1 - ema_decay)
        _update((params, means, variances, emas), grads, None, None, numbers)


def _step_capturable(
    params,
    grads,
    means,
    variances,
    emas,
    steps,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    variance_clip,
    grad_scale,
    found_inf,
    ema_decay,
) -> None:
    if not params:
        return
    scalars = torch.empty(len(params), 4, dtype=torch.float32, device=params[0].device)
    stream = stream_of(scalars)
    _C.adamw16_advance(steps, scalars, lr, grad_scale, found_inf, beta1, beta2, weight_decay, stream)
    numbers = (0, 0.0, 1.0, beta1, beta2, eps, weight_decay, variance_clip, 1 - ema_decay)
    _update((params, means, variances, emas), grads, scalars, found_inf, numbers)


def _step_fake(*_) -> None:
    return None


_LISTS = "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] variances, Tensor(d!)[] emas"
_CONSTANTS = "float beta1, float beta2, float eps, float weight_decay, float variance_clip"
adamw16 = register_op(
    "adamw16",
    f"({_LISTS}, int step, float lr, {_CONSTANTS}, float grad_scale, float ema_decay) -> ()",
    _step,
    _step_fake,
)
adamw16_capturable = register_op(
    "adamw16_capturable",
    f"({_LISTS}, Tensor(e!)[] steps, Tensor lr, {_CONSTANTS}, Tensor? grad_scale, Tensor? found_inf, "
    "float ema_decay) -> ()",
    _step_capturable,
    _step_fake,
)
