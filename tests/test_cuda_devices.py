# SPDX-License-Identifier: MIT
"""What the host decides for each kind of GPU, on simulated devices: whether our kernels run there, and which plan."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from simulated import DEVICES, KIB, REASON, _C_simt, simulate, simulate_memory, use_cuda_build
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_fast.ops import AttentionPattern, _backend, decode_attention, orthonormalize, sparse_attention
from dalle_fast.ops.decode_attention.reference import decode_attention_reference
from dalle_fast.ops.minifloat import minifloat_encode
from dalle_fast.ops.powersgd import powersgd_project
from dalle_fast.ops.powersgd.reference import powersgd_project_reference
from dalle_fast.ops.sparse_attention.reference import sparse_attention_reference

pytestmark = pytest.mark.skipif(_C_simt is None, reason=REASON)

NEW_ENOUGH = [name for name in DEVICES if name != "T4"]


@pytest.fixture(autouse=True)
def default_devices():
    yield
    if _C_simt is not None:
        simulate_memory(227)


def on(index: int = 0) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, device=f"cuda:{index}")


# ---- which back end


def test_auto_takes_the_kernels_where_they_run(monkeypatch):
    use_cuda_build(monkeypatch)
    simulate(*DEVICES)
    for index, name in enumerate(DEVICES):
        expected = "reference" if name == "T4" else "cuda"
        assert _backend.choose("null", "auto", on(index)) == expected, name
    assert _backend.choose("conv2d", "auto", on(1)) == "reference"
    with pytest.raises(RuntimeError, match="the op conv2d has no cuda kernel"):
        _backend.choose("conv2d", "cuda", on(1))


@pytest.mark.parametrize(
    ("name", "machine", "why"),
    [
        ("T4", {}, "device 0: its compute capability is 7.5, the kernels need 8.0 or newer"),
        ("H100", {"driver": 12040}, "the driver is for CUDA 12.4, the kernels were built with CUDA 13.0"),
        ("H100", {"driver": 0}, "no NVIDIA driver"),
        ("B200", {"archs": "8.0 9.0"}, r"no code of the kernels loads on its compute capability 10.0.*8.0 9.0\)"),
        ("RTX 5090", {"runtime": 13010}, "unsupported toolchain.*the driver is for CUDA 13.0.*built with CUDA 13.1"),
    ],
)
def test_auto_falls_back_and_an_explicit_choice_says_why(monkeypatch, name, machine, why):
    build = use_cuda_build(monkeypatch, machine.get("archs", "8.0 9.0+PTX"))
    simulate(name, **machine)
    for _ in range(50):
        assert _backend.choose("null", "auto", on()) == "reference"
        with pytest.raises(RuntimeError, match=why):
            _backend.choose("null", "cuda", on())
    assert build.asked == [0]  # once, however many calls


def test_machine_code_serves_newer_minor_versions_with_an_older_driver(monkeypatch):
    """Minor versions of a driver and a runtime mix, except for PTX."""
    use_cuda_build(monkeypatch)
    simulate("RTX 4090", "B200", driver=13000, runtime=13010)
    assert _backend.choose("null", "auto", on(0)) == "cuda"
    assert _backend.choose("null", "auto", on(1)) == "reference"


def test_a_compiled_graph_knows_the_answer(monkeypatch):
    use_cuda_build(monkeypatch)
    simulate("A100", "T4")

    def scale(x):
        return x * (2 if _backend.cuda_problem(0) else 3) * (5 if _backend.cuda_problem(1) else 7)

    compiled = torch.compile(scale, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 15


def test_an_import_asks_no_device():
    code = (
        "import torch, dalle_fast.ops, dalle_fast.nn, dalle_fast.doctor\n"
        "from dalle_fast.ops import _backend\n"
        "print(torch.cuda.is_initialized(), _backend._CUDA_PROBLEMS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["False", "{}"]


# ---- which plan


@pytest.fixture
def launches(monkeypatch):
    """launches(op, call): results of the call on the executor, and the kernels that it launched."""

    def run(op, function):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(f"dalle_fast.ops.{op}.op"), "_C", _C_simt)
            _C_simt.simt_launches()
            return function(), _C_simt.simt_launches()

    return run


def shared_bytes(launched, name):
    return max(fixed + dynamic for kernel, _, _, fixed, dynamic in launched if name in kernel)


def resident(bytes_of_block, name):
    return (DEVICES[name][3] + KIB) // (bytes_of_block + KIB)


# (dtype, channels): devices that take the large plan: two blocks of it fit an SM, or one where that is all anyway
LARGE_DECODE = {
    (torch.bfloat16, 64): {"RTX 4090", "H100", "B200", "RTX 5090"},
    (torch.float32, 64): {"H100", "B200"},
    (torch.bfloat16, 128): set(NEW_ENOUGH),  # there is one plan
    (torch.float32, 128): {"A100", "H100", "B200"},
    (torch.bfloat16, 256): {"A100", "H100", "B200"},
    (torch.float32, 256): {"A100", "H100", "B200"},
}


@pytest.mark.parametrize(("dtype", "dim"), LARGE_DECODE, ids=str)
def test_decode_attention_fits_every_device(dtype, dim, launches):
    """As in the paper: many samples of a caption, so that a block has 64 rows (16 of more than 128 channels)."""
    pattern, samples = AttentionPattern("row", 33, (2, 12)), 18
    generator = torch.Generator().manual_seed(0)
    position = pattern.text_len + 20

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    text = [draw(1, 3, pattern.text_len, dim) for _ in range(2)]
    image = [draw(samples, 3, pattern.image_cache_len, dim) for _ in range(2)]
    new = [draw(samples, 3, dim) for _ in range(3)]
    expected = decode_attention_reference(*(t.double() for t in (*new, *text, *image)), pattern, position)
    results, used = {}, {}
    for name in NEW_ENOUGH:
        simulate(name, num_sms=2)
        caches = [t.clone() for t in image]
        results[name], launched = launches(
            "decode_attention", lambda caches=caches: decode_attention(*new, *text, *caches, pattern, position)
        )
        used[name] = shared_bytes(launched, "decode_kernel")
        assert used[name] <= DEVICES[name][3]
        bound = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(results[name].double(), expected, **bound)
    large = max(used.values())
    assert {name for name in NEW_ENOUGH if used[name] == large} == LARGE_DECODE[dtype, dim]
    if dim == 64:
        assert all(resident(used[name], name) >= 2 for name in ("A100", "H100", "B200"))


@pytest.mark.parametrize(
    ("dtype", "rank", "one_stage"),
    [
        (torch.float32, 5, {"RTX 4090", "RTX 5090"}),
        (torch.bfloat16, 5, set()),
        (torch.float32, 112, {"RTX 4090", "RTX 5090"}),
        (torch.bfloat16, 112, {"RTX 4090", "RTX 5090"}),
        (torch.float32, 128, {"RTX 4090", "RTX 5090"}),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_powersgd_project_fits_every_device(dtype, rank, one_stage, transposed, launches):
    generator = torch.Generator().manual_seed(0)
    shape = (130, 20) if transposed else (20, 130)
    error = minifloat_encode(torch.randint(-2, 3, shape, generator=generator) / 32, "1-6-9")
    grad = (torch.randint(-2, 3, shape, generator=generator) / 32).to(dtype)
    factor = minifloat_encode(torch.randint(-1, 2, (130, rank), generator=generator).float(), "1-6-9")
    view = (lambda t: t.mT) if transposed else (lambda t: t)
    expected = powersgd_project_reference(view(error.clone()), factor, view(grad))
    used = {}
    for name in NEW_ENOUGH:
        simulate(name)
        error_of_device = error.clone()
        actual, launched = launches("powersgd", lambda e=error_of_device: powersgd_project(view(e), factor, view(grad)))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), name
        used[name] = shared_bytes(launched, "multiply")
        assert used[name] <= DEVICES[name][3]
    assert {name for name in NEW_ENOUGH if used[name] < max(used.values())} == one_stage


@pytest.mark.parametrize("name", NEW_ENOUGH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_fits_every_device(name, dtype, launches):
    pattern = AttentionPattern("row", 9, (2, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, pattern.length, 128, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    simulate(name)
    out, launched = launches("sparse_attention", lambda: sparse_attention(q, k, v, pattern))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = sparse_attention_reference(*wide, pattern)
    actual, more = launches("sparse_attention", lambda: torch.autograd.grad(out.double().square().sum(), (q, k, v)))
    bound = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), e, **bound)
    assert 0 < max(fixed + dynamic for *_, fixed, dynamic in launched + more) <= DEVICES[name][3]


@pytest.mark.parametrize(
    ("capability", "archs", "clusters"),
    [
        ((9, 0), "8.0 9.0+PTX", True),
        ((10, 0), "8.0 9.0+PTX", True),
        ((12, 0), "9.0+PTX", True),
        ((9, 0), "8.0+PTX", False),
        ((10, 0), "8.0+PTX", False),
        ((8, 0), "8.0 9.0+PTX", False),
    ],
)
def test_clusters_are_taken_where_the_code_has_them(capability, archs, clusters, launches):
    p = torch.randn(1, 130, 20, generator=torch.Generator().manual_seed(0))
    simulate_memory(16, capability, archs)
    q, launched = launches("householder", lambda: orthonormalize(p))
    assert (max(cluster for _, _, cluster, _, _ in launched) > 1) == clusters
    assert (q[0].mT @ q[0] - torch.eye(20)).norm() < 1e-5


def test_too_many_columns_for_a_device_are_refused(launches):
    simulate_memory(16)
    with pytest.raises(ValueError, match="p: the CUDA kernel takes at most 1472 columns on this device"):
        launches("householder", lambda: orthonormalize(torch.zeros(1, 1480, 1480)))


@pytest.mark.parametrize(("name", "driver"), [("T4", 13000), ("H100", 13000)])
def test_the_executor_has_no_code_for_other_devices(name, driver, launches):
    simulate(name, archs="8.0")
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        launches("householder", lambda: orthonormalize(torch.ones(1, 4, 2)))
