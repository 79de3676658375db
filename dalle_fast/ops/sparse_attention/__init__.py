# SPDX-License-Identifier: MIT
"""Attention over text and image tokens where each image query sees all text and a sparse set of image keys."""

from __future__ import annotations

import torch

from .. import _backend
from .._autocast import without_autocast
from .._checks import check_kept, check_tensor, finite
from ..pattern import AttentionPattern
from . import op
from .reference import sparse_attention_reference

_reference = without_autocast(sparse_attention_reference)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: AttentionPattern,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale q k^T, where `pattern` allows) v, with one softmax over text and image keys (paper section 2.2).

    Scores are float32 and never stored; the backward pass recomputes them from the log-sum-exp. Deterministic at any
    number of threads. First derivatives only: backend="reference" has further ones. On CUDA, float32 products are three
    tf32 products each: as accurate as float32, but Inf in q, k or v gives NaN.

    Args:
        q: [B, H, L, D], float32, bfloat16 or float16, any strides (views of a packed qkv are read in place when D is
            dense); float64 runs on the reference. L may be any prefix of `pattern.length`.
        k: [B, Hkv, L, D], the dtype of `q`; H is a multiple of Hkv (grouped-query attention).
        v: as `k`.
        pattern: who sees whom.
        scale: factor of the scores; None takes 1 / sqrt(D).
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        [B, H, L, D], the dtype of `q`. Differentiable.

    Raises:
        TypeError: a tensor is not floating or has another dtype than `q`, or `pattern` is no AttentionPattern.
        ValueError: shapes, devices or `scale` do not fit, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> pattern = AttentionPattern("row", text_len=4, grid=(2, 2))
        >>> sparse_attention(*torch.randn(3, 1, 2, 8, 16), pattern).shape
        torch.Size([1, 2, 8, 16])
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected shape [B, H, L, D], got {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q ({q.dtype}), got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q ({q.device}), got {tensor.device}")
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(f"pattern: expected an AttentionPattern, got {type(pattern).__name__}")
    batch, num_heads, length, head_dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch or tensor.shape[2:] != q.shape[2:]:
            raise ValueError(
                f"{name}: expected [{batch}, heads, {length}, {head_dim}] for q of {list(q.shape)}, "
                f"got {list(tensor.shape)}"
            )
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {num_heads} of q, got {k.shape[1]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected {k.shape[1]} heads as k has, got {v.shape[1]}")
    if head_dim == 0:
        raise ValueError(f"q: expected at least one channel, got shape {list(q.shape)}")
    if length > pattern.length:
        raise ValueError(f"q: expected at most {pattern.length} positions, as the pattern has, got {length}")
    scale = head_dim**-0.5 if scale is None else finite("scale", scale)

    supported = q.dtype in op.DTYPES
    chosen = _backend.choose(
        "sparse_attention", backend, q, supported=supported, reason=f"dtype {q.dtype} has no kernel"
    )
    if chosen == "reference":
        check_kept({"q": q, "k": k, "v": v})
        return _reference(q, k, v, pattern, scale=scale)
    return op.sparse_attention(q, k, v, scale, *pattern.integers())[0]
