# SPDX-License-Identifier: MIT
"""Each op at the paper's sizes on a GPU, its peers called their best way, a check against float64, and its floor.

With `small` the same rows run anywhere in seconds, to test the table itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module  # of optional peers: the error of a missing one becomes its row's reason

import torch
import torch.nn.functional as F

from dalle_fast.bench.optimizers import adamw_row
from dalle_fast.bench.rows import Call, Row, relative, size_of
from dalle_fast.bench.vocabularies import vocabulary_row
from dalle_fast.nn import categorical_kl
from dalle_fast.ops import (
    dropout,
    gumbel_softmax,
    linear_cross_entropy,
    minifloat_decode,
    minifloat_encode,
    orthonormalize,
    powersgd_project,
    powersgd_reconstruct,
    vq_bottleneck,
)

from .attention import decode_rows, sparse_rows

# ---- dropout


def _dropout_rows(device: str, small: bool) -> Iterator[Row]:
    shape = (2, 8, 36) if small else (8, 1280, 3968)

    def ours(x):
        return dropout(x, 0.1, seed=1, offset=2)

    def theirs(x):
        return F.dropout(x, 0.1)

    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(shape, device=device, dtype=dtype)

        def both(function, x=x, dy=dy) -> Call:
            return lambda: torch.autograd.grad(function(x), x, dy)

        def error(x=x):
            part = x.detach()[:1]
            return relative(ours(part), ours(part.double()))  # float64 runs on the reference

        peers = {
            "F.dropout": lambda both=both: both(theirs),
            "F.dropout compiled": lambda both=both: both(torch.compile(theirs, dynamic=False)),
        }
        yield Row(f"dropout {str(dtype)[6:]} forward+backward", both(ours), error, bound, 4 * size_of(x), 0, peers)


# ---- the discrete bottleneck


def _gumbel_rows(device: str, small: bool) -> Iterator[Row]:
    shape = (2, 64, 4, 4) if small else (8, 8192, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(shape, device=device, dtype=dtype)

        def error(logits=logits):
            part = logits.detach()[:1]
            expected = gumbel_softmax(part.double(), 0.5, seed=1, backend="reference")
            return relative(gumbel_softmax(part, 0.5, seed=1), expected)

        def soft(function, logits=logits) -> Call:
            def run():
                with torch.no_grad():
                    return function(logits)

            return run

        def both(function, logits=logits, dy=dy) -> Call:
            return lambda: torch.autograd.grad(function(logits), logits, dy)

        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for mode, call, moved in (("forward", soft, 2), ("forward+backward", both, 5)):
            yield Row(
                f"gumbel_softmax {str(dtype)[6:]} {mode}",
                call(lambda x: gumbel_softmax(x, 0.5, seed=1)),
                error,
                bound,
                moved * size_of(logits),
                0,
                {
                    "F.gumbel_softmax": lambda call=call: call(lambda x: F.gumbel_softmax(x, 0.5, dim=1)),
                    "F.gumbel_softmax compiled": lambda call=call: call(
                        torch.compile(lambda x: F.gumbel_softmax(x, 0.5, dim=1), dynamic=False)
                    ),
                },
            )

        def with_kl(function, logits=logits, dy=dy) -> Call:
            def run():
                y, kl = function(logits)
                return torch.autograd.grad((y, kl), logits, (dy.to(y.dtype), torch.ones_like(kl)))[0]

            return run

        def composed(x):
            return F.gumbel_softmax(x, 0.5, dim=1), categorical_kl(x)

        def gradient_error(logits=logits, dy=dy, with_kl=with_kl):
            part, upstream = logits.detach()[:1].requires_grad_(), dy[:1]
            exact = part.detach().double().requires_grad_()
            ours = with_kl(lambda x: gumbel_softmax(x, 0.5, seed=1, return_kl=True), part, upstream)()
            reference = lambda x: gumbel_softmax(x, 0.5, seed=1, return_kl=True, backend="reference")  # noqa: E731
            return relative(ours, with_kl(reference, exact, upstream)())

        yield Row(
            f"gumbel_softmax and KL {str(dtype)[6:]} forward+backward",
            with_kl(lambda x: gumbel_softmax(x, 0.5, seed=1, return_kl=True)),
            gradient_error,
            1e-5 if dtype == torch.float32 else 2e-2,
            6 * size_of(logits),
            0,
            {
                "F.gumbel_softmax and KL": lambda with_kl=with_kl: with_kl(composed),
                "F.gumbel_softmax and KL compiled": lambda with_kl=with_kl: with_kl(
                    torch.compile(composed, dynamic=False)
                ),
            },
        )
        yield Row(
            f"gumbel_softmax {str(dtype)[6:]} hard",
            soft(lambda x: gumbel_softmax(x, 0.5, seed=1, hard=True)),
            error,
            bound,
            size_of(logits),
            0,
            {"F.gumbel_softmax hard": lambda soft=soft: soft(lambda x: F.gumbel_softmax(x, 0.5, hard=True, dim=1))},
        )


def _bottleneck_rows(device: str, small: bool) -> Iterator[Row]:
    batch, width, side, codes, dim = (2, 16, 4, 64, 8) if small else (8, 2048, 32, 8192, 128)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, side, side, width, device=device).to(dtype).permute(0, 3, 1, 2).requires_grad_()
        weight = (torch.randn(codes, width, device=device) * width**-0.5).to(dtype).requires_grad_()
        bias = torch.zeros(codes, device=device, dtype=dtype, requires_grad=True)
        book = (torch.randn(dim, codes, device=device) * 0.1).to(dtype).requires_grad_()
        inputs = (x, weight, bias, book)

        def both(function, inputs=inputs) -> Call:
            def run():
                out, kl = function(*inputs)
                return torch.autograd.grad((out, kl), inputs, (torch.ones_like(out), torch.ones_like(kl)))

            return run

        def composed(x, weight, bias, book):
            logits = F.conv2d(x, weight[:, :, None, None], bias)
            log_q = F.log_softmax(logits.float(), 1)
            return F.conv2d(F.gumbel_softmax(logits, 0.5, dim=1), book[:, :, None, None]), (log_q.exp() * log_q).sum(1)

        def error(inputs=inputs):
            part = [inputs[0][:1, :, :2].detach(), *(t.detach() for t in inputs[1:])]
            exact, _ = vq_bottleneck(*(t.double() for t in part), 0.5, seed=1, backend="reference")
            return relative(vq_bottleneck(*part, 0.5, seed=1)[0], exact)

        cells = batch * side * side
        yield Row(
            f"vq_bottleneck {cells}x{width}x{codes}x{dim} {str(dtype)[6:]} forward+backward",
            both(lambda *inputs: vq_bottleneck(*inputs, 0.5, seed=1)),
            error,
            1e-4 if dtype == torch.float32 else 2e-2,
            3 * size_of(*inputs) + 3 * cells * dim * x.element_size(),
            2 * cells * codes * (4 * width + 3 * dim),
            {
                "composed ops": lambda both=both, composed=composed: both(composed),
                "the same, compiled": lambda both=both, composed=composed: both(torch.compile(composed, dynamic=False)),
            },
            flop_dtype=dtype,
        )


# ---- linear_cross_entropy


def _loss_row(device: str, name: str, rows: int, width: int, codes: int) -> Row:
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(codes, width, device=device) * width**-0.5).bfloat16().requires_grad_()
    target = torch.randint(codes, (rows,), device=device)

    def both(function) -> Call:
        return lambda: torch.autograd.grad(function(x, weight, target), (x, weight))

    def composed(x, weight, target):
        return F.cross_entropy(F.linear(x, weight).float(), target)

    def error():
        exact = F.cross_entropy(F.linear(x.detach().double(), weight.detach().double()), target)
        return relative(linear_cross_entropy(x, weight, target), exact)

    def liger():
        loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        return both(lambda x, weight, target: loss(weight, x, target))

    peers = {
        "F.cross_entropy(F.linear)": lambda: both(composed),
        "the same, compiled": lambda: both(torch.compile(composed, dynamic=False)),
        "Liger": liger,
        "Cut Cross-Entropy": lambda: both(import_module("cut_cross_entropy").linear_cross_entropy),
    }
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = lambda: both(F.linear_cross_entropy)
    return Row(
        f"linear_cross_entropy {name} {rows}x{width}x{codes} forward+backward",
        both(linear_cross_entropy),
        error,
        2e-3,
        2 * size_of(x, weight),
        6 * rows * width * codes,
        peers,
    )


def _loss_rows(device: str, small: bool) -> Iterator[Row]:
    part = 64 if small else 1
    yield _loss_row(device, "text", 2048 // part, 3968 // part, 16384 // part)
    yield _loss_row(device, "image", 8192 // part, 3968 // part, 8192 // part)
    sizes = {"text": (2048 // part, 16384 // part), "image": (8192 // part, 8192 // part), "width": 3968 // part}
    yield vocabulary_row(torch.bfloat16, **sizes, device=device)


# ---- PowerSGD and the optimizer


def _householder_rows(device: str, small: bool) -> Iterator[Row]:
    shapes = ((4, 24, 6), (2, 48, 6)) if small else ((256, 496, 112), (128, 1984, 112))
    p = [torch.randn(*shape, device=device) for shape in shapes]

    def error():
        worst = 0.0
        for q in orthonormalize(p):
            eye = torch.eye(q.shape[-1], device=device, dtype=torch.float64)
            gram = q[:8].double().mT @ q[:8].double()
            worst = max(worst, float((gram - eye).flatten(1).norm(dim=1).max()))
        return worst

    def cholesky_twice():
        def one(x):
            r, _ = torch.linalg.cholesky_ex(x.mT @ x, upper=True)
            return torch.linalg.solve_triangular(r, x, upper=True, left=False)

        return lambda: [one(one(x)) for x in p]

    columns = shapes[0][-1]
    flops = sum(4 * n * m * r * r for n, m, r in shapes)
    yield Row(
        f"orthonormalize {' + '.join('x'.join(map(str, shape)) for shape in shapes)}",
        lambda: orthonormalize(p),
        error,
        1e-5 * columns**0.5,
        2 * size_of(*p),
        flops,
        {
            "torch.linalg.qr": lambda: lambda: [torch.linalg.qr(x).Q for x in p],
            "geqrf + householder_product": lambda: (
                lambda: [torch.linalg.householder_product(*torch.geqrf(x)) for x in p]
            ),
            "CholeskyQR2 in torch ops": cholesky_twice,
        },
    )


def _powersgd_rows(device: str, small: bool) -> Iterator[Row]:
    scale = 32 if small else 1
    shapes = [(3968 // scale, 496 // scale)] * 4 + [(3968 // scale, 1984 // scale)] * 2
    rank = 7 if small else 112
    errors = [minifloat_encode(torch.randn(n, m, device=device) * 1e-3, "1-6-9") for m, n in shapes]  # rows <= columns
    grads = [torch.randn(n, m, device=device) * 1e-3 for m, n in shapes]
    factors = [minifloat_encode(torch.randn(m, rank, device=device), "1-6-9") for m, _ in shapes]
    wide = [minifloat_decode(e, "1-6-9") for e in errors]

    def ours():
        for e, g, x in zip(errors, grads, factors, strict=True):
            p, _ = powersgd_project(e, x, g, scale=2**-6)
            q, _ = powersgd_project(e.mT, p, scale=2**-6)
            powersgd_reconstruct(p, q, e, grad_factor=2**-6, error_factor=2**-12)

    def composed():
        for e, g, x in zip(wide, grads, factors, strict=True):
            e.add_(g)
            p = (e @ minifloat_decode(x, "1-6-9")).mul_(2**-6)
            q = (e.mT @ p).mul_(2**-6)
            e.sub_(p @ q.mT, alpha=2**-12)

    def error():
        e, x = errors[0].clone(), factors[0]
        p, _ = powersgd_project(e, x, scale=2**-6)
        exact = minifloat_decode(errors[0], "1-6-9").double() @ minifloat_decode(x, "1-6-9").double() * 2**-6
        return relative(minifloat_decode(p, "1-6-9"), exact)

    elements = sum(m * n for m, n in shapes)
    yield Row(
        f"powersgd one layer, rank {rank}", ours, error, 2e-3, elements * (4 + 2 + 2 + 2 + 4 + 2 + 2),
        6 * elements * rank, {"composed ops, float32 buffers": lambda: composed},
    )  # fmt: skip


def _adamw_rows(device: str, small: bool) -> Iterator[Row]:
    count, size = (4, 1 << 8) if small else (64, 1 << 22)
    for ema in (False, True):
        yield adamw_row(f"{count} x {size}", [(size,)] * count, ema=ema, device=device)


def _minifloat_rows(device: str, small: bool) -> Iterator[Row]:
    x = torch.randn(1 << (12 if small else 28), device=device)
    code = minifloat_encode(x, "1-6-9")

    def error():
        return relative(minifloat_decode(code, "1-6-9"), x)

    yield Row(
        "minifloat_encode 1-6-9", lambda: minifloat_encode(x, "1-6-9"), error, 1e-3, 6 * x.numel(), 0,
        {"to(bfloat16), which does less": lambda: lambda: x.to(torch.bfloat16)},
    )  # fmt: skip
    yield Row("minifloat_decode 1-6-9", lambda: minifloat_decode(code, "1-6-9"), error, 1e-3, 6 * x.numel())


def all_rows(device: str, small: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every row; each is made when its turn comes, so that memory is that of one."""
    for make in (
        sparse_rows,
        decode_rows,
        _dropout_rows,
        _gumbel_rows,
        _bottleneck_rows,
        _loss_rows,
        _householder_rows,
        _powersgd_rows,
        _adamw_rows,
        _minifloat_rows,
    ):
        for row in make(device, small):
            yield row.name, lambda row=row: row
