# SPDX-License-Identifier: MIT
"""How the build reads lists of CUDA architectures, TORCH_CUDA_ARCH_LIST among them (cmake/cuda_archs.cmake)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "cmake" / "cuda_archs.cmake"
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))

pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def read(archs: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CMAKE, f"-DARCHS={archs}", "-P", SCRIPT], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("archs", "expected", "dropped"),
    [
        ("8.0;9.0+PTX", "8.0;9.0+PTX", ""),
        ("7.5 8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX", "7.5"),
        ("5.0,7.0+PTX,8.9", "8.9", "5.0 7.0+PTX"),
        ("All", "8.0;9.0+PTX", ""),
        ("Turing;Ampere;Hopper", "8.0;8.6+PTX;9.0+PTX", "7.5+PTX"),
        ("Ampere+Tegra", "8.7", ""),
        ("9.0a 10.0f 12.1+PTX", "9.0a;10.0f;12.1+PTX", ""),
        ("Volta", "", "7.0+PTX"),
    ],
)
def test_what_the_kernels_need_is_left(archs, expected, dropped):
    lines = read(archs).stdout.splitlines()
    assert f"-- archs={expected}" in lines
    assert sum("no kernels for" in line for line in lines) == bool(dropped)
    assert not dropped or f"-- dalle_fast: no kernels for {dropped}: they need compute capability 8.0" in lines[0]


def test_nvcc_is_told_of_machine_code_and_ptx():
    gencode = "-gencode=arch=compute_80,code=sm_80;-gencode=arch=compute_90,code=[sm_90,compute_90]"
    assert f"-- gencode={gencode}" in read("7.5 8.0 9.0+PTX").stdout.splitlines()


@pytest.mark.parametrize("archs", ["sm_80", "8", "Fermi", "9.0+SASS"])
def test_what_is_no_architecture_is_an_error(archs):
    done = read(archs)
    assert done.returncode != 0
    assert f"cannot read the CUDA architecture '{archs}'" in " ".join(done.stderr.split())
