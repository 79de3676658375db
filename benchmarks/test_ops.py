# SPDX-License-Identifier: MIT
"""Every room's `benchmarks` beside its `peers`, forward and forward + backward: `make bench`."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch.utils._pytree import tree_flatten

import dalle_fast.ops
from dalle_fast.ops import _backend

ROOMS = [
    importlib.import_module(f"dalle_fast.ops.{module.name}.cases").ROOM
    for module in pkgutil.iter_modules(dalle_fast.ops.__path__)
    if module.ispkg
]
CASES = [
    pytest.param(room, case, dtype, who, mode, id=f"{room.name}-{case.name}-{str(dtype)[6:]}-{mode}-{who}")
    for room in ROOMS
    for case in room.benchmarks
    for dtype in case.dtypes
    if dtype != torch.float16  # torch has no fast float16 on CPU to compare with
    for mode in (("forward", "forward+backward") if room.differentiable else ("forward",))
    for who in ("dalle_fast", *room.peers)
]


@pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")
@pytest.mark.parametrize(("room", "case", "dtype", "who", "mode"), CASES)
def test_op(benchmark, room, case, dtype, who, mode):
    args, kwargs = case.build(torch.Generator().manual_seed(0), dtype)
    function = room.function if who == "dalle_fast" else room.peers[who]
    benchmark.group = f"{room.name} {case.name} {str(dtype)[6:]} {mode}"
    benchmark.extra_info.update(who=who, threads=torch.get_num_threads(), torch=torch.__version__)

    def forward():
        with torch.no_grad():
            return function(*args, **kwargs)

    def both():
        outputs, _ = tree_flatten(function(*args, **kwargs))
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

    run = forward if mode == "forward" else both
    run()
    rounds = 5 if case.name.startswith(("4x8192", "4096x4096")) else 20
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
