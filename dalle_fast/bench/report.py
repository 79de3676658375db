# SPDX-License-Identifier: MIT
"""Results on disk and on paper: JSON, a self-contained HTML page with bars, a comparison, a check against a record."""

from __future__ import annotations

import datetime
import html
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

ALLOWED = 0.7  # of a recorded ratio: what is below is a loss and no noise


class BenchError(UserError):
    """A result file that cannot be read or compared."""


def machine() -> dict[str, Any]:
    """What a figure has to be read with."""
    from ..ops import _backend

    level = _backend._C.cpu_level() if _backend._C else None
    return {
        "device": _cpu_name(),
        "cpu_level": {0: "portable", 3: "AVX2", 4: "AVX-512", 5: "AVX-512 with BF16", 6: "AMX"}.get(level),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def save(table: dict, folder: Path, facts: dict[str, Any], **more: Any) -> Path:
    """Writes `<date>-<machine>-<commit>.json`, with `more` in it, and the page beside it; returns the JSON's path."""
    now = datetime.datetime.now().astimezone()
    report = {"date": now.isoformat(timespec="seconds"), "machine": facts, **more, "table": table}
    name = "".join(c if c.isalnum() else "-" for c in facts["device"].replace("NVIDIA ", "").lower()).strip("-")
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
        report = json.loads(Path(path).read_text())
        report["table"]["rows"], report["machine"]["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not a benchmark result ({type(error).__name__}: {error})") from None
    return report


def _ratios(report: dict) -> dict[tuple[str, str], float]:
    return {
        (row["name"], name): peer["ratio"]
        for row in report["table"]["rows"]
        for name, peer in row["peers"].items()
        if isinstance(peer, dict)
    }


def compare(before: dict, after: dict) -> str:
    """Rows of both results: time and ratio then and now."""
    then = {row["name"]: row for row in before["table"]["rows"] if "median_ms" in row}
    old, new = _ratios(before), _ratios(after)
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


def losses(record: dict, now: dict) -> list[str]:
    """Ratios that fell under `ALLOWED` of what is recorded. Only of the same kind of machine: elsewhere they differ.

    Raises:
        BenchError: the record is of another machine.
    """
    for name in ("device", "cpu_level", "threads"):
        if record["machine"].get(name) != now["machine"].get(name):
            raise BenchError(
                f"the record is of {name} {record['machine'].get(name)!r}, this machine has "
                f"{now['machine'].get(name)!r}: ratios cannot be compared"
            )
    recorded = _ratios(record)
    return [
        f"{row} against {peer}: {ratio:.2f}, recorded {recorded[row, peer]:.2f}"
        for (row, peer), ratio in _ratios(now).items()
        if ratio < ALLOWED * recorded.get((row, peer), 0.0)
    ]


def markdown(report: dict) -> str:
    """The table for a document: ours, floor, and every peer with its ratio."""
    lines = ["| row | ours, ms | of the floor | peer | peer, ms | ratio |", "|---|---|---|---|---|---|"]
    for row in report["table"]["rows"]:
        if "median_ms" not in row:
            lines.append(f"| {row['name']} | failed: {row['failed']} | | | | |")
            continue
        start = f"| {row['name']} | {row['median_ms']:.3f} | {row['share']:.0%} |"
        peers = [(n, p) for n, p in row["peers"].items() if isinstance(p, dict)]
        lines += [f"{start} {n} | {p['median_ms']:.3f} | {p['ratio']:.2f} |" for n, p in peers] or [f"{start} | | |"]
    return "\n".join(lines)


_STYLE = """body{font:14px system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}h1{font-size:1.4em}
td{padding:2px 8px;vertical-align:middle}td.n{text-align:right;font-variant-numeric:tabular-nums}
div.b{height:12px;border-radius:2px;background:#9aa7b4}div.ours{background:#2b7a4b}div.floor{background:#d9b44a}
tr.row td{padding-top:12px;font-weight:600}.bad{color:#a00}small{color:#666}"""


def page(report: dict) -> str:
    """A self-contained HTML page: bars of the floor, ours and each peer, on one scale a row."""
    facts = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
                    for k, v in report["machine"].items())  # fmt: skip
    body = []
    for row in report["table"]["rows"]:
        title = html.escape(row["name"])
        if "median_ms" not in row:
            body.append(f'<tr class="row"><td colspan="4" class="bad">{title}: {html.escape(row["failed"])}</td></tr>')
            continue
        wrong = "" if row["error"] <= row["bound"] else ' <span class="bad">wrong</span>'
        note = f"error {row['error']:.1e} (bound {row['bound']:.1e}), {row['bytes'] / 1e6:.1f} MB"
        if row["flops"]:
            note += f", {row['flops'] / 1e9:.2f} GFLOP"
        body.append(f'<tr class="row"><td colspan="4">{title}{wrong} <small>{note}</small></td></tr>')
        bars = [
            ("floor", row["floor_ms"], "floor", ""),
            ("dalle_fast", row["median_ms"], "ours", f"{row['share']:.0%}"),
        ]
        missing = []
        for name, peer in row["peers"].items():
            if isinstance(peer, dict):
                bars.append((name, peer["median_ms"], "", f"{peer['ratio']:.2f}x"))
            else:
                missing.append(f"{name}: {peer}")
        longest = max(ms for _, ms, _, _ in bars)
        for name, ms, kind, ratio in bars:
            width = max(0.3, 100 * ms / longest) if math.isfinite(ms) else 100
            body.append(
                f'<tr><td>{html.escape(name)}</td><td class="n">{ms:.3f} ms</td><td class="n">{ratio}</td>'
                f'<td style="width:50%"><div class="b {kind}" style="width:{width:.1f}%"></div></td></tr>'
            )
        body += [f'<tr><td colspan="4"><small>{html.escape(text)}</small></td></tr>' for text in missing]
    roofs = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in report["table"]["roofs"].items())
    legend = (
        "Medians; all of a row in one run, interleaved, each checked against float64. The floor is the larger of bytes "
        f"and products at what this machine does at best: {roofs}. A ratio above 1: we are faster."
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>dalle_fast benchmarks</title>'
        f"<style>{_STYLE}</style><h1>dalle_fast benchmarks, {html.escape(report['date'][:10])}</h1>"
        f"<table>{facts}</table><p>{html.escape(legend)}</p><table>{''.join(body)}</table></html>\n"
    )
