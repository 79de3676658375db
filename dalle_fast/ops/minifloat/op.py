# SPDX-License-Identifier: MIT
"""torch's view of minifloat: schema and allocation."""

from __future__ import annotations

import torch

from ... import memory
from .._backend import _C, stream_of
from .._register import register_op


def _encode(x: torch.Tensor, has_sign: bool) -> torch.Tensor:
    code = _encode_fake(x, has_sign)
    _C.minifloat_encode(code.view(-1), x.reshape(-1).contiguous(), has_sign, stream_of(x))
    return code


def _encode_fake(x, has_sign):
    return memory.empty(x, x.shape, torch.uint16)


def _decode(code: torch.Tensor, has_sign: bool) -> torch.Tensor:
    value = _decode_fake(code, has_sign)
    _C.minifloat_decode(value.view(-1), code.reshape(-1).contiguous(), has_sign, stream_of(code))
    return value


def _decode_fake(code, has_sign):
    return memory.empty(code, code.shape, torch.float32)


minifloat_encode = register_op("minifloat_encode", "(Tensor x, bool has_sign) -> Tensor", _encode, _encode_fake)
minifloat_decode = register_op("minifloat_decode", "(Tensor code, bool has_sign) -> Tensor", _decode, _decode_fake)
