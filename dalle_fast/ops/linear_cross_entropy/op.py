# SPDX-License-Identifier: MIT
"""torch's view of linear_cross_entropy: schema, chunking, matrix products, autograd.

Per chunk of rows: logits by one GEMM into a buffer that all chunks share, one kernel that turns them into dlogits in
place, and a GEMM for each gradient that is wanted. So the gradients are ready when the loss is, the logits are never
kept, and the backward pass only multiplies by dloss, or not even that where it is the `upstream` that was expected.
In float32 the CPU's kernels do all of it, products included, and in bfloat16 where the processor has no instructions
for it: there torch's products run at a hundredth of float32's speed. Else the products are torch's.
"""

from __future__ import annotations

import torch

from ... import memory
from .._autocast import without_autocast
from .._backend import _C, CPU_LEVELS, stream_of
from .._register import no_second_derivative, register_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NEEDS_X, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4

# Rows of a chunk: enough that adding to the [V, d] weight gradient once per chunk costs little beside its GEMM, few
# enough that the logits stay bounded (32 Mi of them: 128 MiB in float32).
_MIN_ROWS, _MAX_LOGITS = 1024, 1 << 25
# The loss alone adds up nothing between chunks: small ones, in memory that is there already.
_MAX_LOGITS_OF_LOSS = 1 << 23


