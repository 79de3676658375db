# SPDX-License-Identifier: MIT
"""torch's view of vq_bottleneck: schema, allocation, autograd, and on CUDA the chunks and their matrix products.

The CPU's kernels do the whole op, in float32. On CUDA rows (grid cells) go in chunks whose logits fit the second-level
cache. Forward: logits by one product into a buffer that all chunks share, one kernel that turns them into y in place,
one product into out. Backward: the logits and dy by two products, one kernel that turns them into dlogits and y in
place, and one product for each gradient that is wanted. Either way four statistics a row are kept between the two.

On CUDA logits and dy are float32 whatever the operands; y and dlogits become operands again, bfloat16 beside bfloat16,
else float32 (in float16 dlogits would underflow). So they do on a CPU that multiplies bfloat16; others multiply
float32.
"""

from __future__ import annotations

import torch

from ... import memory
from .._autocast import without_autocast
from .._backend import _C, stream_of
from .._register import no_second_derivative, register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Logits of a chunk: on CUDA 8 MiB, which stay in the second-level cache with as much of dy. The CPU works in tiles and
# needs chunks only for sums over rows: enough rows to share out.
_CUDA_LOGITS = 1 << 21
_CPU_LOGITS, _CPU_ROWS = 1 << 21, 512
# But as many rows as x has channels (up to this number): adding to the [V, C] gradient once a chunk then costs no more
# than a pass over the logits.
_CHANNELS = 1024
# core/dispatch.h: the lowest level of a CPU that multiplies bfloat16.
_BF16_LEVEL = 5


