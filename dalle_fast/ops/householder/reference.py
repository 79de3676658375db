# SPDX-License-Identifier: MIT
"""Orthonormal columns in plain torch: LAPACK's Householder QR."""

from __future__ import annotations

import torch

from ..minifloat.reference import minifloat_decode_reference, minifloat_encode_reference


def orthonormalize_reference(p: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Q of P + eps I, in the dtype of `p`; uint16 holds 1-6-9 codes."""
    codes = p.dtype == torch.uint16
    x = minifloat_decode_reference(p, "1-6-9") if codes else p
    if x.numel() == 0:
        return torch.empty_like(p)
    x = x + eps * torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    finite = x.isfinite().flatten(-2).all(-1)[..., None, None]
    q = torch.linalg.qr(torch.where(finite, x, 0.0)).Q
    q = torch.where(finite, q, torch.nan)
    return minifloat_encode_reference(q, "1-6-9") if codes else q
