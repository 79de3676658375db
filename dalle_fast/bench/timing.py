# SPDX-License-Identifier: MIT
"""Times functions beside each other: interleaved rounds, device events, the caches emptied in between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

WARMUP, ROUNDS, COLD_ROUNDS = 5, 20, 5
FLUSH_BYTES = 256 << 20  # several times the second-level cache of a GPU
COLD_SECONDS = 0.02  # longer calls do not feel what the caches hold


@dataclass(frozen=True)
class Timing:
    median: float
    """Seconds."""
    best: float
    """Seconds."""
    graph: bool
    """Whether a CUDA graph was replayed."""


class Timer:
    """Measures on one device.

    Args:
        device: "cuda" or "cpu".
        budget: seconds that one function may take in all; slow ones get fewer rounds, and one whose first call takes
            longer is not called again.
    """

    def __init__(self, device: str, budget: float = 5.0) -> None:
        self.device, self.budget = device, budget
        self.flush = torch.empty(FLUSH_BYTES // 4, device=device) if device == "cuda" else None

    def compare(self, functions: dict[str, Callable[[], object]], *, graph: bool = False) -> dict[str, Timing]:
        """Median and best time of each function, called in turn round after round.

        With `graph` all of them are recorded and replayed as CUDA graphs, or, where one cannot be, none is.
        """
        if self.device != "cuda":
            return self._rounds(functions, False)
        for function in functions.values():
            for _ in range(WARMUP):
                function()
        torch.cuda.synchronize()
        if graph:
            try:
                return self._rounds({name: _recorded(function) for name, function in functions.items()}, True)
            except RuntimeError:  # something that waits for the device
                torch.cuda.synchronize()
        return self._rounds(functions, False)

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def cold(self, functions: dict[str, Callable[[], object]], warm: dict[str, Timing]) -> dict[str, float]:
        """Median seconds of a call after the caches were emptied, of CPU functions that are short enough to feel it.

        On CUDA every time is one with empty caches.
        """
        if self.device == "cuda":
            return {}
        if self.flush is None:
            self.flush = torch.zeros(max(64 << 20, 2 * _cache_bytes()) // 4)
        times: dict[str, list[float]] = {name: [] for name in functions if warm[name].median < COLD_SECONDS}
        for _ in range(COLD_ROUNDS):
            for name, seconds in times.items():
                self.flush.add_(1)
                seconds.append(self.once(functions[name]))
        return {name: statistics.median(seconds) for name, seconds in times.items()}

    def _rounds(self, functions, graph):
        first = {name: self.once(function) for name, function in functions.items()}
        rounds = {name: max(3, min(ROUNDS, int(self.budget / max(t, 1e-9)))) for name, t in first.items()}
        times: dict[str, list[float]] = {name: [] for name in functions}
        for name, seconds in first.items():
            if seconds > self.budget:
                rounds[name], times[name] = 0, [seconds]
        for i in range(max(rounds.values())):
            for name, function in functions.items():
                if i < rounds[name]:
                    times[name].append(self.once(function))
        return {name: Timing(statistics.median(t), min(t), graph) for name, t in times.items()}


def _cache_bytes() -> int:
    """Of the last-level cache."""
    try:
        sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size.strip().removesuffix("K")) << 10 for size in sizes)
    except (OSError, ValueError):
        return 32 << 20


def _recorded(function: Callable[[], object]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
