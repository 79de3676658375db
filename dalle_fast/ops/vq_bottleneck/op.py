# SPDX-License-Identifier: MIT
"""torch's view of vq_bottleneck: schema, chunking, matrix products, autograd.

Rows (grid cells) go in chunks whose logits fit a second-level cache. Forward: logits by one product into a buffer that
all chunks share, one kernel that turns them into y in place, one product into out; four statistics a row are kept.
Backward: the logits and dy by two products, one kernel that turns them into dlogits and y in place, and one product
for each gradient that is wanted.

Logits and dy are float32 whatever the operands. y and dlogits are operands again: bfloat16 beside bfloat16, float32
beside float32 and float16 (float16 products run at a fortieth of float32's speed on CPU, and dlogits would underflow).
"""

from __future__ import annotations

import torch

from .._autocast import without_autocast
from .._backend import _C, stream_of
from .._register import no_second_derivative, register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Logits of a chunk: with dy twice 8 MiB, which stay in the second-level cache of a GPU and the last of a CPU.
_MAX_LOGITS = 1 << 21
# But as many rows as x has channels (up to this number): adding to the [V, C] gradient once a chunk then costs no more
# than a pass over the logits.
_MIN_ROWS = 1024


def chunk_rows(num_rows: int, num_channels: int, num_codes: int) -> int:
    """Rows whose logits exist at a time."""
    return max(1, min(num_rows, max(_MAX_LOGITS // max(num_codes, 1), min(num_channels, _MIN_ROWS))))


def _channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C] of [B, C, h, w] or of [N, C], rows dense; a view where channels are innermost in memory."""
    return (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.dim() == 4 else x).contiguous()


def _like(x: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rows` [N, D] with the dimensions of `x` and its order of memory."""
    rows = rows.to(dtype)
    if x.dim() == 2:
        return rows
    images = rows.view(x.shape[0], x.shape[2], x.shape[3], rows.shape[1]).permute(0, 3, 1, 2)
    return images if _channels_last(x) else images.contiguous()


def _operand(compute: torch.dtype) -> torch.dtype:
    """The dtype of y and dlogits."""
    return torch.bfloat16 if compute == torch.bfloat16 else torch.float32


class _Chunk:
    """The buffers that all chunks of a call share, and float32 products into them."""

    def __init__(self, rows: torch.Tensor, num_codes: int) -> None:
        num_rows, num_channels = rows.shape
        self.num_rows = chunk_rows(num_rows, num_channels, num_codes)
        self.parts = [slice(i, min(i + self.num_rows, num_rows)) for i in range(0, num_rows, self.num_rows)]
        self.num_codes = num_codes
        self.like = rows
        # CUDA makes float32 of 16-bit operands; elsewhere they are raised first
        self.dtype = rows.dtype if rows.is_cuda else torch.float32

    def buffer(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, V] and some padding, so that kernels load whole vectors."""
        return self.like.new_empty(min(self.num_rows, self.like.shape[0]), -(-self.num_codes // 16) * 16, dtype=dtype)

    def codes(self, buffer: torch.Tensor) -> torch.Tensor:
        """`buffer` without its padding."""
        return buffer if buffer.shape[1] == self.num_codes else buffer[:, : self.num_codes]

    def product(self, buffer: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """buffer = a b for b in `self.dtype`."""
        if self.dtype == torch.float32:
            torch.mm(a.float(), b, out=self.codes(buffer))
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=self.codes(buffer))


def _add(total: torch.Tensor, part: torch.Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total (+)= a b in float32."""
    if a.dtype != torch.float32:
        _add(total, torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b), first)
    elif first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def _float_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _kl_shape(x: torch.Tensor) -> torch.Size:
    return x.shape[:1] + x.shape[2:]


@without_autocast
def _forward(x, head_weight, head_bias, codebook, codebook_bias, tau, seed, offset, row_offset, compute):
    operand = _operand(compute)
    rows = _rows(x).to(compute)
    num_codes = head_weight.shape[0]
    chunk = _Chunk(rows, num_codes)
    weight = head_weight.to(compute).to(chunk.dtype).t()
    bias = _float_bias(head_bias)
    codes = codebook.to(compute).to(operand).t()
    code_bias = None if codebook_bias is None else codebook_bias.to(compute).to(operand)

    out = x.new_empty(rows.shape[0], codebook.shape[0], dtype=operand)
    kl = x.new_empty(rows.shape[0], dtype=torch.float32)
    stats = x.new_empty(rows.shape[0], 4, dtype=torch.float32)
    logits_buffer = chunk.buffer(torch.float32)
    y_buffer = logits_buffer if operand == torch.float32 else chunk.buffer(operand)
    stream = stream_of(x)
    for part in chunk.parts:
        count = part.stop - part.start
        logits, y = logits_buffer[:count], y_buffer[:count]
        chunk.product(logits, rows[part], weight)
        noise = (tau, seed, offset, row_offset + part.start)
        _C.vq_bottleneck_relax(y, kl[part], stats[part], logits, bias, num_codes, *noise, stream)
        if code_bias is None:
            torch.mm(chunk.codes(y), codes, out=out[part])
        else:
            torch.addmm(code_bias, chunk.codes(y), codes, out=out[part])
    return _like(x, out, compute), kl.view(_kl_shape(x)), stats


def _forward_fake(x, head_weight, head_bias, codebook, codebook_bias, tau, seed, offset, row_offset, compute):
    kl = x.new_empty(_kl_shape(x), dtype=torch.float32)
    out = x.new_empty(kl.numel(), codebook.shape[0])
    return _like(x, out, compute), kl, x.new_empty(kl.numel(), 4, dtype=torch.float32)


@without_autocast
def _gradients(
    x, head_weight, head_bias, codebook, kl, stats, dout, dkl, tau, seed, offset, row_offset, compute, needs
):
    needs_x, needs_weight, needs_bias, needs_codebook, needs_codebook_bias = needs
    operand = _operand(compute)
    rows, dout_rows = _rows(x).to(compute), _rows(dout).to(compute)
    num_rows, num_codes = rows.shape[0], head_weight.shape[0]
    chunk = _Chunk(rows, num_codes)
    weight, codes = head_weight.to(compute), codebook.to(compute)
    logit_weight, logit_codes = weight.to(chunk.dtype).t(), codes.to(chunk.dtype)
    weight, rows_operand, dout_operand = weight.to(operand), rows.to(operand), dout_rows.to(operand)
    bias = _float_bias(head_bias)
    kl, dkl = kl.reshape(-1), dkl.reshape(-1).contiguous()

    dx = x.new_empty(rows.shape if needs_x else 0, dtype=operand)
    make = torch.empty if num_rows else torch.zeros
    dweight, dbias, dcodes = (
        make(t.shape if t is not None and wanted else 0, dtype=torch.float32, device=x.device)
        for t, wanted in ((head_weight, needs_weight), (head_bias, needs_bias), (codebook, needs_codebook))
    )
    logits_buffer, dy_buffer = chunk.buffer(torch.float32), chunk.buffer(torch.float32)
    in_place = operand == torch.float32
    dlogits_buffer = logits_buffer if in_place else chunk.buffer(operand)
    y_buffer = dy_buffer if in_place else chunk.buffer(operand)
    stream = stream_of(x)
    for part in chunk.parts:
        first, count = part.start == 0, part.stop - part.start
        logits, dy, dlogits, y = (b[:count] for b in (logits_buffer, dy_buffer, dlogits_buffer, y_buffer))
        chunk.product(logits, rows[part], logit_weight)
        chunk.product(dy, dout_rows[part], logit_codes)
        upstream = (dy, stats[part], kl[part], dkl[part])
        noise = (tau, seed, offset, row_offset + part.start)
        _C.vq_bottleneck_gradient(y, dlogits, logits, bias, *upstream, num_codes, *noise, stream)
        dlogits, y = chunk.codes(dlogits), chunk.codes(y)
        if needs_x:
            torch.mm(dlogits, weight, out=dx[part])
        if needs_weight:
            _add_product(dweight, dlogits.t(), rows_operand[part], first)
        if needs_codebook:
            _add_product(dcodes, dout_operand[part].t(), y, first)
        if needs_bias:
            _add(dbias, torch.sum(dlogits, 0, dtype=torch.float32), first)
    dcodes_bias = dout_rows.sum(0, dtype=torch.float32) if needs_codebook_bias else dkl.new_empty(0)
    return _like(x, dx, x.dtype) if needs_x else dx.to(x.dtype), dweight, dbias, dcodes, dcodes_bias


def _gradients_fake(
    x, head_weight, head_bias, codebook, kl, stats, dout, dkl, tau, seed, offset, row_offset, compute, needs
):
    shapes = (head_weight.shape, head_weight.shape[:1], codebook.shape, codebook.shape[:1])
    dx = _like(x, x.new_empty(kl.numel(), x.shape[1]), x.dtype) if needs[0] else x.new_empty(0)
    others = (
        x.new_empty(shape if wanted else 0, dtype=torch.float32) for shape, wanted in zip(shapes, needs[1:])
    )
    return dx, *others


def _setup_context(ctx, inputs, output) -> None:
    x, head_weight, head_bias, codebook, codebook_bias, *ctx.noise, ctx.compute = inputs
    _, kl, stats = output
    ctx.dtypes = [None if t is None else t.dtype for t in (x, head_weight, head_bias, codebook, codebook_bias)]
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x, head_weight, head_bias, codebook, kl, stats)


