# SPDX-License-Identifier: MIT
"""Devices that the host executor (dalle_fast/_C_simt) pretends to have, for tests of the host's choices."""

from __future__ import annotations

import os
from typing import Any

import dalle_fast
from dalle_fast.ops import _backend

if folder := os.environ.get("DALLE_FAST_SIMT"):  # another build of the executor (make sanitize)
    dalle_fast.__path__.insert(0, folder)
try:
    from dalle_fast import _C_simt
except ImportError as error:
    _C_simt = None
    REASON = f"no host executor: {error}"
else:
    REASON = ""

KIB = 1 << 10
ARCHS = "8.0 9.0+PTX"  # the build's default
# name, compute capability, shared memory of a block, SMs
DEVICES = {
    "T4": ("Tesla T4", 7, 5, 64 * KIB, 40),
    "A100": ("NVIDIA A100-SXM4-80GB", 8, 0, 163 * KIB, 108),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", 8, 9, 99 * KIB, 128),
    "H100": ("NVIDIA H100 80GB HBM3", 9, 0, 227 * KIB, 132),
    "B200": ("NVIDIA B200", 10, 0, 227 * KIB, 148),
    "RTX 5090": ("NVIDIA GeForce RTX 5090", 12, 0, 99 * KIB, 170),
}


def simulate(*names: str, archs: str = ARCHS, driver: int = 13000, runtime: int = 13000, num_sms: int = 0) -> None:
    """The machine has these devices; kernels run on the first. `num_sms` instead of their own where it is not 0."""
    devices = [(*DEVICES[name][:4], num_sms or DEVICES[name][4]) for name in names]
    _C_simt.simt_set_devices(devices, archs, driver, runtime)


def simulate_memory(kib: int, capability: tuple[int, int] = (9, 0), archs: str = ARCHS) -> None:
    """One device of two SMs, which small grids fill, with so much shared memory a block."""
    _C_simt.simt_set_devices([("simulated", *capability, kib * KIB, 2)], archs, 13000, 13000)


class CudaBuild:
    """The extension as if it had been built with CUDA for `archs`, on the devices that were simulated."""

    def __init__(self, archs: str = ARCHS):
        self.cuda_archs = archs
        self.asked: list[int] = []

    def cuda_problem(self, index: int) -> str:
        self.asked.append(index)
        return _C_simt.cuda_problem(index)

    def __getattr__(self, name: str) -> Any:
        return getattr(_C_simt, name)


def use_cuda_build(monkeypatch, archs: str = ARCHS) -> CudaBuild:
    """Puts a CudaBuild in the place of the extension, with nothing known of its devices yet."""
    build = CudaBuild(archs)
    monkeypatch.setattr(_backend, "_C", build)
    monkeypatch.setattr(_backend, "_CUDA_PROBLEMS", {})
    return build
