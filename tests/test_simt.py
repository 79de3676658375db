# SPDX-License-Identifier: MIT
"""CUDA kernels, thread by thread on the host executor (csrc/simt/): the rooms' own cases under many schedules, and
planted bugs that it must find.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from rooms import all_rooms, assert_close, build, call, fresh, gradients, tensors_of, to_float64

from dalle_fast.ops import _backend

try:
    from dalle_fast import _C_simt
except ImportError as error:
    _C_simt = None
    REASON = f"no host executor: {error}"
else:
    REASON = ""

pytestmark = pytest.mark.skipif(_C_simt is None, reason=REASON)

SEEDS = range(20)
ROOMS = [room for room in all_rooms() if room.name in _backend.CUDA_ROOMS]
CASES = [
    pytest.param(room, case, dtype, id=f"{room.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for room in ROOMS
    for case in room.cases
    for dtype in case.dtypes
]


@pytest.fixture
def executor(monkeypatch):
    """Puts the executor's extension in the place of the CPU one, for a room."""

    def use(room):
        monkeypatch.setattr(importlib.import_module(f"dalle_fast.ops.{room.name}.op"), "_C", _C_simt)
        return _C_simt

    yield use
    if _C_simt is not None:
        _C_simt.simt_seed(1)


@pytest.mark.parametrize(("room", "case", "dtype"), CASES)
def test_cuda_kernels_match_the_float64_reference(room, case, dtype, executor):
    arguments = build(room, case, dtype)
    expected = call(room.reference, to_float64(arguments))
    takes_gradient = room.differentiable and any(t.requires_grad for t in tensors_of(arguments))
    if takes_gradient:
        expected_grads = gradients(room.reference, to_float64(arguments))
    simt = executor(room)
    first = None
    small = sum(t.numel() for t in tensors_of(arguments)) < 20_000
    for seed in SEEDS if small else SEEDS[:2]:
        simt.simt_seed(seed)
        actual = call(room.function, fresh(arguments), backend="cpu")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, room.tolerance[dtype])
        if takes_gradient:
            grads = gradients(room.function, fresh(arguments), backend="cpu")
            for a, e in zip(grads, expected_grads, strict=True):
                assert_close(a, e, room.grad_tolerance.get(dtype, room.tolerance[dtype]))
            actual += grads
        first = first or actual
        for a, b in zip(actual, first, strict=True):  # the same bits under every schedule
            assert torch.equal(
                a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
            )


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


CONTROLS = {
    "barrier_removed": None,  # a wrong sum under some schedule
    "tile_short": None,
    "barrier_divergent": "divergent barrier",
    "lane_missing": "a warp waits for a lane that does not come",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_planted_bug_is_found(name):
    values = [float(i) for i in range(64)]
    for seed in SEEDS:
        _C_simt.simt_seed(seed)
        assert _C_simt.simt_control(name, False, values) == sum(values)
    found = []
    for seed in SEEDS:
        _C_simt.simt_seed(seed)
        try:
            found.append(_C_simt.simt_control(name, True, values) != sum(values))
        except RuntimeError as error:
            for part in (CONTROLS[name] or "no error was expected", "thread (", "controls.cu:"):
                assert part in str(error)
            found.append(True)
    assert sum(found) >= len(SEEDS) / 2, f"found under {sum(found)} of {len(SEEDS)} schedules"


def test_a_bad_launch_is_an_error():
    with pytest.raises(ValueError, match="no such control"):
        _C_simt.simt_control("nothing", False, [0.0] * 64)
