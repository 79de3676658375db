# SPDX-License-Identifier: MIT
"""Results on disk and on paper: JSON, tables for documents, a comparison of two."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import parse_json, read_bytes
from .form import wrong_in
from .page import page, why_not_timed
from .peak_rates import LEVELS, cpu_name


class BenchError(UserError):
    """A result file that cannot be read or compared, or rows that are wrong, each on a line."""

    one_line = False


def machine() -> dict[str, Any]:
    """What a figure has to be read with."""
    from ..ops import _backend

    level = _backend._C.cpu_level() if _backend._C else None
    return {
        "device": cpu_name(),
        "cpu_level": {0: "portable", 3: "AVX2", 4: "AVX-512", 5: "AVX-512 with BF16", 6: "AMX"}.get(level),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
        **({"limited_by": limits} if (limits := {k: os.environ[k] for k in LEVELS if os.environ.get(k)}) else {}),
    }


def commit() -> str:
    """Of the working tree that this runs from; "unknown" where there is none."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def save(table: dict, folder: Path, facts: dict[str, Any], **more: Any) -> Path:
    """Writes `<date>-<machine>-<commit>.json`, with `more` in it, and the page beside it; returns the JSON's path.

    The name of a processor that was limited to an older one's instructions ends in their name.
    """
    now = datetime.datetime.now().astimezone()
    report = {"date": now.isoformat(timespec="seconds"), "machine": facts, **more, "table": table}
    words = facts["device"].replace("NVIDIA ", "").replace("(R)", "")
    if "limited_by" in facts:
        words += f" {facts['cpu_level']}"
    name = "-".join(re.findall("[a-z0-9]+", words.lower()))
    path = folder / f"{now:%Y-%m-%d}-{name}-{facts['commit'][:10]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".html").write_text(page(report))
    return path


def load(path: str | Path) -> dict:
    """A saved report.

    Raises:
        BenchError: no such file, or it holds no benchmark.
    """
    try:
        report = parse_json(read_bytes(path))
    except OSError as error:
        raise BenchError(f"{path}: not a benchmark result ({error.strerror or error})") from None
    except ValueError as error:
        raise BenchError(f"{path}: not a benchmark result (not JSON: {error})") from None
    if wrong := wrong_in(report):
        raise BenchError(f"{path}: not a benchmark result ({wrong})")
    if "roofs" in report["table"]:  # as results before December 2026 call them
        report["table"]["peaks"] = report["table"].pop("roofs")
    return report


def ratios_of(report: dict) -> dict[tuple[str, str], float]:
    """(row, peer) -> how many times as long the peer takes."""
    return {
        (row["name"], name): peer["ratio"]
        for row in report["table"]["rows"]
        for name, peer in row["peers"].items()
        if isinstance(peer, dict)
    }


