# SPDX-License-Identifier: MIT
"""What every room must keep, driven by the rooms' own cases: values, gradients, strides, threads, CPU levels, opcheck,
torch.compile. A new room gets all of this by having a `cases.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from rooms import (
    RecordOps,
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

from dalle_fast.ops import _backend, dropout

ROOMS = all_rooms()
CASES = [
    pytest.param(room, case, dtype, id=f"{room.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for room in ROOMS
    for case in room.cases
    for dtype in case.dtypes
]
ROOM_PARAMS = [pytest.param(room, id=room.name) for room in ROOMS]
BACKENDS = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

needs_extension = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")
pytestmark = needs_extension


def on_backend(room, backend, arguments):
    """Moves the arguments to where `backend` runs; skips rooms that have no kernel there."""
    if not _backend.has_room(room.name, backend):
        pytest.skip(f"{room.name} has no {backend} kernel")
    return map_tensors(lambda t: t.to(backend), arguments)


def bits(tensor):
    """The bytes, so that NaN equals itself; one dimension, because a scalar has no byte view."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def grad_tolerance(room, dtype):
    return room.grad_tolerance.get(dtype, room.tolerance[dtype])


def takes_gradient(room, case, dtype) -> bool:
    return room.differentiable and any(t.requires_grad for t in tensors_of(build(room, case, dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("room", "case", "dtype"), CASES)
def test_values_match_the_float64_reference(room, case, dtype, backend):
    arguments = build(room, case, dtype)
    expected = call(room.reference, to_float64(arguments))
    actual = call(room.function, on_backend(room, backend, fresh(arguments)), backend=backend)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.cpu(), e, room.tolerance[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("room", "case", "dtype"), CASES)
def test_gradients_match_the_float64_reference(room, case, dtype, backend):
    if not takes_gradient(room, case, dtype):
        pytest.skip("takes no gradient")
    arguments = build(room, case, dtype)
    expected = gradients(room.reference, to_float64(arguments))
    actual = gradients(room.function, on_backend(room, backend, fresh(arguments)), backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype or a.dtype == torch.float32
        assert_close(a.cpu(), e, grad_tolerance(room, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", strided_variants())
@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_any_strides_give_the_same(room, variant, backend):
    change = strided_variants()[variant]
    for case in room.cases:
        for dtype in case.dtypes:
            arguments = on_backend(room, backend, build(room, case, dtype))
            expected = call(room.function, fresh(arguments), backend=backend)
            actual = call(room.function, map_tensors(change, arguments), backend=backend)
            for a, e in zip(actual, expected, strict=True):
                assert_close(a, e, room.tolerance[dtype])
            if takes_gradient(room, case, dtype):
                expected = gradients(room.function, fresh(arguments), backend=backend)
                actual = gradients(room.function, map_tensors(change, arguments), backend=backend)
                for a, e in zip(actual, expected, strict=True):
                    assert_close(a, e, grad_tolerance(room, dtype))


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_the_reference_passes_gradcheck(room):
    """The reference is what the kernels are held against, so its own gradients are checked by finite differences."""
    if not room.differentiable:
        pytest.skip("not differentiable")
    checked = 0
    for case in room.cases:
        arguments = to_float64(build(room, case, case.dtypes[0]))
        inputs = [t for t in tensors_of(arguments) if t.requires_grad]
        if not inputs or sum(t.numel() for t in inputs) > 600:
            continue
        args, kwargs = arguments
        assert torch.autograd.gradcheck(lambda *a, kwargs=kwargs: room.reference(*a, **kwargs), args, fast_mode=True)
        checked += 1
    assert checked > 0, "no case is small enough (600 elements) for gradcheck"


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_gradients_agree_with_finite_differences(room):
    """Gradcheck of the kernels themselves, along one random direction, in float32."""
    if not room.differentiable:
        pytest.skip("not differentiable")
    checked = 0
    for case in room.cases:
        if torch.float32 not in case.dtypes:
            continue
        arguments = build(room, case, torch.float32)
        inputs = [t for t in tensors_of(arguments) if t.requires_grad]
        if not inputs or sum(t.numel() for t in inputs) == 0:
            continue
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(t.shape, generator=generator) for t in inputs]

        def loss(step: float, arguments=arguments, inputs=inputs, directions=directions) -> float:
            with torch.no_grad():
                for t, d in zip(inputs, directions, strict=True):
                    t.add_(d, alpha=step)
                args, kwargs = arguments
                outputs = tensors_of(room.function(*args, **kwargs, backend="cpu"))
                for t, d in zip(inputs, directions, strict=True):
                    t.sub_(d, alpha=step)
            from rooms import upstream_gradient

            return sum(float((o.double() * upstream_gradient(o).double()).sum()) for o in outputs)

        grads = gradients(room.function, arguments, backend="cpu")
        slope = sum(float((g.double() * d.double()).sum()) for g, d in zip(grads, directions, strict=True))
        step = 2e-3
        difference = (loss(step) - loss(-step)) / (2 * step)
        scale = sum(float((g.double() * d.double()).norm()) for g, d in zip(grads, directions, strict=True))
        assert difference == pytest.approx(slope, rel=2e-2, abs=2e-2 * scale + 1e-3), case.name
        checked += 1
    assert checked > 0


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_a_second_derivative_is_right_or_refused(room):
    """Never silently zero: autograd takes an op without a derivative for a constant."""
    if not room.differentiable:
        pytest.skip("not differentiable")
    args, kwargs = build(room, room.cases[0], torch.float32)
    inputs = [t for t in tensors_of(args) if t.requires_grad]
    out = sum(t.square().sum() for t in tensors_of(room.function(*args, **kwargs, backend="cpu")) if t.requires_grad)
    grads = torch.autograd.grad(out, inputs, create_graph=True)
    try:
        actual = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    except RuntimeError as error:
        assert "has no second derivative" in str(error)
        return
    out = sum(t.square().sum() for t in tensors_of(room.reference(*args, **kwargs)) if t.requires_grad)
    grads = torch.autograd.grad(out, inputs, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, grad_tolerance(room, torch.float32))


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_the_result_does_not_depend_on_threads(room):
    before = torch.get_num_threads()
    try:
        for case in room.cases:
            for dtype in case.dtypes:
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(call(room.function, fresh(build(room, case, dtype)), backend="cpu"))
                    if takes_gradient(room, case, dtype):
                        results[-1] += gradients(room.function, build(room, case, dtype), backend="cpu")
                for other in results[1:]:
                    for a, b in zip(results[0], other, strict=True):
                        assert torch.equal(bits(a), bits(b))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", [0, 3, 4, 5, 6])
@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_every_cpu_level_is_right(room, level):
    if level not in _backend.usable_cpu_levels():
        pytest.skip(f"this processor or this build has no level {level}")
    _backend._C.set_cpu_level(level)
    try:
        for case in room.cases:
            for dtype in case.dtypes:
                arguments = build(room, case, dtype)
                expected = call(room.reference, to_float64(arguments))
                actual = call(room.function, fresh(arguments), backend="cpu")
                for a, e in zip(actual, expected, strict=True):
                    assert_close(a, e, room.tolerance[dtype])
                if takes_gradient(room, case, dtype):
                    expected = gradients(room.reference, to_float64(arguments))
                    actual = gradients(room.function, fresh(arguments), backend="cpu")
                    for a, e in zip(actual, expected, strict=True):
                        assert_close(a, e, grad_tolerance(room, dtype))
    finally:
        _backend._C.set_cpu_level(_backend._C.best_cpu_level())


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_opcheck(room):
    """Schema, fake, autograd registration of every op the public function reaches, forward and backward."""
    seen = set()
    for case in room.cases:
        for dtype in case.dtypes:
            arguments = build(room, case, dtype)
            with RecordOps() as recorder:
                if takes_gradient(room, case, dtype):
                    gradients(room.function, arguments, backend="cpu")
                else:
                    call(room.function, arguments, backend="cpu")
            for op, args, kwargs in recorder.calls:
                shapes = tuple((tuple(t.shape), t.dtype) for t in tensors_of((args, kwargs)))
                if (op, shapes) in seen:
                    continue
                seen.add((op, shapes))
                utilities = ["test_schema", "test_faketensor", "test_autograd_registration"]
                torch.library.opcheck(op, args, kwargs, test_utils=utilities)
    assert seen, "the public function reached no registered op"


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_the_way_past_the_dispatcher_gives_the_same_bits(room):
    """A mode that watches operators, a profiler and a lazy view take the long way."""
    for case in room.cases:
        for dtype in case.dtypes:
            arguments = build(room, case, dtype)
            run = gradients if takes_gradient(room, case, dtype) else call
            short = run(room.function, fresh(arguments), backend="cpu")
            with RecordOps() as recorder:
                long = run(room.function, fresh(arguments), backend="cpu")
            assert recorder.calls
            for a, b in zip(short, long, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_profiler_sees_the_ops():
    x = torch.randn(4, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        dropout(x, 0.5, seed=1, offset=0).sum().backward()
    assert sum(event.name == "dalle_fast::dropout" for event in profiler.events()) == 2


def test_a_lazy_view_is_read_as_it_looks():
    x = torch.randn(4, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    expected = dropout(x.resolve_neg(), 0.5, seed=1, offset=0)
    assert torch.equal(dropout(x, 0.5, seed=1, offset=0), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_compiles_as_one_graph(room, backend):
    case = room.cases[0]
    dtype = case.dtypes[0]

    def arguments():
        return on_backend(room, backend, build(room, case, dtype))

    torch._dynamo.reset()
    compiled = torch.compile(room.function, fullgraph=True, backend="aot_eager", dynamic=False)
    expected = call(room.function, fresh(arguments()), backend=backend)
    actual = call(compiled, fresh(arguments()), backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, room.tolerance[dtype])
    if takes_gradient(room, case, dtype):
        expected = gradients(room.function, arguments(), backend=backend)
        actual = gradients(compiled, arguments(), backend=backend)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, grad_tolerance(room, dtype))


@pytest.mark.parametrize("room", ROOM_PARAMS)
def test_backend_choices_are_explained(room):
    args, kwargs = build(room, room.cases[0], room.cases[0].dtypes[0])
    with pytest.raises(ValueError, match="backend"):
        room.function(*copy.deepcopy(args), **kwargs, backend="gpu")
    with pytest.raises(RuntimeError, match=r"cannot run .*: .+"):
        room.function(*copy.deepcopy(args), **kwargs, backend="cuda")
