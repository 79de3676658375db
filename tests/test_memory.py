# SPDX-License-Identifier: MIT
"""Memory of large results is used again, and never while anything still holds it."""

from __future__ import annotations

import gc
import os
import pickle
import threading

import pytest
import torch

from dalle_fast import memory
from dalle_fast.nn import Embedding
from dalle_fast.ops import linear_cross_entropy

LIKE = torch.empty(0)
SHAPE = (1 << 10, 1 << 10)  # 4 MiB


@pytest.fixture(autouse=True)
def nothing_kept():
    limit = memory._limit
    gc.collect()
    memory.release()
    yield
    memory.set_limit(limit)
    memory.release()


def test_the_next_result_of_the_same_size_lies_in_the_same_place():
    first = memory.empty(LIKE, SHAPE)
    assert first.shape == SHAPE
    assert first.is_contiguous()
    assert first.dtype == torch.float32
    place = first.data_ptr()
    del first
    assert memory.kept() == 4 << 20
    again = memory.empty(LIKE, (1 << 11, 1 << 10), torch.bfloat16)
    assert again.data_ptr() == place
    assert again.dtype == torch.bfloat16
    assert memory.kept() == 0


def test_two_that_live_together_lie_apart():
    alive = [memory.empty(LIKE, SHAPE).fill_(i) for i in range(5)]
    assert len({t.data_ptr() for t in alive}) == 5
    assert all(bool((t == i).all()) for i, t in enumerate(alive))


HOLDERS = {
    "a view": lambda t: t[3:5],
    "its storage": lambda t: t.untyped_storage(),
    "a NumPy array": lambda t: t.numpy(),
    "another tensor on the storage": lambda t: torch.empty(0).set_(t.untyped_storage(), 0, (4,), (1,)),
    "DLPack": lambda t: torch.utils.dlpack.to_dlpack(t),
    "a graph of autograd": lambda t: t.requires_grad_().exp(),
    "a detached tensor": lambda t: t.detach(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_held_in_any_way_is_not_given_out_again(holder):
    tensor = memory.empty(LIKE, SHAPE).fill_(1.0)
    place = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    other = memory.empty(LIKE, SHAPE)
    if holder == "a graph of autograd":  # which holds its result, not its argument
        assert memory.empty(LIKE, SHAPE).data_ptr() != held.data_ptr()
        return
    assert other.data_ptr() != place
    del held
    assert memory.empty(LIKE, SHAPE).data_ptr() == place


def test_small_foreign_and_unlimited():
    small = memory.empty(LIKE, (7,))
    assert small.untyped_storage().nbytes() == 28
    meta = memory.empty(torch.empty(0, device="meta"), SHAPE)
    assert meta.device.type == "meta"
    memory.set_limit(0)
    del small, meta
    tensor = memory.empty(LIKE, SHAPE)
    del tensor
    assert memory.kept() == 0
    with pytest.raises(ValueError, match="num_bytes: expected at least 0, got -1"):
        memory.set_limit(-1)


def test_the_limit_holds_and_the_oldest_go_first():
    memory.set_limit(10 << 20)
    for rows in (1024, 1025, 1026):  # 4 MiB each, and a little more
        memory.empty(LIKE, (rows, 1024))
    assert memory.kept() == 4 * 1024 * (1025 + 1026)
    alive = [memory.empty(LIKE, SHAPE).fill_(i) for i in range(4)]
    assert memory.kept() == 0
    assert all(bool((t == i).all()) for i, t in enumerate(alive))
    del alive
    assert memory.kept() <= 10 << 20
    memory.release()
    assert memory.kept() == 0


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            t = memory.empty(LIKE, (1 << 9, 1 << 9)).fill_(number)  # 1 MiB
            if not bool((t == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_goes_on():
    place = memory.empty(LIKE, SHAPE).data_ptr()
    child = os.fork()
    if child == 0:
        os._exit(0 if memory.empty(LIKE, SHAPE).data_ptr() == place else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_result_saves_and_loads_as_any_tensor():
    tensor = memory.empty(LIKE, SHAPE).fill_(2.0)
    data = pickle.dumps(tensor)
    assert len(data) < (4 << 20) + 10_000
    assert torch.equal(pickle.loads(data), tensor)


def test_gradients_of_two_steps_are_two():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.nn.Parameter(torch.randn(2048, 512))
    steps = []
    for _ in range(2):
        weight.grad = None
        linear_cross_entropy(x, weight, torch.randint(2048, (64,))).backward()
        steps.append((weight.grad, weight.grad.clone()))
    for grad, copy in steps:
        assert torch.equal(grad, copy)
    assert steps[0][0].data_ptr() != steps[1][0].data_ptr()
    del grad
    place = steps[0][0].data_ptr()
    steps.clear()
    weight.grad = None
    linear_cross_entropy(x, weight, torch.randint(2048, (64,))).backward()
    assert weight.grad.data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_embedding_is_torchs_bit_for_bit(dtype):
    torch.manual_seed(0)
    ours = Embedding(2048, 512, dtype=dtype)
    theirs = torch.nn.Embedding(2048, 512, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    index = torch.randint(300, (4, 100))
    scale = torch.randn(4, 100, 512, dtype=dtype)
    for module in (ours, theirs):
        (module(index) * scale).sum().backward()
    assert torch.equal(ours(index), theirs(index))
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    with pytest.raises(IndexError):
        ours(torch.tensor([2048]))


def test_an_embedding_compiles():
    module = Embedding(512, 1024)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    index = torch.randint(512, (9,))
    compiled(index).square().sum().backward()
    grad, module.weight.grad = module.weight.grad, None
    module(index).square().sum().backward()
    torch.testing.assert_close(grad, module.weight.grad)
