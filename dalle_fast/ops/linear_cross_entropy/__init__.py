# SPDX-License-Identifier: MIT
"""The last linear layer and its cross-entropy as one op that never keeps the logits."""

from __future__ import annotations

import struct

import torch

from ...memory import is_plain
from .. import _backend
from .._autocast import compute_dtype
from .._checks import check_int, check_int64, check_kept, check_tensor, finite
from . import op
from .reference import linear_cross_entropy_reference


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    upstream: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean cross-entropy of `x @ weight.T + bias` against `target` (paper section 2.2).

    The logits exist for one chunk of rows at a time and become their own gradient in place; the gradients of `x`,
    `weight` and `bias` that somebody requires are made along with the loss, so the backward pass only scales them.

    Under torch.autocast the matrix products run in the autocast dtype and the loss in float32, as with F.linear and
    F.cross_entropy; the weight gradient of float32 weights is summed over chunks in float32. float16 products run in
    float32 on CPU; on CUDA they have float32 results. First derivatives only: backend="reference" has further ones.

    On CUDA the host never waits for the device, so that a CUDA graph can record the op, and nothing is raised for a
    target out of range: the loss is NaN, and so are the gradients of that row, of `weight` and of `bias`.

    Args:
        x: [N, d], float32, bfloat16 or float16, any strides; float64 runs on the reference.
        weight: [V, d], the dtype of `x` unless autocast is on.
        target: [N] int64, in [0, V) or `ignore_index`.
        bias: [V] or None, the dtype of `weight`.
        ignore_index: rows with this target add nothing to the loss and get zero gradients.
        chunk_rows: rows whose logits exist at a time; None takes as many as make at most 2^25 logits, and at least
            1024. Memory for logits is chunk_rows * V elements.
        upstream: the gradient of the loss that is expected, such as its weight in a sum. Results are the same for any;
            on CPU the backward pass has nothing left to do where it comes.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        The mean over the targets that are not ignored, a scalar in float32 (float64 for float64 inputs). NaN when no
        target counts, as in torch; the gradients are then zero.

    Raises:
        TypeError: a tensor is missing or has the wrong dtype, or a number is of the wrong type.
        ValueError: shapes do not fit together, there is no code, `chunk_rows` is not positive, `upstream` is not
            finite, or `backend` is unknown.
        IndexError: on CPU, a target is neither in [0, V) nor `ignore_index`.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([0, 7]))
        tensor(2.0794)
    """
    _check(x, weight, target, bias)
    check_int64("ignore_index", ignore_index)
    if chunk_rows is not None:
        check_int("chunk_rows", chunk_rows, 1)
        chunk_rows = min(chunk_rows, max(x.shape[0], 1))
    upstream = finite("upstream", upstream)
    compute = compute_dtype(x, {"weight": weight, "bias": bias})

    supported = all(t is None or t.dtype in op.DTYPES for t in (x, weight, bias))
    chosen = _backend.choose(
        "linear_cross_entropy", backend, x, supported=supported, reason=f"dtype {x.dtype} has no kernel"
    )
    if chosen == "reference":
        check_kept({"x": x, "weight": weight, "target": target}, bias)
        if is_plain(target) and not torch.compiler.is_compiling():
            op.check_range(target, weight.shape[0], ignore_index)
        return linear_cross_entropy_reference(x, weight, target, bias, ignore_index=ignore_index)
    needs = 0
    if torch.is_grad_enabled():
        needs = (
            op.NEEDS_X * x.requires_grad
            + op.NEEDS_WEIGHT * weight.requires_grad
            + op.NEEDS_BIAS * (bias is not None and bias.requires_grad)
        )
    # rounded as the gradient will be; float16 has no room for one more factor
    upstream = 1.0 if compute == torch.float16 else struct.unpack("f", struct.pack("f", upstream))[0] or 1.0
    return op.linear_cross_entropy(x, weight, target, bias, ignore_index, compute, needs, chunk_rows or 0, upstream)[0]


def _check(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None or name != "bias":
            check_tensor(name, tensor)
    check_tensor("target", target, (torch.int64,), "an int64")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [N, d], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape [V, {x.shape[1]}] for x of {list(x.shape)}, got {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one code, got shape {list(weight.shape)}")
    if target.shape != x.shape[:1]:
        raise ValueError(f"target: expected shape [{x.shape[0]}] for x of {list(x.shape)}, got {list(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape [{weight.shape[0]}] for weight of {list(weight.shape)}, got {list(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")