def default_chunk_rows(num_rows: int, num_codes: int) -> int:
    """Rows per chunk such that a chunk holds at most 2^25 logits, but at least 1024 rows."""
    return max(1, min(num_rows, max(_MIN_ROWS, _MAX_LOGITS // max(num_codes, 1))))


# On CUDA float16 operands give float32 products on the tensor cores, and dlogits are float16 too: what the mean leaves
# of them would underflow, so the gradients are that much larger until the backward pass has multiplied them by dloss.
_FLOAT16_GRAD_SCALE = 2.0**14


def _on_cuda(x: torch.Tensor) -> bool:
    return x.is_cuda or (_C is not None and _C.simt)


def _operand_dtype(x: torch.Tensor, compute: torch.dtype) -> torch.dtype:
    # float16 products run at a fortieth of float32's speed on CPU
    return torch.float32 if compute == torch.float16 and not _on_cuda(x) else compute


def _grad_scale(x: torch.Tensor, compute: torch.dtype) -> float:
    return _FLOAT16_GRAD_SCALE if _operand_dtype(x, compute) == torch.float16 else 1.0


def _grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient waits in until it is multiplied by dloss."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b in `dtype`, which may be float32 where the operands have 16 bits."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)  # of two dtypes: the CUDA path on the host executor


def _chunk_rows(chunk_rows: int, num_rows: int, num_codes: int, needs: int) -> int:
    """Rows whose logits exist at a time."""
    if not chunk_rows:
        chunk_rows = default_chunk_rows(num_rows, num_codes)
        if not needs:
            chunk_rows = min(chunk_rows, max(_MIN_ROWS, _MAX_LOGITS_OF_LOSS // max(num_codes, 1)))
    return max(1, min(chunk_rows, num_rows))


def _run(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream):
    chunks = _on_cuda(x) or (compute == torch.bfloat16 and _C.cpu_level() >= CPU_LEVELS["bf16"])
    run = _run_chunks if chunks else _run_whole
    return run(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream)


def _run_whole(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream):
    (num_rows, width), num_codes = x.shape, weight.shape[0]
    results = _fake(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream)
    loss, *grads = results
    wanted = [
        (grad if grad.dtype == torch.float32 else grad.float()) if needs & flag else None
        for grad, flag in zip(grads, (NEEDS_X, NEEDS_WEIGHT, NEEDS_BIAS))
    ]
    chunk_rows = _chunk_rows(chunk_rows, num_rows, num_codes, needs)
    count = _C.linear_cross_entropy_workspace(num_rows, num_codes, width, chunk_rows, needs != 0)
    inputs = (_dense(x), _dense(weight), target, None if bias is None else _dense(bias))
    scale = _grad_scale(x, compute) * upstream
    buffer = memory.empty(x, (count,), torch.float32)
    bad = _C.linear_cross_entropy_whole(loss, *wanted, *inputs, buffer, chunk_rows, ignore_index, scale)
    if bad >= 0:
        _raise_out_of_range(target, bad, num_codes, ignore_index)
    for grad, result in zip(grads, wanted):
        if result is not None and result is not grad:
            grad.copy_(result)
    return results


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).contiguous()


@without_autocast  # the products are in `compute` already
def _run_chunks(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream):
    num_rows, num_codes = x.shape[0], weight.shape[0]
    stats = torch.empty(2, dtype=torch.int64, device=x.device)
    _C.linear_cross_entropy_check(stats, target, num_codes, ignore_index, stream_of(x))
    if not _on_cuda(x):  # there the host never waits for the device
        bad = int(stats[1])
        if bad >= 0:
            _raise_out_of_range(target, bad, num_codes, ignore_index)

    dtype = _operand_dtype(x, compute)
    logits_dtype = _grad_dtype(dtype)
    loss, dx, dweight, dbias = _fake(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream)
    for grad in (dweight, dbias):
        if num_rows == 0:
            grad.zero_()
    gemm_x, gemm_weight = x.to(dtype), weight.to(dtype)
    gemm_bias = None if bias is None else bias.to(dtype)
    chunk_rows = _chunk_rows(chunk_rows, num_rows, num_codes, needs)
    logits_buffer = memory.empty(x, (chunk_rows, num_codes), logits_dtype)
    dlogits_buffer = None  # in place
    if needs and dtype != logits_dtype:
        dlogits_buffer = x.new_empty(chunk_rows, num_codes, dtype=dtype)
    row_loss = x.new_empty(num_rows, dtype=torch.float32)
    bias_sum = x.new_zeros(num_codes, dtype=torch.float32) if needs & NEEDS_BIAS else None
    # bfloat16 partial products of several chunks meet in float32
    one_chunk = num_rows <= chunk_rows
    weight_sum = dweight if dweight.dtype == logits_dtype == torch.float32 or one_chunk else None

    for begin in range(0, num_rows, chunk_rows):
        rows = slice(begin, min(begin + chunk_rows, num_rows))
        logits = logits_buffer[: rows.stop - begin]
        if gemm_bias is None:
            _mm(gemm_x[rows], gemm_weight.t(), logits_dtype, out=logits)
        elif dtype == logits_dtype:
            torch.addmm(gemm_bias, gemm_x[rows], gemm_weight.t(), out=logits)
        else:
            _mm(gemm_x[rows], gemm_weight.t(), logits_dtype, out=logits).add_(gemm_bias)
        dlogits = None
        if needs:
            dlogits = logits if dlogits_buffer is None else dlogits_buffer[: rows.stop - begin]
        _C.linear_cross_entropy_loss_and_grad(
            row_loss[rows],
            dlogits,
            bias_sum,
            logits,
            target[rows],
            stats,
            ignore_index,
            _grad_scale(x, compute) * upstream,
            stream_of(x),
        )
        if needs & NEEDS_X:
            _mm(dlogits, gemm_weight, dx.dtype, out=dx[rows])
        if needs & NEEDS_WEIGHT:
            if weight_sum is dweight and dweight.dtype == logits_dtype:
                if begin == 0:
                    _mm(dlogits.t(), gemm_x[rows], dweight.dtype, out=dweight)
                elif dtype == logits_dtype:
                    torch.addmm(dweight, dlogits.t(), gemm_x[rows], out=dweight)
                else:
                    dweight.add_(_mm(dlogits.t(), gemm_x[rows], dweight.dtype))
            else:
                part = _mm(dlogits.t(), gemm_x[rows], logits_dtype)
                weight_sum = part.float() if begin == 0 else weight_sum.add_(part)
    if num_rows and needs & NEEDS_WEIGHT and weight_sum is not dweight:
        dweight.copy_(weight_sum)
    if bias_sum is not None:
        dbias.copy_(bias_sum)
    _C.linear_cross_entropy_mean(loss, row_loss, stats, stream_of(x))  # without a target NaN: 0 / 0, as in torch
    return loss, dx, dweight, dbias


def check_range(target: torch.Tensor, num_codes: int, ignore_index: int) -> None:
    """Raises IndexError for a target that is neither a code nor `ignore_index`."""
    bad = ((target < 0) | (target >= num_codes)) & (target != ignore_index)
    if bad.any():
        _raise_out_of_range(target, int(bad.nonzero()[0]), num_codes, ignore_index)


def _raise_out_of_range(target: torch.Tensor, row: int, num_codes: int, ignore_index: int) -> None:
    raise IndexError(
        f"target: expected values in [0, {num_codes}) or ignore_index={ignore_index}, "
        f"got {int(target[row])} in row {row}"
    )


def _fake(x, weight, target, bias, ignore_index, compute, needs, chunk_rows, upstream):
    dx = memory.empty(x, x.shape if needs & NEEDS_X else (0,), _grad_dtype(compute))
    dweight = memory.empty(weight, weight.shape if needs & NEEDS_WEIGHT else (0,), _grad_dtype(weight.dtype))
    bias_dtype = torch.float32 if bias is None else _grad_dtype(bias.dtype)
    dbias = x.new_empty((weight.shape[0],) if needs & NEEDS_BIAS else (0,), dtype=bias_dtype)
    return x.new_empty((), dtype=torch.float32), dx, dweight, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, bias, _, compute, ctx.needs, _, ctx.upstream = inputs
    ctx.scaled = _grad_scale(x, compute) != 1.0
    ctx.factor = 1.0 / (_grad_scale(x, compute) * ctx.upstream)
    ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    _, dx, dweight, dbias = output
    ctx.mark_non_differentiable(dx, dweight, dbias)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dweight, dbias)


def _backward(ctx, dloss, *_):
    grads = [None, None, None]
    if dloss is not None:
        # what was expected, on CPU: the gradients are ready. A second derivative has to meet the op that refuses it.
        unit = type(dloss) is torch.Tensor and dloss.device.type == "cpu" and not torch.is_grad_enabled()
        unit = unit and not ctx.scaled and not torch.compiler.is_compiling() and float(dloss) == ctx.upstream
        for i, (grad, dtype, flag) in enumerate(
            zip(ctx.saved_tensors, ctx.dtypes, (NEEDS_X, NEEDS_WEIGHT, NEEDS_BIAS))
        ):
            if ctx.needs & flag:
                grads[i] = (
                    grad
                    if unit and grad.dtype == dtype
                    else linear_cross_entropy_backward(grad, dloss, ctx.factor, dtype)
                )
    dx, dweight, dbias = grads
    return dx, dweight, None, dbias, None, None, None, None, None


def _scale(grad: torch.Tensor, dloss: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    if factor != 1.0:
        dloss = dloss * factor
    return torch.mul(grad, dloss, out=torch.empty_like(grad, dtype=dtype))


def _scale_fake(grad, dloss, factor, dtype):
    return torch.empty_like(grad, dtype=dtype)


linear_cross_entropy_backward = register_op(
    "linear_cross_entropy_backward",
    "(Tensor grad, Tensor dloss, float factor, ScalarType dtype) -> Tensor",
    _scale,
    _scale_fake,
    **no_second_derivative("linear_cross_entropy"),
)
linear_cross_entropy = register_op(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index, ScalarType compute, int needs, "
    "SymInt chunk_rows, float upstream) -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