def chunk_rows(num_rows: int, num_channels: int, num_codes: int, whole: bool) -> int:
    """Rows whose logits exist at a time."""
    fitting = min(_CPU_ROWS, _CPU_LOGITS // num_codes) if whole else _CUDA_LOGITS // num_codes
    return max(1, min(num_rows, max(fitting, min(num_channels, _CHANNELS))))


def _padded(n: int, dtype: torch.dtype = torch.float32) -> int:
    """Kernels read and write whole vectors and tiles of float32."""
    return -(-n // 32) * 32 if dtype == torch.float32 else n


def _is_whole(x: torch.Tensor) -> bool:
    """Whether kernels do the whole op; the host executor has those for CUDA only."""
    return x.device.type == "cpu" and hasattr(_C, "vq_bottleneck_forward")


# ---- rows and their memory


def _channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C] of [B, C, h, w] or of [N, C], dense; a view where channels are innermost in memory."""
    return (x.permute(0, 2, 3, 1).flatten(0, 2) if x.dim() == 4 else x).contiguous()


def _like(x: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rows` [N, D] with the dimensions of `x` and its order of memory."""
    rows = rows.to(dtype).contiguous()
    if x.dim() == 2:
        return rows
    images = rows.view(x.shape[0], x.shape[2], x.shape[3], rows.shape[1]).permute(0, 3, 1, 2)
    return images if _channels_last(x) else images.contiguous()


def _kl_shape(x: torch.Tensor) -> torch.Size:
    return x.shape[:1] + x.shape[2:]


def _cast(
    tensor: torch.Tensor | None, rounded: torch.dtype = torch.float32, operand: torch.dtype = torch.float32
) -> torch.Tensor | None:
    """Rounded to `rounded`, dense in `operand`."""
    return None if tensor is None else tensor.to(rounded).to(operand).contiguous()


# ---- chunks


class _Chunk:
    """The buffers that all chunks of a call share, and products of their rows."""

    def __init__(self, rows: torch.Tensor, num_codes: int) -> None:
        num_rows, num_channels = rows.shape
        self.num_rows = chunk_rows(num_rows, num_channels, num_codes, whole=False)
        self.parts = [slice(i, min(i + self.num_rows, num_rows)) for i in range(0, num_rows, self.num_rows)]
        self.num_codes = num_codes
        self.like = rows
        self.operand = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32  # of y and dlogits

    def buffer(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.like.new_empty(self.num_rows, _padded(self.num_codes), dtype=dtype)

    def twin(self, buffer: torch.Tensor) -> torch.Tensor:
        """Where float32 results go that become operands: in place, if they can."""
        return buffer if self.operand == torch.float32 else self.buffer(self.operand)

    def codes(self, buffer: torch.Tensor) -> torch.Tensor:
        """`buffer` without its padding."""
        return buffer if buffer.shape[1] == self.num_codes else buffer[:, : self.num_codes]


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b in float32. CUDA adds up and returns float32 of 16-bit operands; the host executor's are raised first."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    if first:
        _product(a, b, out=total)
    elif a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(_product(a, b))


def _forward_chunks(rows, head_weight, head_bias, codebook, codebook_bias, kl, stats, noise):
    tau, seed, offset, row_offset = noise
    chunk = _Chunk(rows, head_weight.shape[0])
    weight, bias = head_weight.to(rows.dtype).t(), _cast(head_bias)
    codes = codebook.to(rows.dtype).to(chunk.operand).t()
    code_bias = None if codebook_bias is None else codebook_bias.to(rows.dtype).to(chunk.operand)
    out = rows.new_empty(rows.shape[0], codebook.shape[0], dtype=chunk.operand)
    logits_buffer = chunk.buffer()
    y_buffer = chunk.twin(logits_buffer)
    stream = stream_of(rows)
    for part in chunk.parts:
        logits, y = (buffer[: part.stop - part.start] for buffer in (logits_buffer, y_buffer))
        _product(rows[part], weight, out=chunk.codes(logits))
        numbers = (chunk.num_codes, tau, seed, offset, row_offset + part.start)
        _C.vq_bottleneck_relax(y, kl[part], stats[part], logits, bias, *numbers, stream)
        if code_bias is None:
            torch.mm(chunk.codes(y), codes, out=out[part])
        else:
            torch.addmm(code_bias, chunk.codes(y), codes, out=out[part])
    return out


def _backward_chunks(rows, head_weight, head_bias, codebook, kl, stats, dout, dkl, noise, needs):
    tau, seed, offset, row_offset = noise
    chunk = _Chunk(rows, head_weight.shape[0])
    weight, codes, bias = head_weight.to(rows.dtype), codebook.to(rows.dtype), _cast(head_bias)
    weight_operand, rows_operand, dout_operand = (t.to(chunk.operand) for t in (weight, rows, dout))
    dx = rows.new_empty(rows.shape, dtype=chunk.operand) if needs[0] else None
    dweight, dbias, dcodes = (
        t.new_empty(t.shape, dtype=torch.float32) if wanted else None
        for t, wanted in zip((head_weight, head_bias, codebook), needs[1:])
    )
    logits_buffer, dy_buffer = chunk.buffer(), chunk.buffer()
    buffers = (logits_buffer, dy_buffer, chunk.twin(logits_buffer), chunk.twin(dy_buffer))
    stream = stream_of(rows)
    for part in chunk.parts:
        logits, dy, dlogits, y = (buffer[: part.stop - part.start] for buffer in buffers)
        _product(rows[part], weight.t(), out=chunk.codes(logits))
        _product(dout[part], codes, out=chunk.codes(dy))
        upstream = (dy, stats[part], kl[part], dkl[part])
        numbers = (chunk.num_codes, tau, seed, offset, row_offset + part.start)
        _C.vq_bottleneck_gradient(y, dlogits, logits, bias, *upstream, *numbers, stream)
        dlogits, y, first = chunk.codes(dlogits), chunk.codes(y), part.start == 0
        if dx is not None:
            torch.mm(dlogits, weight_operand, out=dx[part])
        if dweight is not None:
            _add_product(dweight, dlogits.t(), rows_operand[part], first)
        if dcodes is not None:
            _add_product(dcodes, dout_operand[part].t(), y, first)
        if dbias is not None:
            sums = torch.sum(dlogits, 0, dtype=torch.float32)
            dbias = sums if first else dbias.add_(sums)
    return dx, dweight, dbias, dcodes


# ---- the whole


def _operand(dtype: torch.dtype) -> torch.dtype:
    """What the CPU multiplies in place of `dtype`."""
    return dtype if dtype == torch.bfloat16 and _C.cpu_level() >= _BF16_LEVEL else torch.float32


def _forward_whole(rows, head_weight, head_bias, codebook, codebook_bias, kl, stats, noise):
    (num_codes, num_channels), width = head_weight.shape, codebook.shape[0]
    rounded, operand = rows.dtype, _operand(rows.dtype)
    x, weight, codes = (_cast(t, rounded, operand) for t in (rows, head_weight, codebook))
    bias, code_bias = (_cast(t, rounded) for t in (head_bias, codebook_bias))
    out = memory.empty(x, (rows.shape[0], _padded(width, operand)))
    workspace = memory.empty(kl, (_C.vq_bottleneck_forward_workspace(num_channels, num_codes, width),))
    _C.vq_bottleneck_forward(out, kl, stats, x, weight, bias, codes, code_bias, workspace, *noise)
    return out[:, :width]


def _backward_whole(rows, head_weight, head_bias, codebook, kl, stats, dout, dkl, noise, needs):
    (num_codes, num_channels), width = head_weight.shape, codebook.shape[0]
    rounded, operand = rows.dtype, _operand(rows.dtype)
    chunk = chunk_rows(rows.shape[0], num_channels, num_codes, whole=True)
    x, weight, codes, upstream = (_cast(t, rounded, operand) for t in (rows, head_weight, codebook, dout))
    bias = _cast(head_bias, rounded)
    dx = memory.empty(x, (rows.shape[0], _padded(num_channels, operand))) if needs[0] else None
    dweight = memory.empty(kl, (_padded(num_codes), _padded(num_channels))) if needs[1] else None
    dbias = kl.new_empty(num_codes) if needs[2] else None
    dcodes = memory.empty(kl, (_padded(width), _padded(num_codes))) if needs[3] else None
    workspace = memory.empty(kl, (_C.vq_bottleneck_backward_workspace(num_channels, num_codes, width, chunk),))
    inputs = (x, weight, bias, codes, stats, kl, upstream, dkl)
    _C.vq_bottleneck_backward(dx, dweight, dbias, dcodes, *inputs, workspace, chunk, *noise)
    cut = lambda t, rows, columns: None if t is None else t[:rows, :columns]  # noqa: E731
    return (
        cut(dx, rows.shape[0], num_channels),
        cut(dweight, num_codes, num_channels),
        dbias,
        cut(dcodes, width, num_codes),
    )


# ---- the op


@without_autocast
def _forward(x, head_weight, head_bias, codebook, codebook_bias, tau, seed, offset, row_offset, compute):
    rows = _rows(x).to(compute)
    kl = x.new_empty(rows.shape[0], dtype=torch.float32)
    stats = x.new_empty(rows.shape[0], 4, dtype=torch.float32)
    run = _forward_whole if _is_whole(x) else _forward_chunks
    noise = (tau, seed, offset, row_offset)
    out = run(rows, head_weight, head_bias, codebook, codebook_bias, kl, stats, noise)
    return _like(x, out, compute), kl.view(_kl_shape(x)), stats


def _forward_fake(x, head_weight, head_bias, codebook, codebook_bias, tau, seed, offset, row_offset, compute):
    kl = x.new_empty(_kl_shape(x), dtype=torch.float32)
    out = x.new_empty(kl.numel(), codebook.shape[0])
    return _like(x, out, compute), kl, x.new_empty(kl.numel(), 4, dtype=torch.float32)


@without_autocast
def _gradients(
    x, head_weight, head_bias, codebook, kl, stats, dout, dkl, tau, seed, offset, row_offset, compute, needs
):
    rows, dout_rows = _rows(x).to(compute), _rows(dout).to(compute)
    inputs = (head_weight, head_bias, codebook)
    if rows.shape[0] == 0:
        grads = [torch.zeros_like(t) if wanted else None for t, wanted in zip((rows, *inputs), needs)]
    else:
        run = _backward_whole if _is_whole(x) else _backward_chunks
        upstream = (kl.reshape(-1), stats, dout_rows, dkl.reshape(-1).contiguous())
        grads = run(rows, *inputs, *upstream, (tau, seed, offset, row_offset), needs)
    dx, *others = grads
    others.append(dout_rows.sum(0, dtype=torch.float32) if needs[4] else None)
    others = (x.new_empty(0, dtype=torch.float32) if t is None else _cast(t) for t in others)
    return x.new_empty(0) if dx is None else _like(x, dx, x.dtype), *others


def _gradients_fake(
    x, head_weight, head_bias, codebook, kl, stats, dout, dkl, tau, seed, offset, row_offset, compute, needs
):
    shapes = (head_weight.shape, head_weight.shape[:1], codebook.shape, codebook.shape[:1])
    dx = _like(x, x.new_empty(kl.numel(), x.shape[1]), x.dtype) if needs[0] else x.new_empty(0)
    others = (x.new_empty(shape if wanted else 0, dtype=torch.float32) for shape, wanted in zip(shapes, needs[1:]))
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
