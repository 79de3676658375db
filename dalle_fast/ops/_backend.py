# SPDX-License-Identifier: MIT
"""Which back end an op runs on, and why not another."""

from __future__ import annotations

import os

import torch

from ._checks import shown

try:
    from dalle_fast import _C
except ImportError as error:  # no compiler when it was installed, or a binary for another Python
    _C = None
    EXTENSION_ERROR: str | None = str(error)
else:
    EXTENSION_ERROR = None

CPU_LEVELS = {"portable": 0, "avx2": 3, "avx512": 4, "bf16": 5, "amx": 6}


def _take_cpu_level() -> None:
    """DALLE_FAST_CPU=avx2 and the like, for tests: no more than that level, though the processor has more."""
    name = os.environ.get("DALLE_FAST_CPU")
    if not name:
        return
    if name not in CPU_LEVELS:
        raise ValueError(f"DALLE_FAST_CPU: expected one of {', '.join(CPU_LEVELS)}, got {name!r}")
    if _C is not None:
        if CPU_LEVELS[name] < _C.cpu_levels[0]:
            built = ", ".join(level for level, number in CPU_LEVELS.items() if number in _C.cpu_levels)
            raise ValueError(f"DALLE_FAST_CPU={name}: this build has {built} alone; DF_CPU_LEVELS=all builds all")
        _C.set_cpu_level(CPU_LEVELS[name])


def usable_cpu_levels() -> list[int]:
    """Those that the build has and the processor runs, ascending; none without the extension."""
    return [] if _C is None else [level for level in _C.cpu_levels if level <= _C.best_cpu_level()]


_take_cpu_level()

BACKENDS = ("auto", "cuda", "cpu", "reference")


def has_room(room: str, device_type: str) -> bool:
    """Whether the extension holds kernels of `room` for "cpu" or "cuda"."""
    if _C is None:
        return False
    if device_type == "cuda":
        return bool(_C.cuda_archs) and room in CUDA_ROOMS
    return device_type == "cpu"


# Rooms whose CUDA kernels exist; the others run on their references there.
CUDA_ROOMS: set[str] = {
    "adamw16",
    "decode_attention",
    "dropout",
    "gumbel_softmax",
    "householder",
    "linear_cross_entropy",
    "minifloat",
    "null",
    "powersgd",
    "sparse_attention",
    "vq_bottleneck",
}


def check_backend(backend: str) -> None:
    """Raises ValueError for what is not one of BACKENDS."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {shown(backend)}")


_CUDA_PROBLEMS: dict[int, str] = {}  # of each device that an op has met


def cuda_problem(index: int) -> str:
    """Why the extension's kernels cannot run on CUDA device `index`; empty when they can. Each device is asked once."""
    problem = _CUDA_PROBLEMS.get(index)
    if problem is None:
        problem = "there is no extension" if _C is None else _C.cuda_problem(index)
        if problem and _C is not None and _C.cuda_archs:
            problem += f" (built for {_C.cuda_archs})"
        _CUDA_PROBLEMS[index] = problem
    return problem


# torch.compile asks once, when it traces, as torch.compiler.assume_constant_result has it; that would import the
# compiler here.
cuda_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(room: str, backend: str, device_type: str, index: int = 0) -> str:
    """One sentence that says why `backend` cannot run `room` on tensors of `device_type`, of device `index`."""
    if backend != device_type:
        return f"the tensors are on {device_type}"
    if _C is None:
        return f"the extension is not there ({EXTENSION_ERROR}); `dalle-fast doctor` says what to do"
    if backend == "cuda" and not _C.cuda_archs:
        return "the extension was built without CUDA (no nvcc was found, or no architecture from 8.0 on was asked for)"
    if not has_room(room, backend):
        return f"the op {room} has no {backend} kernel"
    return f"device {index}: {cuda_problem(index)}"


def choose(room: str, backend: str, tensor: torch.Tensor, *, supported: bool = True, reason: str = "") -> str:
    """Picks "cpu", "cuda" or "reference".

    Args:
        room: name of the op.
        backend: what the caller asked for.
        tensor: the tensor whose device decides.
        supported: False when the kernels cannot take this call (a dtype, say); `reason` then says why.
        reason: why not, in the caller's words.

    Raises:
        ValueError: `backend` is not one of BACKENDS.
        RuntimeError: an explicit choice cannot run; the message says why.
    """
    check_backend(backend)
    if backend == "reference":
        return "reference"
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # the former costs a tenth
    if device_type == "meta":  # shapes only: the registered op answers without memory
        device_type = "cpu"
    runs = supported and has_room(room, device_type)
    if runs and device_type == "cuda":
        runs = not cuda_problem(tensor.device.index or 0)
    if backend == "auto":
        return device_type if runs else "reference"
    if runs and backend == device_type:
        return backend
    cause = reason if not supported else why_not(room, backend, device_type, tensor.device.index or 0)
    raise RuntimeError(f'backend="{backend}" cannot run {room}: {cause}')


def stream_of(tensor: torch.Tensor) -> int:
    """The current CUDA stream of the tensor's device as an integer; 0 on CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
