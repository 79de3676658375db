# SPDX-License-Identifier: MIT
"""The Python side of every op on CUDA tensors, without a GPU: fake tensors know shapes, strides, dtypes and devices.

A tensor that stays on the CPU, a value read back to the host (which a CUDA graph cannot record) and a fake that
disagrees with the real allocation are errors here.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from rooms import RecordOps, all_rooms, build, call, gradients, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from dalle_fast.models import DALLE, DALLEConfig
from dalle_fast.ops import _backend
from dalle_fast.ops._register import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif(_backend._C is None, reason=f"no extension: {_backend.EXTENSION_ERROR}")

ROOMS = [pytest.param(room, id=room.name) for room in all_rooms() if room.name in _backend.CUDA_ROOMS]


def on_cuda(values):
    """Fake CUDA tensors with the layout of `values`; call it inside a FakeTensorMode."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return fake.requires_grad_(value.requires_grad)

    return tree_map(move, values)


class Kernels:
    """Stands in for the extension: kernels do nothing but look at their arguments."""

    def __init__(self):
        self.called = []

    def __getattr__(self, name):
        def kernel(*arguments):
            for tensor in tensors_of(arguments):
                assert tensor.is_cuda, f"{name} got a tensor on {tensor.device}"
            self.called.append(name)
            return []

        return kernel


@pytest.fixture
def kernels(monkeypatch):
    """Puts Kernels in the place of a room's extension, and stream 0 in that of the current one."""

    def use(room):
        module = importlib.import_module(f"dalle_fast.ops.{room.name}.op")
        stub = Kernels()
        monkeypatch.setattr(module, "_C", stub)
        monkeypatch.setattr(module, "stream_of", lambda tensor: 0)
        return stub

    return use


@pytest.mark.parametrize("room", ROOMS)
def test_ops_stay_on_the_device_and_never_wait_for_it(room, kernels):
    calls = []
    for case in room.cases:
        for dtype in case.dtypes:
            arguments = build(room, case, dtype)
            with RecordOps() as recorder:
                if room.differentiable and any(t.requires_grad for t in tensors_of(arguments)):
                    gradients(room.function, arguments, backend="cpu")
                else:
                    call(room.function, arguments, backend="cpu")
            calls += recorder.calls
    stub = kernels(room)
    for op, args, kwargs in calls:
        with FakeTensorMode(), torch.no_grad():
            args, kwargs = on_cuda((args, kwargs))
            real = tensors_of(IMPLEMENTATIONS[op._opname](*args, **kwargs))
            fake = tensors_of(op(*args, **kwargs))
        assert len(real) == len(fake)
        for r, f in zip(real, fake, strict=True):
            assert r.is_cuda
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), op
    assert stub.called


@pytest.fixture
def usable_device(monkeypatch):
    """The extension counts as built with CUDA, the device as one that its kernels run on."""
    has_room = _backend.has_room
    monkeypatch.setattr(
        _backend,
        "has_room",
        lambda room, device_type: room in _backend.CUDA_ROOMS if device_type == "cuda" else has_room(room, device_type),
    )
    monkeypatch.setattr(_backend, "cuda_problem", lambda index: "")


@pytest.mark.parametrize("room", ROOMS)
def test_the_public_function_stays_on_the_device(room, usable_device):
    for case in room.cases:
        with FakeTensorMode():
            arguments, options = on_cuda(build(room, case, case.dtypes[0]))
            results = tensors_of(room.function(*arguments, **options))
        assert all(t.is_cuda for t in results)


@pytest.mark.parametrize("predict_pads", [False, True])
def test_the_whole_loss_of_a_dalle_never_waits_for_the_device(predict_pads, usable_device):
    """Its backward pass is that of the ops above; autograd's engine starts for CUDA tensors on a GPU alone."""
    config = DALLEConfig(64, 4, 2, 32, text_vocab_size=64, text_len=12, image_vocab_size=32, grid=(4, 4),
                         predict_pads=predict_pads)  # fmt: skip
    with FakeTensorMode(), torch.device("cuda"):
        model = DALLE(config)
        text, image = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64)
        losses = model.loss(text, image)
    assert all(t.is_cuda and t.shape == () for t in losses)
    assert losses.loss.requires_grad
