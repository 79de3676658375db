# SPDX-License-Identifier: MIT
"""Runs the rows and prints them."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .rows import Row, all_rows
from .timing import Timer, roofs

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


def run(device: str, small: bool, only: re.Pattern[str], seconds: float) -> dict:
    """Every row whose name matches `only`; rows that begin after `seconds` are timed without their peers."""
    torch.manual_seed(0)
    timer = Timer(device, budget=1.0 if small else 3.0)
    roof = roofs(timer)
    deadline = time.monotonic() + seconds
    rows = []
    for row in all_rows(device, small):
        if only.search(row.name):
            rows.append(_one(row, timer, roof, deadline))
            print(line(rows[-1]), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"roofs": roof, "rows": rows}


def _one(row: Row, timer: Timer, roof: dict[str, float], deadline: float) -> dict:
    floor = max(row.bytes / roof["copy_bytes_per_second"], row.flops / roof["bf16_flop_per_second"])
    result: dict = {"name": row.name, "bytes": row.bytes, "flops": row.flops, "floor_ms": floor * 1e3,
                    "bound": row.bound, "error": math.inf, "peers": {}}  # fmt: skip
    try:
        result["error"] = row.error()
        row.ours()
        if timer.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # the table goes on; the row says why, and the whole run fails
        result["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return result
    functions: dict[str, Callable[[], object]] = {"ours": row.ours}
    for name, make in row.peers.items():
        result["peers"][name] = _ready(make, timer, deadline)
        if callable(result["peers"][name]):
            functions[name] = result["peers"].pop(name)
    timings = timer.compare(functions, graph=row.graph)
    ours = timings.pop("ours")
    result.update(median_ms=ours.median * 1e3, best_ms=ours.best * 1e3, graph=ours.graph, share=floor / ours.median)
    for name, timing in timings.items():
        result["peers"][name] = {
            "median_ms": timing.median * 1e3, "best_ms": timing.best * 1e3, "ratio": timing.median / ours.median,
        }  # fmt: skip
    return result


def _ready(make: Callable[[], Callable[[], object]], timer: Timer, deadline: float) -> Callable[[], object] | str:
    """The peer, called once; or why it does not run."""
    if time.monotonic() > deadline:
        return "not run: out of time"
    try:
        with time_limit(PEER_SECONDS):
            peer = make()
            peer()
            if timer.device == "cuda":
                torch.cuda.synchronize()
        return peer
    except Exception as error:  # a missing or failing peer is a finding, not an end
        reason = str(error).strip().splitlines()
        return f"not run: {type(error).__name__}: {reason[0][:160] if reason else ''}"


def line(row: dict) -> str:
    """One row for the terminal."""
    if "failed" in row:
        return f"{row['name']}: FAILED: {row['failed']}"
    measured = {name: peer for name, peer in row["peers"].items() if isinstance(peer, dict)}
    best = min(measured, key=lambda name: measured[name]["median_ms"], default=None)
    against = f"{measured[best]['ratio']:6.2f}x {best}" if best else "      - no peer ran"
    wrong = "" if row["error"] <= row["bound"] else f"  ERROR {row['error']:.1e} > {row['bound']:.1e}"
    return f"{row['median_ms']:9.3f} ms  {row['share']:5.0%} of floor  {against}  {row['name']}{wrong}"


def show(table: dict) -> None:
    """The short table: median, share of the floor, ratio to the best peer."""
    copy, product = table["roofs"].values()
    print(
        f"copy {copy / 1e12:.2f} TB/s, bf16 products {product / 1e12:.0f} TFLOP/s; the floor of a row is the larger of "
        "its bytes and its products at these rates"
    )
    for row in table["rows"]:
        print(line(row))
