# SPDX-License-Identifier: MIT
"""The discrete bottleneck of the dVAE, from features to codebook vectors, as one op that never keeps the logits."""

from __future__ import annotations

import torch

from .. import _backend
from .._autocast import compute_dtype, is_autocast
from .._checks import check_kept, check_tensor
from .._noise import check_noise, check_tau
from . import op
from .reference import vq_bottleneck_reference


def vq_bottleneck(
    x: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    codebook: torch.Tensor,
    tau: float,
    seed: int = 0,
    offset: int = 0,
    *,
    codebook_bias: torch.Tensor | None = None,
    row_offset: int = 0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relaxed codes of every grid cell, their codebook vectors, and the KL to a uniform prior (paper section 2.1).

    Per cell l = head_weight x + head_bias, y = softmax((l + g) / tau), out = codebook y + codebook_bias, and with the
    unrelaxed q = softmax(l) kl = sum q ln q + ln V: two 1x1 convolutions with a Gumbel-softmax between them. The noise
    g is that of `gumbel_softmax` on l: row r is cell r of (B, h, w), row-major.

    Logits exist for one chunk of cells at a time; four numbers a cell are kept for the backward pass, which computes
    them again. Logits, noise and both distributions are float32 (section 2.4), whatever the operands of the products;
    beside a bfloat16 codebook y and the gradient of the logits are rounded to bfloat16 before their products, on CUDA
    and on a CPU that multiplies bfloat16; other CPUs multiply float32. Under torch.autocast the operands and `out` have
    the autocast dtype, as with F.conv2d.
    NaN and Inf act as in torch.softmax; a code whose logit is -Inf adds nothing to kl. First derivatives only:
    backend="reference" has further ones.

    Args:
        x: [B, C, h, w] or [N, C], float32, bfloat16 or float16, any strides, fastest with channels innermost in memory
            (channels_last); float64 runs on the reference.
        head_weight: [V, C] or [V, C, 1, 1], the dtype of `x` unless autocast is on, as all that follow.
        head_bias: [V] or None.
        codebook: [D, V] or [D, V, 1, 1], the weight of the decoder's first convolution.
        tau: temperature > 0.
        seed: 64 bits, signed or unsigned.
        offset: 64 bits, signed or unsigned; pass the training step.
        codebook_bias: [D] or None.
        row_offset: number of the first cell, >= 0, for a shard of a batch; row_offset + cells may not pass 2^32.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        out: [B, D, h, w] (channels_last where `x` is) or [N, D], the dtype of `x` or of autocast.
        kl: [B, h, w] or [N] float32 (float64 for float64 inputs), in nats.

    Raises:
        TypeError: a tensor is missing or has the wrong dtype, or a number is of the wrong type.
        ValueError: shapes do not fit together, a number is out of range, or `backend` is unknown.
        RuntimeError: an explicit `backend` cannot run.

    Example:
        >>> out, kl = vq_bottleneck(torch.zeros(1, 4, 2, 2), torch.ones(8, 4), None, torch.ones(3, 8), tau=0.5)
        >>> out.shape, kl
        (torch.Size([1, 3, 2, 2]), tensor([[[0., 0.], [0., 0.]]]))
    """
    head_weight, codebook = _check(x, head_weight, head_bias, codebook, codebook_bias)
    tau = check_tau(tau)
    num_cells = x.shape[:1].numel() * x.shape[2:].numel()
    seed, offset = check_noise(seed, offset, row_offset, num_cells, "x")
    others = {"head_weight": head_weight, "head_bias": head_bias, "codebook": codebook, "codebook_bias": codebook_bias}
    compute = compute_dtype(x, others)

    supported = all(t is None or t.dtype in op.DTYPES for t in (x, *others.values()))
    chosen = _backend.choose("vq_bottleneck", backend, x, supported=supported, reason=f"dtype {x.dtype} has no kernel")
    if chosen == "reference":
        check_kept({"x": x, "head_weight": head_weight, "codebook": codebook}, head_bias, codebook_bias)
        arguments = (x, head_weight, head_bias, codebook, tau, seed, offset)
        options = {"codebook_bias": codebook_bias, "row_offset": row_offset}
        if not is_autocast(x):
            return vq_bottleneck_reference(*arguments, **options)
        with torch.autocast(x.device.type, enabled=False):  # it would round the logits
            return vq_bottleneck_reference(x.to(compute), *arguments[1:], **options)
    weights = (head_weight, head_bias, codebook, codebook_bias)
    return op.vq_bottleneck(x, *weights, tau, seed, offset, row_offset, compute)[:2]


def _check(x, head_weight, head_bias, codebook, codebook_bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Both weights as matrices."""
    for name, tensor, optional in (
        ("x", x, False),
        ("head_weight", head_weight, False),
        ("head_bias", head_bias, True),
        ("codebook", codebook, False),
        ("codebook_bias", codebook_bias, True),
    ):
        if tensor is None and optional:
            continue
        check_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")
    if x.dim() not in (2, 4):
        raise ValueError(f"x: expected shape [B, C, h, w] or [N, C], got {list(x.shape)}")
    head_weight = _matrix("head_weight", head_weight, x.shape[1], f"[V, {x.shape[1]}] for x of {list(x.shape)}")
    num_codes = head_weight.shape[0]
    if num_codes == 0:
        raise ValueError(f"head_weight: expected at least one code, got shape {list(head_weight.shape)}")
    codebook = _matrix("codebook", codebook, num_codes, f"[D, {num_codes}] for the codes of head_weight")
    for name, tensor, length in (
        ("head_bias", head_bias, num_codes),
        ("codebook_bias", codebook_bias, codebook.shape[0]),
    ):
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name}: expected shape [{length}], got {list(tensor.shape)}")
    return head_weight, codebook


def _matrix(name: str, weight: torch.Tensor, columns: int, expected: str) -> torch.Tensor:
    """`weight` without the two dimensions of a 1x1 kernel."""
    if weight.dim() not in (2, 4) or weight.shape[1] != columns or weight.shape[2:].numel() != 1:
        raise ValueError(f"{name}: expected shape {expected}, got {list(weight.shape)}")
    return weight.flatten(1) if weight.dim() == 4 else weight
