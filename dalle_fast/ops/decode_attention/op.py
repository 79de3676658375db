# SPDX-License-Identifier: MIT
"""torch's view of decode_attention: schema with mutated caches, allocation. No autograd.

Two ops: the position as an integer, or as a tensor whose value stays on its device.
"""

from __future__ import annotations

import torch

from .._backend import _C, stream_of
from .._register import register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _is_written(is_text: bool, q, text_k, position, position_at, pattern) -> bool:
    """Whether a token goes into the text's caches, or into the image's."""
    if position_at is None:
        return (position < pattern[1]) == is_text
    return not is_text or text_k.shape[0] == q.shape[0]


def _run(q, k, v, text_k, text_v, image_k, image_v, scale, pattern, position, position_at):
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    caches = (text_k, text_v, image_k, image_v)
    dense = [_rows_dense(cache) for cache in caches]
    out = q.new_empty(q.shape)
    _C.decode_attention_forward(out, q, k, v, *dense, scale, pattern, position, position_at, stream_of(q))
    for i in range(4):
        if dense[i] is not caches[i] and _is_written(i < 2, q, text_k, position, position_at, pattern):
            caches[i].copy_(dense[i])  # the token was written into a copy
    return out


def _forward(q, k, v, text_k, text_v, image_k, image_v, scale, position, *pattern):
    return _run(q, k, v, text_k, text_v, image_k, image_v, scale, pattern, position, None)


def _forward_at(q, k, v, text_k, text_v, image_k, image_v, scale, position, *pattern):
    return _run(q, k, v, text_k, text_v, image_k, image_v, scale, pattern, 0, position)


def _forward_fake(q, k, v, text_k, text_v, image_k, image_v, scale, position, *pattern):
    return q.new_empty(q.shape)


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) text_k, Tensor(b!) text_v, Tensor(c!) image_k, Tensor(d!) image_v, "
    "float scale, {} position, int kind, int text_len, int height, int width, int extent, int kernel, "
    "int wraparound) -> Tensor"
)
decode_attention = register_op("decode_attention", _SCHEMA.format("SymInt"), _forward, _forward_fake)
decode_attention_at = register_op("decode_attention_at", _SCHEMA.format("Tensor"), _forward_at, _forward_fake)
