# SPDX-License-Identifier: MIT
"""The relaxation and the KL to a uniform prior from given logits, forward and backward, as a dVAE's loss needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..nn import categorical_kl
from ..ops import gumbel_softmax
from .rows import Row, relative, size_of

_TAU, _SEED = 0.5, 1


def relaxation_row(dtype: torch.dtype, shape: tuple[int, ...] = (1024, 8192)) -> Row:
    """`shape` of the logits, codes in dimension 1; both results get a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(shape, generator=generator).to(dtype)

    def gradient(relax: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        y, kl = relax(logits)
        return torch.autograd.grad((y, kl), logits, (upstream.to(y.dtype), torch.ones_like(kl)))[0]

    def ours(x: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
        return gumbel_softmax(x, _TAU, seed=_SEED, return_kl=True, backend=backend)

    def error() -> float:
        exact = logits.detach().double().requires_grad_()
        y, _ = ours(exact, "reference")
        log_q = F.log_softmax(exact, 1)
        expected = torch.autograd.grad((y * upstream).sum() + (log_q.exp() * log_q).sum(), exact)[0]
        return relative(gradient(ours), expected)

    size = "x".join(map(str, shape))
    return Row(
        f"gumbel_softmax and KL {size} {str(dtype)[6:]} forward+backward",
        lambda: gradient(ours),
        error,
        1e-5 if dtype == torch.float32 else 2e-2,
        5 * size_of(logits),
        0,
        {
            "F.gumbel_softmax and KL": lambda: (
                lambda: gradient(lambda x: (F.gumbel_softmax(x, _TAU, dim=1), categorical_kl(x)))
            )
        },
        flop_dtype=dtype,
    )


def relaxation_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        name = f"gumbel_softmax and KL 1024x8192 {str(dtype)[6:]} forward+backward"
        yield name, lambda dtype=dtype: relaxation_row(dtype)
