# SPDX-License-Identifier: MIT
"""Says what is there, what is missing and what to do about it."""

from __future__ import annotations

import json
import pkgutil
import platform
from typing import Any

import torch

from . import ops
from .ops import _backend

Facts = dict[str, Any]


def report() -> Facts:
    """The facts a bug report needs: versions, the extension, CPU level, CUDA as torch and as the extension see it.

    `cpu_level` is the number of the level in use (`_backend.CPU_LEVELS`), `cpu_levels` the names of those in the build.
    `cuda_devices` has a dict for each device: name, capability, shared_memory_per_block (bytes), num_sms, image (the
    code that the kernels have there) and problem (why they cannot run; empty when they can).
    """
    extension = _backend._C
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_sees_cuda": torch.cuda.is_available(),
        "extension": extension is not None,
        "extension_error": _backend.EXTENSION_ERROR,
        "cpu_level": extension.cpu_level() if extension else None,
        "cpu_levels": [n for n, i in _backend.CPU_LEVELS.items() if extension and i in extension.cpu_levels],
        "cuda_archs": extension.cuda_archs if extension else None,
        "cuda_status": extension.cuda_status() if extension else None,
        "cuda_runtime": _version(extension.cuda_runtime()) if extension else None,
        "cuda_driver": _version(extension.cuda_driver()) if extension else None,
        "cuda_devices": extension.cuda_devices() if extension else [],
        "ops_without_cuda_kernels": sorted(_rooms() - _backend.CUDA_ROOMS),
    }


def _version(number: int) -> str | None:
    """13020 -> "13.2"; 0: there is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _rooms() -> set[str]:
    return {room.name for room in pkgutil.iter_modules(ops.__path__) if room.ispkg}


def describe(device: Facts) -> str:
    """One line: what the device is, and whether and with which code our kernels run on it."""
    what = (
        f"{device['name']}, compute capability {device['capability']}, {device['num_sms']} SMs, "
        f"{device['shared_memory_per_block'] / 1024:g} KiB of shared memory a block"
    )
    if device["problem"]:
        return f"{what}: PyTorch's ops run instead of our kernels, as {device['problem']}"
    sm, _, ptx = device["image"].partition(" from ")
    return f"{what}: our kernels run, " + (f"compiled for {sm} from {ptx} PTX when first used" if ptx else f"as {sm}")


def advice(facts: Facts) -> list[str]:
    """One sentence per thing that is missing, with what to do."""
    if not facts["extension"]:
        return ["No extension: every op runs on its PyTorch reference. Install a C++ compiler and reinstall."]
    lines = []
    if not facts["cuda_archs"]:
        lines.append("No CUDA kernels: install nvcc (set CUDA_HOME, or the PyPI package nvidia-cuda-nvcc), reinstall.")
    elif facts["cuda_status"] != "ok":
        lines.append(f"CUDA kernels are built but cannot run here: {facts['cuda_status']}.")
    else:
        lines += [
            f"No CUDA kernels on device {index}: {device['problem']}."
            for index, device in enumerate(facts["cuda_devices"])
            if device["problem"]
        ]
    return lines or ["All is there."]


def main(as_json: bool = False) -> None:
    """Prints the report; `as_json` for bug reports."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    lines = {name: value for name, value in facts.items() if name != "cuda_devices"}
    lines["ops_without_cuda_kernels"] = ", ".join(lines["ops_without_cuda_kernels"])
    lines |= {f"cuda_device_{index}": describe(device) for index, device in enumerate(facts["cuda_devices"])}
    width = max(len(name) for name in lines)
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    print("\n".join(advice(facts)))
