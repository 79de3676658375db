# SPDX-License-Identifier: MIT
"""PowerSGD's products in plain torch, in float64."""

from __future__ import annotations

import torch

from ..minifloat.reference import minifloat_decode_reference, minifloat_encode_reference

LARGEST = 15.984375


def _decode(code: torch.Tensor) -> torch.Tensor:
    return minifloat_decode_reference(code, "1-6-9").double()


def _encode(x: torch.Tensor) -> torch.Tensor:
    return minifloat_encode_reference(x, "1-6-9")


def powersgd_project_reference(
    error: torch.Tensor,
    factor: torch.Tensor,
    grad: torch.Tensor | None = None,
    inverse_grad_scale: float = 1.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(code, status) as `powersgd_project`; changes `error`."""
    grad_finite = torch.ones((), dtype=torch.bool, device=error.device)
    if grad is not None:
        grad_finite = grad.isfinite().all()
        added = _encode(_decode(error) + grad.double() * inverse_grad_scale)
        error.copy_(torch.where(grad_finite, added.int(), error.int()))
    e = _decode(error)
    x = _decode(factor) if factor.dtype == torch.uint16 else factor.double()
    product = minifloat_decode_reference(_encode(e @ x * scale), "1-6-9")
    status = torch.stack((grad_finite, e.isfinite().all(), product.isfinite().all())).int()
    return _encode(product.clamp(-LARGEST, LARGEST)), status


def powersgd_reconstruct_reference(
    p: torch.Tensor,
    q: torch.Tensor,
    error: torch.Tensor | None = None,
    grad_factor: float = 1.0,
    error_factor: float = 1.0,
) -> torch.Tensor:
    """As `powersgd_reconstruct`; changes `error`."""
    product = _decode(p) @ _decode(q).mT
    if error is not None:
        error.copy_(_encode(_decode(error) - product * error_factor))
    return (product * grad_factor).float()
