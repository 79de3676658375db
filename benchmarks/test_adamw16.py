# SPDX-License-Identifier: MIT
"""AdamW16 beside torch's fused AdamW on the same parameters."""

from __future__ import annotations

import pytest
import torch

from dalle_fast.optim import AdamW16

SHAPES = {
    "16M": [(1 << 24,)],
    "100 x 64k": [(256, 256)] * 100,
    "300 x 64": [(64,)] * 300,
    "conv": [(256, 256, 3, 3)] * 4,
}


@pytest.mark.parametrize("who", ["dalle_fast", "torch.optim.AdamW(fused=True)"])
@pytest.mark.parametrize("name", SHAPES)
def test_adamw16(benchmark, name, who):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES[name]]
    if name == "conv":
        params = [torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in params]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2
    optimizer = AdamW16(params, 1e-3) if who == "dalle_fast" else torch.optim.AdamW(params, 1e-3, fused=True)
    benchmark.group = f"adamw16 {name}"
    benchmark.extra_info["who"] = who
    benchmark.pedantic(optimizer.step, rounds=10, warmup_rounds=2)
