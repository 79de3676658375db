# SPDX-License-Identifier: MIT
"""One fused AdamW update with 16-bit moments; users meet it as `dalle_fast.optim.AdamW16`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _backend
from . import op
from .reference import adamw16_reference


def adamw16(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    variances: Sequence[torch.Tensor],
    emas: Sequence[torch.Tensor] = (),
    *,
    step: int | Sequence[torch.Tensor],
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.96),
    eps: float = 1e-8,
    weight_decay: float = 4.5e-2,
    variance_clip: float = 5.0,
    grad_scale: float | torch.Tensor = 1.0,
    found_inf: torch.Tensor | None = None,
    ema_decay: float = 0.0,
    backend: str = "auto",
) -> None:
    """Updates parameters, moments and averages in place (paper section 2.4, appendix B.2 and D).

    With `step` as tensors nothing is read by the host, and a captured CUDA graph can be replayed: numbers that change
    are tensors of one element on the parameters' device.

    Args:
        params: float32 tensors of any shape.
        grads: as `params`, float32 or bfloat16.
        means: uint16 codes of the running means in 1-6-9.
        variances: uint16 codes of the running variances in 0-6-10.
        emas: averaged parameters, float32, or empty.
        step: number of this update, from 1; or an int64 tensor for each parameter with the number of updates it has
            had, which is increased by one.
        lr: step size; with `step` as tensors it may be a float64 or float32 tensor.
        betas: decay of mean and variance.
        eps: added to the root of the variance.
        weight_decay: decoupled.
        variance_clip: the variance is clipped to this value before it is used or kept.
        grad_scale: gradients are divided by it; with `step` as tensors it may be a float32 tensor.
        found_inf: float32, only with `step` as tensors: where it is not zero, nothing changes.
        ema_decay: decay of `emas`.
        backend: "auto", "cuda", "cpu" or "reference".

    Raises:
        TypeError: a tensor has the wrong dtype, or is a tensor where a number is expected.
        ValueError: lists differ in length, shapes or devices differ, or a number is out of range.
        RuntimeError: an explicit `backend` cannot run.
    """
    capturable = not isinstance(step, int)
    lengths = [("grads", grads), ("means", means), ("variances", variances), ("emas", emas)]
    for name, tensors in [*lengths, ("step", step)] if capturable else lengths:
        if len(tensors) != len(params) and not (name == "emas" and not tensors):
            raise ValueError(f"{name}: expected {len(params)} tensors, one for each parameter, got {len(tensors)}")
    if not capturable:
        for name, value in (("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf)):
            if isinstance(value, torch.Tensor):
                raise TypeError(f"{name}: expected no tensor, because step is a number")
        if step < 1:
            raise ValueError(f"step: expected at least 1, got {step}")
    if not isinstance(grad_scale, torch.Tensor) and not grad_scale > 0:
        raise ValueError(f"grad_scale: expected a positive number, got {grad_scale}")
    if not params:
        _backend.choose("adamw16", backend, torch.empty(0))
        return
    constants = (*betas, eps, weight_decay, variance_clip)
    supported = all(p.dtype == torch.float32 for p in params)
    chosen = _backend.choose("adamw16", backend, params[0], supported=supported, reason="float64 has no kernel")
    lists = (list(params), list(grads), list(means), list(variances), list(emas))
    if chosen == "reference":  # the kernels check while they read
        _check(*lists)
        constants = tuple(float(number) for number in constants)
        lr = lr if isinstance(lr, torch.Tensor) else float(lr)
        adamw16_reference(*lists, step, lr, *constants, grad_scale, found_inf, ema_decay)
    elif not capturable:
        op.adamw16(*lists, step, lr, *constants, grad_scale, ema_decay)
    else:
        if not isinstance(lr, torch.Tensor):
            lr = torch.full((), lr, dtype=torch.float64, device=params[0].device)
        if not isinstance(grad_scale, torch.Tensor):
            grad_scale = (
                None if grad_scale == 1.0 else torch.full((), grad_scale, dtype=torch.float32, device=params[0].device)
            )
        op.adamw16_capturable(*lists, list(step), lr, *constants, grad_scale, found_inf, ema_decay)


def _check(params, grads, means, variances, emas) -> None:
    for i, param in enumerate(params):
        if param.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"params[{i}]: expected dtype float32, got {param.dtype}")
    for name, tensors in (("grads", grads), ("means", means), ("variances", variances), ("emas", emas)):
        for i, (tensor, param) in enumerate(zip(tensors, params)):
            if tensor.shape != param.shape:
                raise ValueError(f"{name}[{i}]: expected shape {list(param.shape)}, got {list(tensor.shape)}")
            allowed = op.DTYPES[name]
            if tensor.dtype not in allowed:
                names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
                raise TypeError(f"{name}[{i}]: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")
            if tensor.device != param.device:
                raise ValueError(f"{name}[{i}]: expected device {param.device}, got {tensor.device}")
