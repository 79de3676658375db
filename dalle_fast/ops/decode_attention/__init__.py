# SPDX-License-Identifier: MIT
"""Attention of one new token against a cache: text shared by samples, image keys in short rings."""

from __future__ import annotations

import torch

from .. import _backend
from .._autocast import without_autocast
from .._checks import check_int, check_tensor, check_writable, finite, shown
from ..pattern import AttentionPattern
from . import op
from .reference import decode_attention_reference

_reference = without_autocast(decode_attention_reference)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    image_k: torch.Tensor,
    image_v: torch.Tensor,
    pattern: AttentionPattern,
    position: int | torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The attention of `sparse_attention` for the token at `position`, all earlier ones being in the caches.

    Writes `k` and `v` into the caches first: an image token into slot (position - text_len) % R of the rings, a text
    token into its place. Call it for position after position: a ring forgets what the pattern no longer looks back on.
    No autograd.

    Args:
        q: [B, H, D], float32, bfloat16 or float16; float64 runs on the reference.
        k: [B, Hkv, D], the dtype of `q`; H is a multiple of Hkv.
        v: as `k`.
        text_k: [Bt, Hkv, text_len, D]; sample b reads row b // (B / Bt), so N samples of a caption share one copy.
            Mutated for text positions, which need Bt == B.
        text_v: as `text_k`.
        image_k: [B, Hkv, R, D], R >= pattern.image_cache_len. Mutated for image positions.
        image_v: as `image_k`.
        pattern: who sees whom.
        position: of the new token in the stream, 0 .. pattern.length - 1: an int, or an int64 tensor of one element on
            the device of `q`. The host never looks at a tensor's value, so one CUDA graph serves all positions; one
            that an int may not have (and a text position if Bt != B) gives NaN and leaves the caches as they are.
        scale: factor of the scores; None takes 1 / sqrt(D).
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        [B, H, D], the dtype of `q`.

    Raises:
        TypeError: a tensor is not floating or has another dtype than `q`, or `pattern` is no AttentionPattern.
        ValueError: shapes, devices, an int `position` or `scale` do not fit, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.
    """
    check_tensor("q", q)
    dtype, device = q.dtype, q.device
    tensors = {"q": q, "k": k, "v": v, "text_k": text_k, "text_v": text_v, "image_k": image_k, "image_v": image_v}
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype != dtype
            or tensor.layout != torch.strided
            or tensor.is_nested
        ):
            check_tensor(name, tensor)
            raise TypeError(f"{name}: expected the dtype of q ({dtype}), got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of q ({device}), got {tensor.device}")
        rank = 3 if name in ("q", "k", "v") else 4
        if tensor.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, got shape {list(tensor.shape)}")
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(f"pattern: expected an AttentionPattern, got {type(pattern).__name__}")
    _check_position(position, q.device)
    batch, num_heads, head_dim = q.shape
    kv_heads, text_batch, ring_len = k.shape[1], text_k.shape[0], image_k.shape[2]
    if kv_heads == 0 or num_heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides the {num_heads} of q, got {kv_heads}")
    if head_dim == 0 or num_heads == 0:
        raise ValueError(f"q: expected at least one head and one channel, got shape {list(q.shape)}")
    expected = {
        "k": (batch, kv_heads, head_dim),
        "v": (batch, kv_heads, head_dim),
        "text_k": (text_batch, kv_heads, pattern.text_len, head_dim),
        "text_v": (text_batch, kv_heads, pattern.text_len, head_dim),
        "image_k": (batch, kv_heads, ring_len, head_dim),
        "image_v": (batch, kv_heads, ring_len, head_dim),
    }
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(tensors[name].shape)}")
    if batch and (text_batch == 0 or batch % text_batch):
        raise ValueError(f"text_k: expected a batch that divides the {batch} of q, got {text_batch}")
    if ring_len < pattern.image_cache_len:
        raise ValueError(f"image_k: expected at least {pattern.image_cache_len} slots, got {ring_len}")
    on_device = isinstance(position, torch.Tensor)
    if not on_device:
        if not 0 <= position < pattern.length:
            raise ValueError(f"position: expected 0 to {pattern.length - 1}, got {shown(position)}")
        if position < pattern.text_len and text_batch != batch:
            raise ValueError(f"text_k: a text position needs {batch} rows, one for each sample, got {text_batch}")
    scale = head_dim**-0.5 if scale is None else finite("scale", scale)

    supported = q.dtype in op.DTYPES
    chosen = _backend.choose(
        "decode_attention", backend, q, supported=supported, reason=f"dtype {q.dtype} has no kernel"
    )
    caches = (text_k, text_v, image_k, image_v)
    if on_device or position >= pattern.text_len:
        check_writable("image_k", image_k)
        check_writable("image_v", image_v)
    if text_batch == batch and (on_device or position < pattern.text_len):
        check_writable("text_k", text_k)
        check_writable("text_v", text_v)
    wants_grad = q.requires_grad or k.requires_grad or v.requires_grad or text_k.requires_grad
    wants_grad = wants_grad or text_v.requires_grad or image_k.requires_grad or image_v.requires_grad
    if wants_grad and torch.is_grad_enabled():
        with torch.no_grad():
            return decode_attention(q, k, v, *caches, pattern, position, scale=scale, backend=backend)
    if chosen == "reference":
        return _reference(q, k, v, *caches, pattern, position, scale=scale)
    run = op.decode_attention_at if on_device else op.decode_attention
    return run(q, k, v, *caches, scale, position, *pattern.integers())


def _check_position(position: int | torch.Tensor, device: torch.device) -> None:
    if isinstance(position, torch.Tensor):
        check_tensor("position", position, (torch.int64,), "an int or an int64")
        if position.dtype != torch.int64 or position.numel() != 1:
            raise TypeError(
                f"position: expected an int or an int64 tensor of one element, got {position.dtype} "
                f"{list(position.shape)}"
            )
        if position.device != device:
            raise ValueError(f"position: expected the device of q ({device}), got {position.device}")
    else:
        check_int("position", position)
