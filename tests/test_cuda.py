# SPDX-License-Identifier: MIT
"""What only a GPU can show, beside the generic tests: the same bits at every call, streams, CUDA graphs, tensors of
more than 2^31 elements, devices that do not fit.
"""

from __future__ import annotations

import pytest
import torch
from rooms import all_rooms, build, call, fresh, gradients, map_tensors, tensors_of

from dalle_fast.ops import (
    AttentionPattern,
    _backend,
    decode_attention,
    dropout,
    gumbel_softmax,
    minifloat_encode,
    orthonormalize,
    powersgd_project,
    powersgd_reconstruct,
    sparse_attention,
)
from dalle_fast.optim import AdamW16

pytestmark = pytest.mark.cuda

ROOMS = [pytest.param(room, id=room.name) for room in all_rooms() if room.name in _backend.CUDA_ROOMS]
REPEATS = 100


def to_cuda(arguments):
    return map_tensors(lambda t: t.cuda(), arguments)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def signed(tensor):
    """int16 in the place of uint16, for which torch has few kernels."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor


def results(room, arguments):
    actual = call(room.function, fresh(arguments), backend="cuda")
    if room.differentiable and any(t.requires_grad for t in tensors_of(arguments)):
        actual += gradients(room.function, fresh(arguments), backend="cuda")
    return actual


@pytest.mark.parametrize("room", ROOMS)
def test_the_same_bits_at_every_call(room):
    for case in room.cases:
        for dtype in case.dtypes:
            arguments = to_cuda(build(room, case, dtype))
            first = results(room, arguments)
            differ = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(REPEATS):
                for a, b in zip(results(room, arguments), first, strict=True):
                    differ += (bits(a) != bits(b)).sum()
            assert int(differ) == 0, f"{case.name} {dtype}"


@pytest.mark.parametrize("room", ROOMS)
def test_kernels_run_on_the_current_stream(room):
    """A kernel on another stream would read the arguments before a long wait has let them be written."""
    case, dtype = room.cases[0], room.cases[0].dtypes[0]
    arguments = to_cuda(build(room, case, dtype))
    expected = results(room, arguments)
    blank = fresh(arguments)
    for tensor in tensors_of(blank):
        signed(tensor.detach()).zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        with torch.no_grad():
            for to, source in zip(tensors_of(blank), tensors_of(arguments), strict=True):
                signed(to).copy_(signed(source))
        actual = results(room, blank)
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(bits(a), bits(e))


@pytest.mark.parametrize("room", ROOMS)
def test_a_cuda_graph_records_and_replays(room):
    for case in room.cases:
        dtype = case.dtypes[0]
        arguments = to_cuda(build(room, case, dtype))
        if sum(t.numel() for t in tensors_of(arguments)) == 0:
            continue
        expected = results(room, arguments)
        static = fresh(arguments)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                results(room, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = results(room, static)
        for tensor in recorded:
            bits(tensor).zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, e in zip(recorded, expected, strict=True):
            assert torch.equal(bits(a), bits(e)), case.name


@pytest.mark.parametrize("room", ROOMS)
def test_backend_cpu_is_refused_on_cuda_tensors(room):
    args, kwargs = to_cuda(build(room, room.cases[0], room.cases[0].dtypes[0]))
    with pytest.raises(RuntimeError, match="cannot run .*: the tensors are on cuda"):
        room.function(*args, **kwargs, backend="cpu")


def test_decoding_replays_one_graph():
    from dalle_fast.models import DALLE, DALLEConfig  # not the trainer: what it needs may not be installed
    from dalle_fast.sample.decoder import ImageDecoder

    torch.manual_seed(0)
    config = DALLEConfig(32, 3, 2, 16, text_vocab_size=300, text_len=10, image_vocab_size=16, grid=(8, 8), kernel=3)
    model = DALLE(config).cuda().eval()
    text = torch.randint(config.text_vocab_size, (2, config.text_len), device="cuda")
    image = torch.randint(config.image_vocab_size, (6, config.image_len), device="cuda")

    def logits(count_on_device):
        decoder = ImageDecoder(model, text, 6, count_on_device=count_on_device)
        steps = [decoder(image[:, i - 1] if i else None).clone() for i in range(config.image_len)]
        assert (decoder._replay is not None) == count_on_device
        return torch.stack(steps)

    torch.testing.assert_close(logits(True), logits(False), rtol=1e-5, atol=1e-5)


def test_a_recorded_update_counts_its_own_steps():
    def parameters():
        generator = torch.Generator("cuda").manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(n, generator=generator, device="cuda")) for n in (5000, 33)]
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator, device="cuda")
        return made

    eager, recorded = parameters(), parameters()
    plain, capturable = AdamW16(eager, lr=1e-2), AdamW16(recorded, lr=1e-2, capturable=True)
    plain.step()
    capturable.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()
    for _ in range(5):
        plain.step()
        graph.replay()
    for a, b in zip(eager, recorded, strict=True):
        assert torch.equal(a, b)
        assert int(capturable.state[b]["step"]) == 6


# ---- more than 2^31 elements: the end of a large call is what the call on the end alone gives


def needs_gigabytes(count):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < count:
        pytest.skip(f"needs {count} GiB of GPU memory, {free:.0f} are free")


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    torch.cuda.empty_cache()


def test_gumbel_softmax_past_2_31():
    needs_gigabytes(20)
    rows, codes = (1 << 18) + 3, 8192
    logits = torch.randn(rows, codes, device="cuda", dtype=torch.bfloat16)
    y = gumbel_softmax(logits, 0.5, dim=1, seed=3)
    tail = gumbel_softmax(logits[-7:], 0.5, dim=1, seed=3, row_offset=rows - 7)
    assert torch.equal(y[-7:], tail)
    assert torch.equal(y[:7], gumbel_softmax(logits[:7], 0.5, dim=1, seed=3))


def test_dropout_past_2_31():
    needs_gigabytes(16)
    for rows, columns in (((1 << 18) + 3, 8193), (3, (1 << 30) + 8)):
        x = torch.ones(rows, columns, device="cuda", dtype=torch.bfloat16)
        out = dropout(x, 0.5, seed=3, offset=1)
        assert torch.equal(out[-1:], dropout(x[-1:], 0.5, seed=3, offset=1, row_offset=rows - 1))
        assert torch.equal(out[:1], dropout(x[:1], 0.5, seed=3, offset=1))
        del x, out


def test_minifloat_past_2_31():
    needs_gigabytes(30)
    x = torch.randn((1 << 31) + 1001, device="cuda")
    code = minifloat_encode(x, "1-6-9")
    for part in (slice(0, 999), slice(-1501, None)):
        assert torch.equal(signed(code[part]), signed(minifloat_encode(x[part].clone(), "1-6-9")))


def test_sparse_attention_past_2_31():
    needs_gigabytes(60)
    pattern = AttentionPattern("row", 256, (32, 32))
    heads = (1 << 31) // (pattern.length * 64) + 2
    q, k, v = (torch.randn(1, pattern.length, heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in (q, k, v))
    dout = torch.randn(1, pattern.length, heads, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    out = sparse_attention(q, k, v, pattern)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    part = [t[:, -2:].detach().requires_grad_() for t in (q, k, v)]
    tail = sparse_attention(*part, pattern)
    assert torch.equal(out[:, -2:], tail)
    for whole, end in zip(grads, torch.autograd.grad(tail, part, dout[:, -2:]), strict=True):
        assert torch.equal(whole[:, -2:], end)


def test_decode_attention_past_2_31():
    needs_gigabytes(30)
    pattern = AttentionPattern("column", 256, (32, 32))
    batch, heads = (1 << 31) // (1024 * 64 * 8) + 2, 8
    image = [torch.randn(batch, heads, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    text = [torch.randn(1, heads, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.randn(batch, heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    out = decode_attention(*new, *text, *image, pattern, 256 + 700)
    end = [t[-2:].clone() for t in new]
    tail = decode_attention(*end, *text, *(t[-2:].clone() for t in image), pattern, 256 + 700)
    torch.testing.assert_close(out[-2:], tail, rtol=1e-2, atol=1e-3)  # fewer samples may be split in another way


def test_adamw16_past_2_31():
    needs_gigabytes(45)
    count, part = (1 << 31) + 1003, 5003
    p = torch.nn.Parameter(torch.randn(count, device="cuda"))
    p.grad = torch.randn(count, device="cuda")
    end = torch.nn.Parameter(p.detach()[-part:].clone())
    end.grad = p.grad[-part:].clone()
    AdamW16([p]).step()
    AdamW16([end]).step()
    assert torch.equal(p[-part:], end)


def test_powersgd_past_2_31():
    needs_gigabytes(40)
    rows, depth, rank = 65_539, 32_769, 16
    error = minifloat_encode(torch.full((rows, depth), 0.25, device="cuda"), "1-6-9")
    grad = torch.randn(rows, depth, device="cuda").mul_(1e-2)
    x = torch.randn(depth, rank, device="cuda")
    end, end_grad = error[-70:].clone(), grad[-70:].clone()
    code, status = powersgd_project(error, x, grad, scale=1e-2)
    tail, _ = powersgd_project(end, x, end_grad, scale=1e-2)
    assert status.tolist() == [1, 1, 1]
    assert torch.equal(signed(error[-70:]), signed(end))
    del grad
    torch.testing.assert_close(code[-70:].int(), tail.int(), rtol=0, atol=1)  # depth may be split in another way
    q = minifloat_encode(torch.randn(depth, rank, device="cuda"), "1-6-9")
    whole = powersgd_reconstruct(code, q, error)
    assert torch.equal(whole[-70:], powersgd_reconstruct(code[-70:].clone(), q, end))
    assert torch.equal(signed(error[-70:]), signed(end))


def test_orthonormalize_past_2_31():
    needs_gigabytes(30)
    count = (1 << 31) // (496 * 112) + 2
    p = torch.randn(count, 496, 112, device="cuda")
    q = orthonormalize(p)
    assert torch.equal(q[-2:], orthonormalize(p[-2:].clone()))
