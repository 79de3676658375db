# SPDX-License-Identifier: MIT
"""CUDA kernels, thread by thread on the host executor (csrc/simt/): the rooms' own cases under many schedules, and
planted bugs that it must find.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from rooms import (
    all_rooms,
    assert_close,
    build,
    call,
    fresh,
    gradients,
    map_tensors,
    strided_variants,
    tensors_of,
    to_float64,
)
from simulated import REASON, _C_simt, simulate_memory

from dalle_fast.ops import _backend

pytestmark = pytest.mark.skipif(_C_simt is None, reason=REASON)

SANITIZED = getattr(_C_simt, "sanitized", False)
SEEDS = range(3 if SANITIZED else 20)
ROOMS = [room for room in all_rooms() if room.name in _backend.CUDA_ROOMS]
LIMITS = (99, 227)  # KiB of shared memory a block: the least and the most of all devices
# Their plans follow the limit; of this one the cases meet both sides.
SMALL_LIMIT = {"gumbel_softmax": 16, "householder": 16}


def limits(room):
    """KiB of shared memory a block to run a room with, the one that shows most first."""
    return (SMALL_LIMIT[room.name], *LIMITS) if room.name in SMALL_LIMIT else LIMITS


CASES = [
    pytest.param(room, case, dtype, kib, id=f"{room.name}-{case.name}-{str(dtype).removeprefix('torch.')}-{kib}KiB")
    for room in ROOMS
    for case in room.cases
    for dtype in case.dtypes
    for kib in limits(room)
]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def executor(monkeypatch):
    """Puts the executor's extension in the place of the CPU one, for a room. Memory that nobody has written is NaN in
    the block's shared memory and, by torch's deterministic mode, in outputs and workspaces.
    """

    def use(room, kib=None):
        simulate_memory(kib or limits(room)[0])
        monkeypatch.setattr(importlib.import_module(f"dalle_fast.ops.{room.name}.op"), "_C", _C_simt)
        return _C_simt

    # oneDNN's bfloat16 product on AMX multiplies what lies behind the end of a padded row, NaN, by zero.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield use
    finally:
        torch.use_deterministic_algorithms(False)
        if _C_simt is not None:
            _C_simt.simt_seed(1)
            simulate_memory(227)


@pytest.mark.parametrize(("room", "case", "dtype", "kib"), CASES)
def test_cuda_kernels_match_the_float64_reference(room, case, dtype, kib, executor):
    arguments = build(room, case, dtype)
    expected = call(room.reference, to_float64(arguments))
    takes_gradient = room.differentiable and any(t.requires_grad for t in tensors_of(arguments))
    if takes_gradient:
        expected_grads = gradients(room.reference, to_float64(arguments))
    simt = executor(room, kib)
    first = None
    small = sum(t.numel() for t in tensors_of(arguments)) < 20_000 and kib == limits(room)[0]
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
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("variant", ["padded", "misaligned", "transposed"])
@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_any_strides_give_the_same(room, variant, executor):
    """Vector loads and asynchronous copies have a twin for rows that are not aligned."""
    executor(room)
    change = strided_variants()[variant]
    for dtype in (torch.float32, torch.bfloat16):
        for arguments in small_cases(room, (dtype,))[:: 3 if SANITIZED else 1]:
            expected = call(room.function, fresh(arguments), backend="cpu")
            actual = call(room.function, map_tensors(change, arguments), backend="cpu")
            for a, e in zip(actual, expected, strict=True):
                assert_close(a, e, room.tolerance[dtype])
            if room.differentiable and any(t.requires_grad for t in tensors_of(arguments)):
                expected = gradients(room.function, fresh(arguments), backend="cpu")
                actual = gradients(room.function, map_tensors(change, arguments), backend="cpu")
                for a, e in zip(actual, expected, strict=True):
                    assert_close(a, e, room.grad_tolerance.get(dtype, room.tolerance[dtype]))


# (room, file): why the removal of one barrier there cannot show
SPARE_BARRIERS: dict[tuple[str, str], str] = {}


COPIES = {"decode_attention", "powersgd", "sparse_attention"}  # rooms with asynchronous copies


def results(room, arguments):
    actual = call(room.function, fresh(arguments), backend="cpu")
    if room.differentiable and any(t.requires_grad for t in tensors_of(arguments)):
        actual += gradients(room.function, fresh(arguments), backend="cpu")
    return [bits(t) for t in actual]


def small_cases(room, dtypes=(torch.float32, torch.bfloat16)):
    """Arguments of the room's cases, the smallest first; bfloat16 because tensor cores may take it."""
    arguments = [build(room, case, dtype) for case in room.cases for dtype in dtypes if dtype in case.dtypes]
    size = lambda a: sum(t.numel() for t in tensors_of(a))  # noqa: E731
    return [a for a in sorted(arguments, key=size) if 0 < size(a) < 40_000]


