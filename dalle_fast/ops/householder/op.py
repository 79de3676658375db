# SPDX-License-Identifier: MIT
"""torch's view of householder: schema and allocation."""

from __future__ import annotations

import torch

from .._backend import _C, stream_of
from .._register import register_op


def _implementation(p: list[torch.Tensor], eps: float) -> list[torch.Tensor]:
    q = _fake(p, eps)
    # where the float32 matrix waits that does not fit a CUDA block
    work = [x.new_empty(x.shape, dtype=torch.float32) for x in p] if p[0].dtype == torch.uint16 else []
    _C.householder_orthonormalize(q, p, work, eps, stream_of(p[0]))
    return q


def _fake(p, eps):
    return [x.new_empty(x.shape) for x in p]


householder = register_op("householder", "(Tensor[] p, float eps) -> Tensor[]", _implementation, _fake)
