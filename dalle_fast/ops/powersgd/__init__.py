# SPDX-License-Identifier: MIT
"""The matrix products of PowerSGD on an error buffer in the 1-6-9 format."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import _backend
from .._checks import check_tensor, check_writable, finite
from . import op
from .reference import powersgd_project_reference, powersgd_reconstruct_reference


class Projection(NamedTuple):
    """What `powersgd_project` returns."""

    code: torch.Tensor
    """[m, r] uint16, 1-6-9 codes."""
    status: torch.Tensor
    """[3] int32: 1 where all of (grad, the error buffer, the product before clamping) is finite."""


def powersgd_project(
    error: torch.Tensor,
    factor: torch.Tensor,
    grad: torch.Tensor | None = None,
    *,
    inverse_grad_scale: float = 1.0,
    scale: float = 1.0,
    backend: str = "auto",
) -> Projection:
    """Adds a gradient into the error buffer and multiplies the buffer by a factor, in one pass (spec 5.3, steps 2-6).

    E <- E + inverse_grad_scale * grad in 1-6-9 where all of `grad` is finite, else E stays; then scale * E X in 1-6-9,
    infinities clamped to the largest number. P = E Q is `powersgd_project(error, q, grad)`; Q_new = E^T P is
    `powersgd_project(error.mT, p)`.

    Args:
        error: [m, n] uint16, 1-6-9 codes, changed in place. Any strides; read where it lies if one dimension is
            dense (a transposed view is welcome).
        factor: [n, r], uint16 codes or float32.
        grad: [m, n], float32 or bfloat16, or None. It is copied where its dense dimension is not that of `error`.
        inverse_grad_scale: 1 / the loss or resblock scale in `grad`.
        scale: constant that keeps the product within the format.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        Projection(code, status). Nothing is synchronised with the host. Not differentiable.

    Raises:
        TypeError: a wrong dtype, or a number that is none.
        ValueError: shapes that do not fit, a number that is not finite, a tensor to be changed whose elements share
            memory, or an unknown `backend`.
        RuntimeError: an explicit `backend` cannot run.
    """
    _check_codes(error, "error")
    check_writable("error", error)
    check_tensor("factor", factor, (torch.uint16, torch.float32), "a uint16 or float32")
    if factor.dim() != 2 or factor.shape[0] != error.shape[1]:
        raise ValueError(
            f"factor: expected shape [{error.shape[1]}, r] for error of {list(error.shape)}, got {list(factor.shape)}"
        )
    if grad is not None:
        check_tensor("grad", grad)
        if grad.shape != error.shape:
            raise ValueError(f"grad: expected shape {list(error.shape)} as error has, got {list(grad.shape)}")
        grad = grad.detach()
    for name, tensor in (("factor", factor), ("grad", grad)):
        if tensor is not None and tensor.device != error.device:
            raise ValueError(f"{name}: expected the device of error ({error.device}), got {tensor.device}")
    numbers = (finite("inverse_grad_scale", inverse_grad_scale), finite("scale", scale))
    factor = factor.detach()
    if _backend.choose("powersgd", backend, error) == "reference":
        return Projection(*powersgd_project_reference(error, factor, grad, *numbers))
    return Projection(*op.powersgd_project(error, factor, grad, *numbers))


def powersgd_reconstruct(
    p: torch.Tensor,
    q: torch.Tensor,
    error: torch.Tensor | None = None,
    *,
    grad_factor: float = 1.0,
    error_factor: float = 1.0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The decompressed gradient, and what it leaves in the error buffer (spec 5.3, steps 11 and 12).

    G = P Q^T in float32; returns grad_factor * G; E <- E - error_factor * G in 1-6-9.

    Args:
        p: [m, r] uint16, 1-6-9 codes.
        q: [n, r] uint16, 1-6-9 codes.
        error: [m, n] uint16, 1-6-9 codes, changed in place, any strides; None leaves error feedback out.
        grad_factor: undoes the constants in p and q; times the clip by the global norm.
        error_factor: undoes the constants; divided by the number of machines.
        out: [m, n] float32, any strides, overwritten and returned; written where it lies if the dense dimension of
            `error` is dense in it. None: a new tensor.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        [m, n] float32, with the dense dimension of `error`. Not differentiable.

    Raises:
        TypeError: a wrong dtype, or a number that is none.
        ValueError: shapes that do not fit, a number that is not finite, a tensor to be changed whose elements share
            memory, or an unknown `backend`.
        RuntimeError: an explicit `backend` cannot run.
    """
    _check_codes(p, "p")
    _check_codes(q, "q")
    if q.shape[1] != p.shape[1]:
        raise ValueError(f"q: expected shape [n, {p.shape[1]}] for p of {list(p.shape)}, got {list(q.shape)}")
    if error is not None:
        _check_codes(error, "error")
        check_writable("error", error)
        if error.shape != (p.shape[0], q.shape[0]):
            raise ValueError(f"error: expected shape [{p.shape[0]}, {q.shape[0]}], got {list(error.shape)}")
    if out is not None:
        check_tensor("out", out, (torch.float32,), "a float32")
        if out.shape != (p.shape[0], q.shape[0]):
            raise ValueError(f"out: expected shape [{p.shape[0]}, {q.shape[0]}], got {list(out.shape)}")
        check_writable("out", out)
        if out.requires_grad:
            raise ValueError("out: expected a tensor that takes no gradient, as it is overwritten, got one that does")
    for name, tensor in (("q", q), ("error", error), ("out", out)):
        if tensor is not None and tensor.device != p.device:
            raise ValueError(f"{name}: expected the device of p ({p.device}), got {tensor.device}")
    numbers = (finite("grad_factor", grad_factor), finite("error_factor", error_factor))
    if _backend.choose("powersgd", backend, p) == "reference":
        grad = powersgd_reconstruct_reference(p, q, error, *numbers)
        return grad if out is None else out.copy_(grad)
    if out is None:
        out = op.new_gradient(p, q, error)
    op.powersgd_reconstruct(out, p, q, error, *numbers)
    return out


def _check_codes(tensor: torch.Tensor, name: str) -> None:
    check_tensor(name, tensor, (torch.uint16,), "a uint16")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {list(tensor.shape)}")