def is_found(simt, room, cases):
    """Whether some case shows the bug that is planted, under some schedule."""
    for seed in range(8):
        simt.simt_seed(seed)
        for arguments, expected in cases:
            try:
                actual = results(room, arguments)
            except Exception:
                return True
            if not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)):
                return True
    return False


@pytest.mark.skipif(SANITIZED, reason="a kernel without its barrier may leave its memory")
@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_barrier_the_last_block_and_the_waits_are_needed(room, executor):
    """Controls in every kernel: without one of its barriers, its last block, or the waits for its asynchronous copies,
    results are seen to change.
    """
    simt = executor(room)
    simt.simt_forget_barriers()
    cases = [(arguments, results(room, arguments)) for arguments in small_cases(room)]
    missed = []
    try:
        for place in simt.simt_barriers():
            simt.simt_remove_barrier(place)
            spare = (room.name, place.split("/")[-1].split(":")[0]) in SPARE_BARRIERS
            if not is_found(simt, room, cases) and not spare:
                missed.append(place)
        simt.simt_remove_barrier("")
        simt.simt_drop_last_block(True)
        assert is_found(simt, room, cases), "nobody misses the last block"
        simt.simt_drop_last_block(False)
        simt.simt_forget_waits(True)
        assert is_found(simt, room, cases) == (room.name in COPIES), "waits for asynchronous copies"
    finally:
        simt.simt_remove_barrier("")
        simt.simt_drop_last_block(False)
        simt.simt_forget_waits(False)
    assert not missed, f"removed, and nothing changed: {missed}"


@pytest.mark.skipif(not SANITIZED, reason="needs the sanitizers (make sanitize)")
@pytest.mark.parametrize(
    ("name", "message"), [("tile_overrun", "heap-buffer-overflow"), ("misaligned_vector", "misaligned")]
)
def test_the_sanitizers_find_a_planted_bug(name, message):
    assert _C_simt.simt_control(name, False, [1.0] * 64) == 64.0
    code = f"import _C_simt; _C_simt.simt_control({name!r}, True, [1.0] * 64)"
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(_C_simt.__file__))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert message in done.stderr


# one block; clusters of two, four, and eight with pivots in four of them; the second-level cache
HOUSEHOLDER_SHAPES = [(2, 40, 20), (1, 96, 33), (1, 130, 20), (1, 100, 50), (1, 98, 97)]


