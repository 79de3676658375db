# SPDX-License-Identifier: MIT
"""AdamW16 beside torch's fused AdamW on the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..optim import AdamW16
from .rows import Row, relative

SHAPES = {
    "16M": [(1 << 24,)],
    "100 x 64k": [(256, 256)] * 100,
    "300 x 64": [(64,)] * 300,
    "conv channels_last": [(256, 256, 3, 3)] * 4,
}
_HYPERS = {"lr": 1e-3, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2}
_EMA = 0.99


def _parameters(shapes: Sequence[tuple[int, ...]], device: str, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(seed)
    params = []
    for shape in shapes:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        draw = [torch.randn(shape, generator=generator, device=device).to(memory_format=layout) for _ in range(2)]
        params.append(torch.nn.Parameter(draw[0]))
        params[-1].grad = draw[1] * 1e-2
    return params


def adamw_row(name: str, shapes: Sequence[tuple[int, ...]], *, ema: bool = False, device: str = "cpu") -> Row:
    """One update of all parameters; with `ema` averages are kept, the peer's by one more foreach op."""
    params = _parameters(shapes, device)
    optimizer = AdamW16(params, **_HYPERS, ema_decay=_EMA if ema else None)

    def error() -> float:
        ours, exact = (_parameters(shapes[:1], device) for _ in range(2))
        exact = [torch.nn.Parameter(p.detach().double()) for p in exact]
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.double()
        before = exact[0].detach().clone()
        AdamW16(ours, **_HYPERS).step()
        torch.optim.AdamW(exact, **_HYPERS).step()
        return relative(ours[0].double() - before, exact[0] - before)

    def fused() -> Callable[[], object]:
        theirs = _parameters(shapes, device)
        peer = torch.optim.AdamW(theirs, **_HYPERS, fused=True)
        averages = [p.detach().clone() for p in theirs]

        def run() -> None:
            peer.step()
            if ema:
                torch._foreach_lerp_(averages, [p.detach() for p in theirs], 1 - _EMA)

        return run

    elements = sum(p.numel() for p in params)
    return Row(
        f"AdamW16 {name}{' with averages' if ema else ''}",
        optimizer.step,
        error,
        1e-3,  # an update is a thousandth of the float32 parameter that holds it
        elements * (28 if ema else 20),
        peers={f"torch AdamW(fused=True){' + _foreach_lerp_' if ema else ''}": fused},
    )


def optimizer_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of the rows."""
    for name, shapes in SHAPES.items():
        yield f"AdamW16 {name}", lambda n=name, s=shapes: adamw_row(n, s)
    yield "AdamW16 16M with averages", lambda: adamw_row("16M", SHAPES["16M"], ema=True)
