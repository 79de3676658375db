# SPDX-License-Identifier: MIT
"""Orthonormal columns by Householder reflections, many matrices at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _backend
from .._checks import check_tensor, finite, shown
from . import op
from .reference import orthonormalize_reference


def orthonormalize(
    p: torch.Tensor | Sequence[torch.Tensor], eps: float = 1e-6, *, backend: str = "auto"
) -> torch.Tensor | list[torch.Tensor]:
    """An orthonormal basis of the columns of each P + eps I (paper appendix D; step 5 of PowerSGD in spec 5.3).

    Q of the QR decomposition, with LAPACK's signs. I is the rectangular identity: with `eps` > 0 a matrix of zeros has
    a basis too. Columns of any magnitude are welcome; ||Q^T Q - I|| stays near float32's rounding at any condition
    number. All matrices of a call run in parallel. Not differentiable.

    Args:
        p: [m, r] or [N, m, r] with m >= r, or a sequence of such tensors on one device; any strides. float32, float64
            (on the reference), or uint16: 1-6-9 codes, decoded on load and encoded on store.
        eps: added to the diagonal, in units of the decoded numbers.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        Q of the shape and dtype of `p`; a list for a sequence. A matrix with NaN or Inf gives NaN.

    Raises:
        TypeError: `p` is no tensor or sequence of tensors, or has another dtype.
        ValueError: not two or three dimensions, more columns than rows, tensors of several devices or dtypes, `eps`
            not finite, or an unknown `backend`.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> q = orthonormalize(torch.randn(496, 112))
        >>> torch.allclose(q.T @ q, torch.eye(112), atol=1e-5)
        True
    """
    many = not isinstance(p, torch.Tensor)
    if many and (not isinstance(p, Sequence) or isinstance(p, (str, bytes))):
        raise TypeError(f"p: expected a torch.Tensor or a sequence of them, got {shown(p)}")
    tensors = list(p) if many else [p]
    for i, tensor in enumerate(tensors):
        _check(tensor, f"p[{i}]" if many else "p", tensors[0])
    eps = finite("eps", eps)
    if not tensors:
        return []
    chosen = _backend.choose(
        "householder", backend, tensors[0], supported=tensors[0].dtype != torch.float64, reason="float64 has no kernel"
    )
    tensors = [tensor.detach() for tensor in tensors]
    if chosen == "reference":
        results = [orthonormalize_reference(tensor, eps) for tensor in tensors]
    else:
        batches = [tensor if tensor.dim() == 3 else tensor[None] for tensor in tensors]
        results = [q if tensor.dim() == 3 else q[0] for q, tensor in zip(op.householder(batches, eps), tensors)]
    return results if many else results[0]


def _check(tensor: torch.Tensor, name: str, first: torch.Tensor) -> None:
    check_tensor(name, tensor, (torch.float32, torch.float64, torch.uint16), "a float32, float64 or uint16")
    if tensor.dim() not in (2, 3) or tensor.shape[-2] < tensor.shape[-1]:
        raise ValueError(f"{name}: expected shape [m, r] or [N, m, r] with m >= r, got {list(tensor.shape)}")
    if tensor.device != first.device or tensor.dtype != first.dtype:
        raise ValueError(
            f"{name}: expected {first.dtype} on {first.device} as p[0] has, got {tensor.dtype} on {tensor.device}"
        )
