# SPDX-License-Identifier: MIT
"""The caster's conditions, the null room's binding, threads and the import without an extension."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_fast.ops import _backend, null

_C = _backend._C
pytestmark = pytest.mark.skipif(_C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")


def copy(x) -> torch.Tensor:
    out = torch.full((2, 3), 7.0)
    _C.null_copy(out, x, 0)
    return out


X = torch.arange(6.0).reshape(2, 3)


def test_a_parameter_is_a_tensor():
    assert torch.equal(copy(torch.nn.Parameter(X)), X)


def test_a_plain_subclass_is_a_tensor():
    class Named(torch.Tensor):
        pass

    assert torch.equal(copy(X.as_subclass(Named)), X)


def test_a_subclass_that_intercepts_is_refused():
    with FakeTensorMode():
        fake = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"^input: expected a tensor with memory of its own, got .*FakeTensor"):
        copy(fake)


def test_meta_is_refused():
    with pytest.raises(ValueError, match=r"^input: expected a tensor on cpu or cuda, got one on meta"):
        copy(torch.zeros(2, 3, device="meta"))


def test_a_negative_bit_view_is_refused_by_the_binding_and_resolved_by_the_dispatcher():
    view = torch._neg_view(X)
    with pytest.raises(ValueError, match=r"^input: got a negative-bit view"):
        copy(view)
    assert torch.equal(null(view, backend="cpu"), -X)


def test_a_conjugate_view_is_refused_and_its_parts_are_right():
    z = torch.complex(X, X + 1)
    with pytest.raises(TypeError, match=r"^input: dtype torch.complex64 is not supported"):
        copy(z.conj())
    assert torch.equal(null(z.conj().imag, backend="cpu"), -(X + 1))  # a negative-bit, strided view


def test_non_contiguous_rows_are_read_and_dense_rows_demanded():
    wide = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(copy(wide[:, 1:4]), wide[:, 1:4])
    with pytest.raises(ValueError, match=r"^input: expected stride 1 in the last dimension, got strides \[6, 2\]"):
        copy(wide[:, ::2])


def test_zero_size():
    out = torch.empty(0, 3)
    _C.null_copy(out, torch.empty(0, 3), 0)
    assert null(torch.empty(4, 0), backend="cpu").shape == (4, 0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (X.int(), TypeError, "input: expected dtype float32 or bfloat16 or float16, got int32"),
        (X.to(torch.float8_e4m3fn), TypeError, "input: dtype torch.float8_e4m3fn is not supported"),
        (X.reshape(6), ValueError, "input: expected 2 dimensions, got shape [6]"),
        (X.bfloat16(), TypeError, "out: expected the dtype of input (bfloat16), got float32"),
        (X[:1], ValueError, "out: expected shape [1, 3], got [2, 3]"),
        (X.to_sparse(), TypeError, "input: expected a strided tensor, got layout torch.sparse_coo"),
        ([[1.0]], TypeError, "input: expected a torch.Tensor, got list"),
        (None, TypeError, "input: expected a torch.Tensor, got NoneType"),
        (X.numpy(), TypeError, "input: expected a torch.Tensor, got numpy.ndarray"),
        (torch.zeros((1,) * 9), ValueError, "input: expected at most 8 dimensions, got 9"),
    ],
)
def test_wrong_arguments_are_named(value, error, message):
    with pytest.raises(error) as caught:
        copy(value)
    assert str(caught.value) == message


def test_freed_storage_is_refused():
    x = X.clone()
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^input: the tensor's storage has been freed"):
        copy(x)


@pytest.mark.cuda
def test_wrong_device_is_refused():
    with pytest.raises(ValueError, match=r"^out: expected the device of input"):
        copy(X.cuda())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_openmp_is_torchs_own():
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(libraries) == 1, f"more than one OpenMP runtime is loaded: {libraries}"


def test_the_gil_is_released():
    """Two calls from two threads overlap: a Python thread makes progress while a kernel runs."""
    import threading

    big = torch.zeros(4096, 4096)
    out = torch.empty_like(big)
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)  # hands the GIL back, or the main thread would wait for ever

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the interpreter itself never hands over: only a released GIL lets `count` run
    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = ticks
        for _ in range(20):
            _C.null_copy(out, big, 0)
        during = ticks - before
    finally:
        stop.set()
        sys.setswitchinterval(switch)
        thread.join()
    assert during > 0


def test_null_public_errors():
    with pytest.raises(TypeError, match=r"^x: expected a floating torch.Tensor, got list"):
        null([1.0])
    with pytest.raises(ValueError, match=r"^x: expected shape \[N, M\], got \[6\]"):
        null(X.reshape(6))
    with pytest.raises(RuntimeError, match=r"dtype torch\.float64 has no kernel"):
        null(X.double(), backend="cpu")
    assert null(X.double()).dtype == torch.float64  # auto falls back


def test_without_the_extension_the_references_serve():
    """What a machine without a compiler sees."""
    script = """
        import sys
        sys.modules["dalle_fast._C"] = None  # the import raises
        import torch
        from dalle_fast.ops import _backend, null
        assert _backend._C is None
        x = torch.ones(2, 3, requires_grad=True)
        null(x).sum().backward()
        assert x.grad.sum() == 6
        try:
            null(x, backend="cpu")
        except RuntimeError as error:
            assert "dalle-fast doctor" in str(error), error
        else:
            raise AssertionError("an explicit back end that is not there must raise")
        print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_cpu_levels_can_be_chosen_and_are_clamped():
    best, usable = _C.best_cpu_level(), _backend.usable_cpu_levels()
    assert best == usable[-1]
    try:
        for wanted in range(-1, 100):
            _C.set_cpu_level(wanted)
            assert _C.cpu_level() == max([level for level in usable if level <= wanted], default=usable[0])
    finally:
        _C.set_cpu_level(best)


def test_a_level_below_those_of_the_build_is_refused(monkeypatch):
    class BuiltForThisMachine:
        cpu_levels = [4, 5, 6]

    monkeypatch.setattr(_backend, "_C", BuiltForThisMachine)
    monkeypatch.setenv("DALLE_FAST_CPU", "avx2")
    with pytest.raises(ValueError, match="this build has avx512, bf16, amx alone; DF_CPU_LEVELS=all builds all"):
        _backend._take_cpu_level()


@pytest.mark.parametrize("name", ["portable", "avx2", "amx", "sse9"])
def test_the_environment_chooses_a_cpu_level(name):
    script = "from dalle_fast.ops import _backend; print(_backend._C.cpu_level())"
    environment = {**os.environ, "DALLE_FAST_CPU": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if name == "sse9":
        assert "DALLE_FAST_CPU: expected one of portable, avx2, avx512, bf16, amx, got 'sse9'" in done.stderr
    else:
        level = {"portable": 0, "avx2": 3, "amx": 6}[name]
        expected = [usable for usable in _backend.usable_cpu_levels() if usable <= level]
        if expected:
            assert done.stdout.strip() == str(expected[-1]), done.stderr
        else:
            assert f"DALLE_FAST_CPU={name}: this build has " in done.stderr