def _backward(ctx, dout, dkl, _):
    needs = list(ctx.needs_input_grad[:5])
    grads = vq_bottleneck_backward(*ctx.saved_tensors, dout, dkl, *ctx.noise, ctx.compute, needs)
    grads = [g.to(dtype) if wanted else None for g, dtype, wanted in zip(grads, ctx.dtypes, needs)]
    return *grads, None, None, None, None, None


vq_bottleneck_backward = register_op(
    "vq_bottleneck_backward",
    "(Tensor x, Tensor head_weight, Tensor? head_bias, Tensor codebook, Tensor kl, Tensor stats, Tensor dout, "
    "Tensor dkl, float tau, SymInt seed, SymInt offset, SymInt row_offset, ScalarType compute, bool[] needs) -> "
    "(Tensor dx, Tensor dhead_weight, Tensor dhead_bias, Tensor dcodebook, Tensor dcodebook_bias)",
    _gradients,
    _gradients_fake,
    **no_second_derivative("vq_bottleneck"),
)
vq_bottleneck = register_op(
    "vq_bottleneck",
    "(Tensor x, Tensor head_weight, Tensor? head_bias, Tensor codebook, Tensor? codebook_bias, float tau, SymInt seed, "
    "SymInt offset, SymInt row_offset, ScalarType compute) -> (Tensor out, Tensor kl, Tensor stats)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
