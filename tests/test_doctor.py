# SPDX-License-Identifier: MIT
from __future__ import annotations

import json

import pytest
from simulated import REASON, _C_simt, simulate, simulate_memory, use_cuda_build

from dalle_fast import doctor
from dalle_fast.cli import main
from dalle_fast.ops import _backend

simulated = pytest.mark.skipif(_C_simt is None, reason=REASON)


@pytest.fixture
def cuda_build(monkeypatch):
    yield use_cuda_build(monkeypatch)
    simulate_memory(227)


def test_json_names_every_fact(capsys):
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"]
    assert facts["extension"] is (facts["extension_error"] is None)


def test_advice_says_what_to_do():
    facts = doctor.report()
    assert "Install a C++ compiler" in doctor.advice({**facts, "extension": False})[0]
    there = {**facts, "extension": True}
    assert "nvcc" in doctor.advice({**there, "cuda_archs": ""})[0]
    assert "no driver" in doctor.advice({**there, "cuda_archs": "8.0", "cuda_status": "no driver"})[0]
    assert doctor.advice({**there, "cuda_archs": "8.0", "cuda_status": "ok"}) == ["All is there."]


def test_ops_without_cuda_kernels_are_named():
    facts = doctor.report()
    assert facts["ops_without_cuda_kernels"] == ["conv2d", "max_pool2d"]
    assert "conv2d" not in _backend.CUDA_ROOMS


@simulated
def test_every_device_is_described(cuda_build, capsys):
    simulate("A100", "RTX 4090", "H100", "B200", "RTX 5090", "T4")
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["cuda_driver"], facts["cuda_runtime"], facts["cuda_status"]) == ("13.0", "13.0", "ok")
    devices = facts["cuda_devices"]
    assert [d["image"] for d in devices] == ["sm_80", "sm_80", "sm_90", "sm_100 from compute_90",
                                             "sm_120 from compute_90", ""]  # fmt: skip
    assert [d["shared_memory_per_block"] // 1024 for d in devices] == [163, 99, 227, 227, 99, 64]
    assert [bool(d["problem"]) for d in devices] == [False] * 5 + [True]
    main(["doctor"])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("cuda_device"))
    assert lines["cuda_device_1"].endswith("8.9, 128 SMs, 99 KiB of shared memory a block: our kernels run, as sm_80")
    assert lines["cuda_device_3"].endswith("our kernels run, compiled for sm_100 from compute_90 PTX when first used")
    assert "PyTorch's ops run instead of our kernels" in lines["cuda_device_5"]
    assert "compute capability is 7.5, the kernels need 8.0 or newer" in lines["cuda_device_5"]
    assert doctor.advice(doctor.report()) == [f"No CUDA kernels on device 5: {devices[5]['problem']}."]


@simulated
@pytest.mark.parametrize(
    ("machine", "status"),
    [
        ({"names": ["H100"], "driver": 12080}, "the driver is for CUDA 12.8, the kernels were built with CUDA 13.0"),
        ({"names": ["H100"], "driver": 0}, "no NVIDIA driver is loaded"),
        ({"names": []}, "no CUDA-capable device"),
        ({"names": ["T4"]}, "device 0: its compute capability is 7.5"),
        ({"names": ["B200"], "archs": "8.0 9.0"}, "no code of the kernels loads on its compute capability 10.0"),
        ({"names": ["B200"], "driver": 13000, "runtime": 13010}, "unsupported toolchain"),
    ],
)
def test_a_machine_without_a_usable_device_says_why(cuda_build, machine, status):
    simulate(*machine.pop("names"), **machine)
    facts = doctor.report()
    assert status in facts["cuda_status"]
    assert doctor.advice(facts) == [f"CUDA kernels are built but cannot run here: {facts['cuda_status']}."]


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2
    assert "paint" in capsys.readouterr().err
