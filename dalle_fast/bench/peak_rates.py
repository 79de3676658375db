# SPDX-License-Identifier: MIT
"""What the machine does at best: bytes copied and products a second, measured in two seconds and kept."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import cache_folder, parse_json, read_bytes
from ..models.store import write_atomic
from ..ops import _backend
from .timing import Timer

PEAKS = ("copy_bytes_per_second", "float32_flop_per_second", "bfloat16_flop_per_second")
SECONDS = 0.6  # for each of them
SIDES = {"cpu": (64, 2048), "cuda": (1024, 8192)}  # of the products, doubled from the first to the last
COUNTS = {"cpu": (1 << 20, 1 << 26), "cuda": (1 << 25, 1 << 29)}  # float32 of the copies
LEVELS = ("DALLE_FAST_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""What makes a newer processor behave like an older one for us, PyTorch, oneDNN and MKL (CONTRIBUTING.md)."""


@dataclass(frozen=True)
class Peaks:
    rates: dict[str, float]
    """One for each name of PEAKS."""
    source: str
    """ "measured", or since when they are kept."""


def peaks(timer: Timer, *, fresh: bool = False) -> Peaks:
    """The rates of PEAKS: bytes copied a second (read plus written), FLOP/s of products of random matrices.

    They are kept in a file of the user's cache folder, for as long as processor, threads, torch and the levels that
    the environment allows stay the same; what is measured on a busy machine is not kept. On a CPU the rates are those
    of PyTorch's libraries, which a hand-written kernel may pass.

    Args:
        timer: of the device.
        fresh: measure, whatever is kept.
    """
    key = machine_key(timer.device)
    kept = None if fresh else _kept().get(key)
    if kept is not None:
        return Peaks(kept["rates"], f"kept since {kept['date']}")
    rates = measured(timer)
    if not _is_busy():
        _keep(key, {"rates": rates, "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")})
    return Peaks(rates, "measured")


def measured(timer: Timer) -> dict[str, float]:
    """The rates, in about two seconds on any machine: sizes grow for as long as the next one fits the time left."""
    products = [_product_rate(timer, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return dict(zip(PEAKS, (_copy_rate(timer), *products), strict=True))


def _product_rate(timer: Timer, dtype: torch.dtype) -> float:
    def make(side: int) -> Callable[[], object]:
        a, b = (torch.randn(side, side, device=timer.device, dtype=dtype) for _ in range(2))
        return lambda: a @ b

    rates = _growing(timer, make, *SIDES[timer.device], growth=8)
    return max(2 * side**3 / seconds for side, seconds in rates)


def _copy_rate(timer: Timer) -> float:
    def make(count: int) -> Callable[[], object]:
        x = torch.randn(1 << 16, device=timer.device).repeat(count >> 16)
        y = torch.zeros_like(x)
        return lambda: y.copy_(x)

    count, seconds = _growing(timer, make, *COUNTS[timer.device], growth=2)[-1]  # smaller ones stay in a cache
    return 2 * 4 * count / seconds


def _growing(timer: Timer, make: Callable[[int], Callable[[], object]], first: int, last: int, growth: int):
    """[(size, best seconds)] of sizes that double until `last` or until the time is over.

    A size is repeated until two calls of the next, `growth` times as long, fit what is left; so a disturbed call costs
    repeats and not the larger sizes.
    """
    end, size, found = time.monotonic() + SECONDS, first, []
    while True:
        begin = time.monotonic()
        call = make(size)
        making = time.monotonic() - begin
        seconds = timer.once(call)  # loads and chooses code
        while True:
            again = timer.once(call)
            steady, seconds = again > 0.9 * seconds, min(seconds, again)
            left = end - time.monotonic()
            goes_on = size < last and steady and growth * (making + 2.5 * seconds) < left
            if goes_on or seconds > left:
                break
        found.append((size, seconds))
        if not goes_on:
            return found
        size *= 2


# ---- kept between runs


def cache_file() -> Path:
    """Where rates are kept."""
    return cache_folder() / "peaks.json"


def cpu_name() -> str:
    """As the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine_key(device: str) -> str:
    """All that the rates depend on; another value of any part is another machine."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    level = _backend._C.cpu_level() if _backend._C else None
    facts = [name, f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability(), f"level {level}"]
    return "; ".join(facts + [f"{variable}={os.environ.get(variable, '')}" for variable in LEVELS])


def _kept() -> dict:
    try:
        found = parse_json(read_bytes(cache_file()))
    except (OSError, ValueError, RuntimeError):  # none, not readable, damaged, no home folder
        return {}
    return {key: entry for key, entry in found.items() if _is_entry(entry)} if isinstance(found, dict) else {}


def _is_busy() -> bool:
    """Whether others use the processor, so that lower rates were measured than there are."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def _is_entry(entry: object) -> bool:
    rates = entry.get("rates") if isinstance(entry, dict) else None
    if not isinstance(rates, dict) or set(rates) != set(PEAKS) or not isinstance(entry.get("date"), str):
        return False
    return all(isinstance(rate, float) and 0 < rate < math.inf for rate in rates.values())


def _keep(key: str, entry: dict) -> None:
    """Best effort: who cannot write there measures each time."""
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({**_kept(), key: entry}, indent=1).encode())
