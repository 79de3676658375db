# SPDX-License-Identifier: MIT
"""The most memory that one call holds beyond what was there before it: results, workspaces, logits that are kept."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes of one call on top of what was in use; None where the system does not say.

    On a CPU the resident set's high-water mark, which the kernel resets on request (Linux): so it counts what torch,
    its libraries and our kernels take alike, to some hundred kilobytes.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not at hand: it would hide what the call takes
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