@pytest.mark.parametrize("codes", [False, True], ids=["float32", "1-6-9"])
def test_householder_on_every_path(codes, executor):
    """Lists, codes, strides, scales, lost rank and NaN, wherever the matrix is held."""
    from dalle_fast.ops import minifloat_decode, minifloat_encode, orthonormalize

    executor(next(room for room in ROOMS if room.name == "householder"))
    generator = torch.Generator().manual_seed(3)
    ps = [torch.randn(shape, generator=generator) for shape in HOUSEHOLDER_SHAPES]
    ps[0][1, :, 5] = ps[0][1, :, 2]  # rank lost
    if codes:
        ps = [minifloat_encode(p, "1-6-9") for p in ps]
    value = (lambda x: minifloat_decode(x, "1-6-9")) if codes else lambda x: x
    qs = orthonormalize(ps)
    for p, q in zip(ps, qs, strict=True):
        basis = value(q).double()
        assert (basis.mT @ basis - torch.eye(p.shape[-1])).norm() < (2e-2 if codes else 1e-5)
        assert (value(p) - basis @ (basis.mT @ value(p).double())).norm() < (2e-3 if codes else 1e-5) * value(p).norm()
        assert torch.equal(bits(orthonormalize(p)), bits(q))  # alone as among others
        assert torch.equal(bits(orthonormalize(p.mT.contiguous().mT)), bits(q))
        if not codes:
            for scale in (2.0**-90, 2.0**90):
                assert torch.equal(orthonormalize(p * scale, eps=1e-6 * scale), q)
        zeros = value(orthonormalize(torch.zeros_like(p)))
        assert torch.equal(zeros, torch.eye(*p.shape[-2:]).expand(p.shape))
        broken = value(p).clone()
        broken[0, -1, -1] = torch.inf
        broken = orthonormalize(minifloat_encode(broken, "1-6-9") if codes else broken)
        assert value(broken[0]).isnan().all()
        assert torch.equal(bits(broken[1:]), bits(q[1:]))


CONTROLS = {
    "barrier_removed": None,  # a wrong sum under some schedule
    "tile_short": None,
    "edge_mask": None,
    "copy_not_waited": None,
    "copy_misaligned": "the source of an asynchronous copy is not aligned to 16 bytes",
    "barrier_divergent": "divergent barrier",
    "lane_missing": "a warp waits for a lane that does not come",
    "cluster_barrier_removed": None,
    "cluster_block_leaves": None,
    "cluster_block_has_left": "the shared memory of a block that has returned",
    "cluster_barrier_divergent": "divergent cluster barrier",
    "cluster_block_returns": "divergent cluster barrier",
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


def test_a_device_refuses_what_it_has_no_memory_for():
    """As the device does: static and dynamic shared memory count, and more than 48 KiB have to be allowed."""
    values = [float(i) for i in range(64)]
    try:
        simulate_memory(99)
        for name in ("shared_fits", "shared_exceeds", "shared_not_allowed", "static_exceeds"):
            assert _C_simt.simt_control(name, False, values) == sum(values)
        with pytest.raises(RuntimeError, match="101380 bytes of shared memory, where the device has 101376"):
            _C_simt.simt_control("shared_exceeds", True, values)
        with pytest.raises(RuntimeError, match="101380 bytes of shared memory, where the device has 101376"):
            _C_simt.simt_control("static_exceeds", True, values)
        with pytest.raises(RuntimeError, match="which nobody has allowed"):
            _C_simt.simt_control("shared_not_allowed", True, values)
        simulate_memory(227)
        assert _C_simt.simt_control("shared_exceeds", True, values) == sum(values)
    finally:
        simulate_memory(227)


def test_a_device_refuses_clusters_that_its_code_does_not_know():
    """Compiled from PTX below compute_90, kernels know clusters of one, on newer devices too."""
    values = [1.0] * 64
    try:
        for capability, archs in (((9, 0), "8.0+PTX"), ((10, 0), "8.0+PTX"), ((8, 0), "8.0 9.0+PTX")):
            simulate_memory(227, capability, archs)
            with pytest.raises(RuntimeError, match="bad configuration"):
                _C_simt.simt_control("cluster_barrier_removed", False, values)
        for capability, archs in (((9, 0), "8.0 9.0+PTX"), ((12, 0), "8.0 9.0+PTX"), ((10, 0), "9.0+PTX")):
            simulate_memory(227, capability, archs)
            assert _C_simt.simt_control("cluster_barrier_removed", False, values) == 64.0
    finally:
        simulate_memory(227)


def test_a_bad_launch_is_an_error():
    with pytest.raises(ValueError, match="no such control"):
        _C_simt.simt_control("nothing", False, [0.0] * 64)