def compare(before: dict, after: dict) -> str:
    """Rows of both results: time and ratio then and now."""
    then = {row["name"]: row for row in before["table"]["rows"] if "median_ms" in row}
    old, new = ratios_of(before), ratios_of(after)
    lines = [f"{'before, ms':>12} {'after, ms':>12} {'faster':>7}   row (ratio to each peer before -> after)"]
    for row in after["table"]["rows"]:
        if row["name"] not in then or "median_ms" not in row:
            continue
        a, b = then[row["name"]]["median_ms"], row["median_ms"]
        peers = [f"{p}: {old[n, p]:.2f} -> {r:.2f}" for (n, p), r in new.items() if n == row["name"] and (n, p) in old]
        lines.append(f"{a:12.3f} {b:12.3f} {a / b:6.2f}x   {row['name']}  {'; '.join(peers)}")
    if len(lines) == 1:
        lines.append("no row is in both")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """All of a result for a document: every peer of every row, then the cost of a call."""
    lines = [
        "| row | ours, ms | cold | of the floor | memory, MB | peer | peer, ms | cold | memory, MB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["table"]["rows"]:
        if "median_ms" not in row:
            lines.append(f"| {row['name']} | {why_not_timed(row)} | | | | | | | | |")
            continue
        start = f"| {row['name']} | {row['median_ms']:.3f} | {_cold(row)} | {row['share']:.0%} | {_memory(row)} |"
        peers = [(name, peer) for name, peer in row["peers"].items() if isinstance(peer, dict)]
        for name, peer in peers:
            note = f" ({peer['note']})" if "note" in peer else ""
            figures = f"{peer['median_ms']:.3f} | {_cold(peer)} | {_memory(peer)} | {peer['ratio']:.2f}"
            lines.append(f"{start} {name}{note} | {figures} |")
        if not peers:
            lines.append(f"{start} | | | | |")
    if calls := report.get("overhead"):
        lines += ["", "| call at the smallest size | ours, µs | torch, µs |", "|---|---|---|"]
        for row in calls:
            peers = ", ".join(f"{name} {us:.1f}" for name, us in row["peers"].items())
            lines.append(f"| {row['name']} | {row['ours_us']:.1f} | {peers} |")
    return "\n".join(lines)


def _cold(figures: dict) -> str:
    return f"{figures['cold_ms']:.3f}" if "cold_ms" in figures else ""


def _memory(figures: dict) -> str:
    return f"{figures['memory_mb']:.1f}" if "memory_mb" in figures else ""


_OPS = {"text": "loss of two vocabularies", "DALLE": "DALLE training step", "dVAE": "dVAE training step"}


def summary(reports: list[dict]) -> str:
    """One line an op for a README, the columns of each result side by side.

    A range is over all sizes and dtypes of an op, of what the fastest peer of a row takes as a multiple of ours.
    """
    titles = [title(report) for report in reports]
    found: dict[str, list[dict[str, list]]] = {}
    for i, report in enumerate(reports):
        for row in report["table"]["rows"]:
            fastest = _fastest_peer(row)
            if fastest is None:
                continue
            word = row["name"].split()[0]
            op = found.setdefault(
                _OPS.get(word, f"`{word}`"), [{"forward": [], "whole": [], "share": []} for _ in titles]
            )
            op[i]["forward" if row["name"].endswith(" forward") else "whole"].append(row["peers"][fastest]["ratio"])
            op[i]["share"].append(row["share"])
    heads = [
        f"{name}{', ' + t if len(titles) > 1 else ''}" for t in titles for name in ("forward", "whole", "of the floor")
    ]
    lines = [f"| op | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for op, of in found.items():
        cells = [
            _range(one[key], form)
            for one in of
            for key, form in (("forward", ".1f"), ("whole", ".1f"), ("share", ".0%"))
        ]
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


def side_by_side(reports: list[dict]) -> str:
    """Every row of several results: time, share of the floor, and the ratio of the fastest peer with its name."""
    heads = " | ".join(f"{title(report)}: ms | of the floor | fastest peer" for report in reports)
    lines = [f"| row | {heads} |", "|---" * (1 + 3 * len(reports)) + "|"]
    tables = [{row["name"]: row for row in report["table"]["rows"]} for report in reports]
    for name in dict.fromkeys(name for table in tables for name in table):
        cells = []
        for table in tables:
            row = table.get(name, {})
            if "median_ms" not in row:
                cells += ["", "", ""]
                continue
            fastest = _fastest_peer(row)
            peer = "" if fastest is None else f"{row['peers'][fastest]['ratio']:.2f} {fastest}"
            cells += [f"{row['median_ms']:.3f}", f"{row['share']:.0%}", peer]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def title(report: dict) -> str:
    """What a column of a result is called: the processor's instructions, and whether it was limited to them."""
    machine = report["machine"]
    return f"{machine.get('cpu_level', machine['device'])}{' (limited)' if 'limited_by' in machine else ''}"


def _fastest_peer(row: dict) -> str | None:
    peers = {name: peer["ratio"] for name, peer in row["peers"].items() if isinstance(peer, dict)}
    return min(peers, key=peers.get) if peers and "median_ms" in row else None


def _range(values: list[float], form: str) -> str:
    if not values:
        return ""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
