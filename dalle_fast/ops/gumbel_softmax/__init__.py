# SPDX-License-Identifier: MIT
"""Gumbel-softmax with noise that is a function of (seed, offset, row, code): nothing random is stored."""

from __future__ import annotations

import torch

from .. import _backend
from .._checks import check_bool, check_int, check_tensor, shown
from .._noise import check_noise, check_tau
from . import op
from .reference import gumbel_softmax_reference


def gumbel_softmax(
    logits: torch.Tensor,
    tau: float,
    dim: int = 1,
    seed: int = 0,
    offset: int = 0,
    hard: bool = False,
    *,
    return_kl: bool = False,
    row_offset: int = 0,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draws a relaxed, or a hard, sample from categoricals, with their KL to a uniform prior (paper section 2.1).

    Soft: y = softmax((logits + g) / tau) over `dim`, g = -ln(-ln u), without straight-through. Hard: the index
    argmax(logits + g), a sample from softmax(logits); ties go to the lower index.

    Row r (row-major over all other dimensions) and code c take their noise from Philox4x32-10 with key = seed and
    counter = (c // 4, row_offset + r, offset low, offset high), word c % 4, and u = (word >> 8 + 0.5) * 2^-24. So the
    same call gives the same noise on any back end (the words are equal bit for bit, g agrees to a few units in the
    last place), at any number of threads, and a shard of a batch draws what the whole batch would, by `row_offset`.
    One call uses one offset: pass the training step, or the position. Different offsets are independent.

    The arithmetic is float32 for bfloat16 and float16 logits. The gradient needs neither the noise nor the logits:
    dlogits = y * (dy - sum(dy * y)) / tau, from the output alone. NaN and Inf in the logits act as in torch.softmax
    and torch.argmax.

    return_kl adds kl = sum q ln q + ln V of the softmax without noise, q = softmax(logits), in the same passes over
    memory; a code whose logit is -Inf adds nothing to it. The sample is the one without it. The gradient then has
    the term dkl * q * (ln q - sum q ln q) too, from the logits and three numbers a row; either result may go unused.

    Args:
        logits: [..., V, ...], float32, bfloat16 or float16, any strides; float64 runs on the reference. Fastest when
            contiguous (dim=1 of [B, V, H, W]) or with `dim` innermost in memory (channels_last).
        tau: temperature > 0. Hard samples do not depend on it.
        dim: the dimension of the V codes.
        seed: 64 bits, signed or unsigned.
        offset: 64 bits, signed or unsigned.
        hard: return indices in place of probabilities.
        return_kl: also return the KL of softmax(logits) to the uniform distribution.
        row_offset: number of the first row, >= 0; row_offset + rows may not pass 2^32.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        Soft: the shape and dtype of `logits`, differentiable. Hard: int64 indices, `dim` removed.
        With return_kl the pair of that and kl: `dim` removed, float32 (float64 for float64 logits), in nats,
        differentiable in both.

    Raises:
        TypeError: `logits` is not a floating tensor, or another argument is of the wrong type.
        ValueError: `tau`, `dim`, `seed`, `offset` or `row_offset` is out of range, hard samples or kl are asked
            of zero codes, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> gumbel_softmax(torch.zeros(1, 3, 2), tau=1.0, seed=1).sum(1)
        tensor([[1., 1.]])
        >>> y, kl = gumbel_softmax(torch.zeros(2, 4, 3, 3), tau=1.0, seed=1, return_kl=True)
        >>> y.shape, kl.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([2, 3, 3]))
    """
    check_tensor("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: expected at least one dimension, got a scalar")
    check_int("dim", dim)
    if not -logits.dim() <= dim < logits.dim():
        limits = f"{-logits.dim()}..{logits.dim() - 1}"
        raise ValueError(f"dim: expected {limits} for shape {list(logits.shape)}, got {shown(dim)}")
    tau = check_tau(tau)
    check_bool("hard", hard)
    check_bool("return_kl", return_kl)
    dim = dim % logits.dim()
    num_codes = logits.shape[dim]
    if (hard or return_kl) and num_codes == 0:
        raise ValueError(f"logits: expected at least one code in dim {dim}, got shape {list(logits.shape)}")
    num_rows = logits.numel() // num_codes if num_codes else 0
    seed, offset = check_noise(seed, offset, row_offset, num_rows, "logits")

    supported = logits.dtype in op.DTYPES
    chosen = _backend.choose(
        "gumbel_softmax", backend, logits, supported=supported, reason=f"dtype {logits.dtype} has no kernel"
    )
    if chosen == "reference":
        return gumbel_softmax_reference(
            logits, tau, dim, seed, offset, hard, return_kl=return_kl, row_offset=row_offset
        )
    if return_kl:
        return op.gumbel_softmax_kl(logits, tau, dim, seed, offset, row_offset, hard)[:2]
    if hard:
        return op.gumbel_argmax(logits, dim, seed, offset, row_offset)
    return op.gumbel_softmax(logits, tau, dim, seed, offset, row_offset)
