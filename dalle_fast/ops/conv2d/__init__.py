# SPDX-License-Identifier: MIT
"""ReLU, convolution and residual sum of few channels in one op, for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _backend
from .._autocast import compute_dtype, is_autocast
from .._checks import check_bool, check_kept, check_tensor, finite
from . import op
from .reference import conv2d_reference

# Up to so many channels on one of the sides. Beyond, a library's vectors of channels are as full as ours of pixels.
MAX_CHANNELS = 48
DTYPES = (torch.float32, torch.bfloat16)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    gain: float = 1.0,
    relu: bool = False,
    upsample: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """residual + gain * conv2d(relu(x), weight, bias): stride 1, odd kernel, zero padding that keeps the size.

    The convolutions of the dVAE's residual blocks (paper appendix A.1). On CPU, in float32 and bfloat16, one kernel
    reads `x` and writes the sum; the backward pass keeps `x` alone. "auto" takes it for up to 48 channels on one side,
    and torch's ops for everything else. Sums are float32. Under torch.autocast `x` and the weight are rounded to the
    autocast dtype, as with F.conv2d, but not the bias, the gradients of both, or the convolution before it is added.

    Args:
        x: [B, C, H, W], float32, bfloat16, float16 or float64. Any size may be 0.
        weight: [N, C, k, k], k odd, the dtype of `x` unless autocast is on.
        bias: [N].
        residual: [B, N, H, W] to add to, or None.
        gain: factor of the convolution and its bias.
        relu: whether `x` goes through a ReLU first.
        upsample: whether each pixel of `x` counts as two by two; H and W of the result are then doubled.
        backend: "auto", "cpu" or "reference".

    Returns:
        [B, N, H, W].

    Raises:
        TypeError: a tensor is missing, not floating or of another dtype than `x`, or an option is of the wrong type.
        ValueError: shapes do not fit together, the kernel is even, `gain` is not finite, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3), torch.zeros(1))
        tensor([[[[4., 4.],
                  [4., 4.]]]])
    """
    check_bool("relu", relu)
    check_bool("upsample", upsample)
    _check(x, weight, bias, residual, 1 + upsample)
    gain = finite("gain", gain)
    dtype = _operand_dtype(x)
    rounded = (x, weight, bias) if is_autocast(x) else ()  # the others may be float32
    supported = dtype in DTYPES and all(
        t is None or t.dtype == dtype or (t.dtype == torch.float32 and any(t is r for r in rounded))
        for t in (x, weight, bias, residual)
    )
    reason = "it takes float32 and bfloat16, all of one dtype outside autocast"
    chosen = _backend.choose("conv2d", backend, x, supported=supported, reason=reason)
    # an empty batch is like any other, but torch cannot upsample it
    is_empty = 0 in x.shape[1:] or 0 in weight.shape or (upsample and x.shape[0] == 0)
    if is_empty or chosen == "reference" or (backend == "auto" and not has_kernel(x, weight)):
        compute_dtype(x, {"weight": weight, "bias": bias, "residual": residual})
        if is_empty:  # no convolution that autocast would round
            x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
        check_kept({"x": x, "weight": weight}, bias, residual)
        if x.dtype == torch.float16 and abs(gain) > torch.finfo(x.dtype).max:
            raise ValueError(f"gain: expected a finite number of float16, got {gain}")
        return conv2d_reference(x, weight, bias, residual, gain=gain, relu=relu, upsample=upsample)
    x = x.to(dtype)
    if upsample and weight.shape[-1] > 1:
        x, upsample = F.interpolate(x, scale_factor=2, mode="nearest"), False
    return op.conv2d(x, weight, bias, residual, gain, relu, 1 + upsample)


def _operand_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `conv2d` of operands of one dtype runs as one kernel."""
    return (
        _operand_dtype(x) in DTYPES
        and min(weight.shape[:2]) <= MAX_CHANNELS
        and _backend.has_room("conv2d", x.device.type)
    )


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None, scale: int
) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None or name != "residual":
            check_tensor(name, tensor)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [B, C, H, W], got {list(x.shape)}")
    kernel = weight.shape[-1] if weight.dim() else 0
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"weight: expected shape [N, {x.shape[1]}, k, k], k odd, for x of {list(x.shape)}, got {list(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape [{weight.shape[0]}] for weight of {list(weight.shape)}, got {list(bias.shape)}"
        )
    if residual is not None and residual.shape != (
        out := (x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3])
    ):
        raise ValueError(f"residual: expected shape {list(out)}, got {list(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")
