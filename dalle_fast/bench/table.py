# SPDX-License-Identifier: MIT
"""Runs the rows and prints them."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from .guard import CALL_SECONDS, SlowProductGuard, TooSlow, refusal, slow_dtypes, small_rate
from .memory import peak_memory
from .page import why_not_timed
from .peak_rates import PEAKS, Peaks, peaks
from .rows import Row
from .timing import Timer

COLDER = 1.1  # of the usual time: a figure with empty caches is worth a place
PEER_SECONDS = 45  # for making a peer (a compiler may be at work) and its first call


class OutOfTime(Exception):
    pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the body after `seconds`."""

    def stop(*_):
        raise OutOfTime(f"no result in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    rows: Iterable[tuple[str, Callable[[], Row]]],
    timer: Timer,
    *,
    only: str = "",
    peers: str = "",
    seconds: float = math.inf,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Checks and times rows.

    Args:
        rows: (name, maker): a row's tensors live while it is measured.
        timer: of the device the rows are on.
        only: rows whose name matches this pattern.
        peers: peers whose name matches this pattern.
        seconds: rows that begin later are timed without their peers.
        fresh: measure the peaks of the machine anew.
        say: gets a line for each row as it is done.

    Returns:
        {"peaks": ..., "peaks_source": ..., "rows": [...]}, plain values for JSON.
    """
    torch.manual_seed(0)
    machine = peaks(timer, fresh=fresh)
    deadline = time.monotonic() + seconds
    results = []
    for name, make in rows:
        if not re.search(only, name):
            continue
        results.append(measure(make(), timer, machine, peers=peers, deadline=deadline))
        say(line(results[-1]))
        if timer.device == "cuda":
            torch.cuda.empty_cache()
    return {"peaks": machine.rates, "peaks_source": machine.source, "rows": results}


def failures(table: dict) -> list[str]:
    """Rows that failed or are wrong."""
    run = [row for row in table["rows"] if "skipped" not in row]
    return [line(row) for row in run if "failed" in row or not row["error"] <= row["bound"]]


def measure(row: Row, timer: Timer, machine: Peaks, *, peers: str = "", deadline: float = math.inf) -> dict:
    """One row as plain values: error, floor, medians, ratios (above 1 we are faster) and why a peer did not run."""
    rates = machine.rates
    float32 = rates["float32_flop_per_second"]  # 16-bit products may be taken in it too
    rate = max(float32, rates.get(f"{str(row.flop_dtype)[6:]}_flop_per_second", float32))
    floor = max(row.bytes / rates["copy_bytes_per_second"], row.flops / rate)
    result: dict = {"name": row.name, "bytes": row.bytes, "flops": row.flops, "floor_ms": floor * 1e3,
                    "bound": row.bound, "error": math.inf, "peers": {}}  # fmt: skip
    slow = slow_dtypes(machine) if timer.device == "cpu" else ()
    try:
        with _guard(slow):
            row.ours()
        with _guard(slow):
            result["error"] = row.error()
        if timer.device == "cuda":
            torch.cuda.synchronize()
    except TooSlow as reason:
        result["skipped"] = str(reason)
        return result
    except Exception as error:  # the table goes on; the row says why, and the whole run fails
        result["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return result
    functions: dict[str, Callable[[], object]] = {"ours": row.ours}
    for name, make in row.peers.items():
        if not re.search(peers, name):
            continue
        result["peers"][name] = _ready(name, make, row, timer, slow, deadline)
        if callable(result["peers"][name]):
            functions[name] = result["peers"].pop(name)
    timings = timer.compare(functions, graph=row.graph)
    cold = timer.cold(functions, timings)
    ours = timings["ours"]
    result.update(graph=ours.graph, share=floor / ours.median)
    for name, timing in timings.items():
        figures: dict = {"median_ms": timing.median * 1e3, "best_ms": timing.best * 1e3}
        if cold.get(name, 0.0) > COLDER * timing.median:
            figures["cold_ms"] = cold[name] * 1e3
        memory = peak_memory(functions[name], timer.device) if timing.median < timer.budget else None
        if memory is not None:
            figures["memory_mb"] = memory / 1e6
        if name == "ours":
            result.update(figures)
            continue
        if note := getattr(functions[name], "note", ""):
            figures["note"] = note
        result["peers"][name] = {**figures, "ratio": timing.median / ours.median}
    return result


def _guard(slow: tuple[torch.dtype, ...]):
    return SlowProductGuard(slow) if slow else nullcontext()


def _ready(
    name: str,
    make: Callable[[], Callable[[], object]],
    row: Row,
    timer: Timer,
    slow: tuple[torch.dtype, ...],
    deadline: float,
) -> Callable[[], object] | str:
    """The peer, called once; or why it does not run."""
    if time.monotonic() > deadline:
        return "not run: out of time"
    compiled = "compiled" in name  # a compiler sees no guard, and compiles nothing under one
    if compiled and row.flop_dtype in slow:
        rate = small_rate("products", row.flop_dtype)
        if row.flops / rate > CALL_SECONDS:
            return refusal("products", row.flop_dtype, rate, row.flops / rate)
    try:
        with time_limit(PEER_SECONDS), _guard(() if compiled else slow):
            peer = make()
            peer()
            if timer.device == "cuda":
                torch.cuda.synchronize()
        return peer
    except TooSlow as reason:
        return str(reason)
    except Exception as error:  # a missing or failing peer is a finding, not an end
        reason = str(error).strip().splitlines()
        return f"not run: {type(error).__name__}: {reason[0][:160] if reason else ''}"


def line(row: dict) -> str:
    """One row for the terminal."""
    if "median_ms" not in row:
        return f"{row['name']}: {why_not_timed(row)}"
    measured = {name: peer for name, peer in row["peers"].items() if isinstance(peer, dict)}
    best = min(measured, key=lambda name: measured[name]["median_ms"], default=None)
    against = f"{measured[best]['ratio']:6.2f}x {best}" if best else "      - no peer ran"
    cold = f" (cold {row['cold_ms']:.3f} ms)" if "cold_ms" in row else ""
    wrong = "" if row["error"] <= row["bound"] else f"  ERROR {row['error']:.1e} > {row['bound']:.1e}"
    return f"{row['median_ms']:9.3f} ms  {row['share']:5.0%} of floor  {against}  {row['name']}{cold}{wrong}"


def show(table: dict) -> str:
    """The short table: median, share of the floor, ratio to the best peer."""
    copy, single, half = (f"{table['peaks'][name] / 1e9:.3g}" for name in PEAKS)
    lines = [
        f"copy {copy} GB/s, products {single} (float32) and {half} GFLOP/s (bfloat16), {table['peaks_source']};",
        "the floor of a row is the larger of its bytes and its products at these rates; a ratio above 1: we are faster",
    ]
    return "\n".join([*lines, *map(line, table["rows"])])
