# SPDX-License-Identifier: MIT
"""torch's view of powersgd: schemas and allocation."""

from __future__ import annotations

import torch

from ... import memory
from .._backend import _C, stream_of
from .._register import register_op


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether one of two dimensions is dense, as the kernels want it: the first only if the last is not."""
    return tensor.stride(1) == 1 or tensor.shape[1] == 1 or (tensor.stride(0) == 1 and tensor.shape[0] > 1)


def _is_dense_as(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether the dense dimension of `like` is dense in `tensor` too."""
    dim = 1 if like.stride(1) == 1 or like.shape[1] == 1 else 0
    return tensor.stride(dim) == 1 or tensor.shape[dim] == 1


def _dense_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` with the dense dimension of `like`, copied if need be."""
    if _is_dense_as(tensor, like):
        return tensor
    last = like.stride(1) == 1 or like.shape[1] == 1
    return tensor.contiguous() if last else tensor.mT.contiguous().mT


def _project(error, factor, grad, inverse_grad_scale, scale):
    if error.numel() and not _is_dense(error):
        buffer = error.contiguous()
        results = _project(buffer, factor, grad, inverse_grad_scale, scale)
        error.copy_(buffer)
        return results
    code, status = _project_fake(error, factor, grad, inverse_grad_scale, scale)
    status.fill_(1)
    if grad is not None:
        if grad.dtype not in (torch.float32, torch.bfloat16):
            grad = grad.float()
        grad = _dense_as(grad, error)
    if error.numel():
        workspace = error.new_empty(_C.powersgd_workspace(error, factor.shape[1]), dtype=torch.float32)
        numbers = (inverse_grad_scale, scale, stream_of(error))
        _C.powersgd_project(code, status, error, factor.contiguous(), grad, workspace, *numbers)
    else:
        code.zero_()
    return code, status


def _project_fake(error, factor, grad, inverse_grad_scale, scale):
    code = error.new_empty(error.shape[0], factor.shape[1])
    return code, error.new_empty(3, dtype=torch.int32)


def new_gradient(p, q, error):
    """[m, n] float32, not written, with the dense dimension of `error`."""
    m, n = p.shape[0], q.shape[0]
    if error is None or error.stride(1) == 1 or n == 1 or not _is_dense(error):
        return memory.empty(p, (m, n), torch.float32)
    return memory.empty(p, (n, m), torch.float32).mT


def _reconstruct(out, p, q, error, grad_factor, error_factor):
    if not out.numel():
        return
    buffer = error if error is None or _is_dense(error) else error.contiguous()
    in_place = _is_dense(out) if buffer is None else _is_dense_as(out, buffer)
    grad = out if in_place else new_gradient(p, q, buffer)
    _C.powersgd_reconstruct(grad, p.contiguous(), q.contiguous(), buffer, grad_factor, error_factor, stream_of(p))
    if buffer is not error:
        error.copy_(buffer)
    if grad is not out:
        out.copy_(grad)


powersgd_project = register_op(
    "powersgd_project",
    "(Tensor(a!) error, Tensor factor, Tensor? grad, float inverse_grad_scale, float scale) -> (Tensor, Tensor)",
    _project,
    _project_fake,
)
powersgd_reconstruct = register_op(
    "powersgd_reconstruct",
    "(Tensor(a!) out, Tensor p, Tensor q, Tensor(b!)? error, float grad_factor, float error_factor) -> ()",
    _reconstruct,
    lambda *arguments: None,
)
