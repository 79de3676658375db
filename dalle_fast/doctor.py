# SPDX-License-Identifier: MIT
"""Says what is there, what is missing and what to do about it."""

from __future__ import annotations

import json
import platform

import torch

from .ops import _backend


def report() -> dict[str, str | int | bool | None]:
    """The facts a bug report needs: versions, the extension, CPU level, CUDA as torch and as the extension see it."""
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
        "cuda_archs": extension.cuda_archs if extension else None,
        "cuda_status": extension.cuda_status() if extension else None,
    }


def advice(facts: dict[str, str | int | bool | None]) -> list[str]:
    """One sentence per thing that is missing, with what to do."""
    if not facts["extension"]:
        return ["No extension: every op runs on its PyTorch reference. Install a C++ compiler and reinstall."]
    lines = []
    if not facts["cuda_archs"]:
        lines.append("No CUDA kernels: install nvcc (set CUDA_HOME, or the PyPI package nvidia-cuda-nvcc), reinstall.")
    elif facts["cuda_status"] != "ok":
        lines.append(f"CUDA kernels are built but cannot run here: {facts['cuda_status']}.")
    return lines or ["All is there."]


def main(as_json: bool = False) -> None:
    """Prints the report; `as_json` for bug reports."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    print("\n".join(advice(facts)))
