# SPDX-License-Identifier: MIT
"""A result as a self-contained HTML page: bars of floor, ours and peers, curves of what grows, the cost of a call."""

from __future__ import annotations

import math
from html import escape

_STYLE = """body{font:14px system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}h1{font-size:1.4em}
td{padding:2px 8px;vertical-align:middle}td.n{text-align:right;font-variant-numeric:tabular-nums}
div.b{height:12px;border-radius:2px;background:#9aa7b4}div.ours{background:#2b7a4b}div.floor{background:#d9b44a}
tr.row td{padding-top:12px;font-weight:600}.bad{color:#a00}small{color:#666}
figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}figcaption{max-width:320px;font-size:13px}"""
_COLORS = ("#2b7a4b", "#7a8896", "#c0803a", "#7d5ba6", "#3b7fb5")  # ours first
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 200, 48, 36, 8


def page(report: dict) -> str:
    """The page of a result."""
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in report["machine"].items())
    table = report["table"]
    peaks = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in table["peaks"].items())
    peaks += f" ({table['peaks_source']})" if "peaks_source" in table else ""
    legend = (
        "Medians; all of a row in one run, interleaved, each checked against float64. The floor is the larger of bytes "
        f"and products at what this machine does at best: {peaks}. A ratio above 1: we are faster. Cold: with emptied "
        "caches, where that differs. Memory: the most that a call holds beyond its arguments."
    )
    body = "".join(_bars(row) for row in table["rows"])
    sections = f"<p>{escape(legend)}</p><table>{body}</table>" if table["rows"] else ""
    if curves := report.get("scaling"):
        sections += f"<h1>As sizes grow</h1>{''.join(map(chart, curves))}"
    if calls := report.get("overhead"):
        lines = "".join(
            f'<tr><td>{escape(row["name"])}</td><td class="n">{row["ours_us"]:.1f}</td>'
            f"<td>{escape(', '.join(f'{name} {us:.1f}' for name, us in row['peers'].items()))}</td></tr>"
            for row in calls
        )
        sections += f"<h1>Microseconds of a call at the smallest size</h1><table>{lines}</table>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>dalle_fast benchmarks</title>'
        f"<style>{_STYLE}</style><h1>dalle_fast benchmarks, {escape(report['date'][:10])}</h1>"
        f"<table>{facts}</table>{sections}</html>\n"
    )


def why_not_timed(row: dict) -> str:
    """Of a row without times: what failed, or why it was not run."""
    return f"failed: {row['failed']}" if "failed" in row else row["skipped"]


def _bars(row: dict) -> str:
    """The floor, ours and each peer of a row on one scale."""
    title = escape(row["name"])
    if "median_ms" not in row:
        return f'<tr class="row"><td colspan="5" class="bad">{title}: {escape(why_not_timed(row))}</td></tr>'
    wrong = "" if row["error"] <= row["bound"] else ' <span class="bad">wrong</span>'
    note = f"error {row['error']:.1e} (bound {row['bound']:.1e}), {row['bytes'] / 1e6:.1f} MB"
    if row["flops"]:
        note += f", {row['flops'] / 1e9:.2f} GFLOP"
    body = [f'<tr class="row"><td colspan="5">{title}{wrong} <small>{note}</small></td></tr>']
    bars = [("floor", {"median_ms": row["floor_ms"]}, "floor", ""), ("dalle_fast", row, "ours", f"{row['share']:.0%}")]
    missing = []
    for name, peer in row["peers"].items():
        if isinstance(peer, dict):
            bars.append((name, peer, "", f"{peer['ratio']:.2f}x"))
        else:
            missing.append(f"{name}: {peer}")
    longest = max(bar["median_ms"] for _, bar, _, _ in bars)
    for name, bar, kind, ratio in bars:
        width = max(0.3, 100 * bar["median_ms"] / longest) if math.isfinite(bar["median_ms"]) else 100
        more = [f"cold {bar['cold_ms']:.3f} ms"] if "cold_ms" in bar else []
        more += [f"{bar['memory_mb']:.1f} MB"] if "memory_mb" in bar else []
        more += [bar["note"]] if "note" in bar else []
        body.append(
            f'<tr><td>{escape(name)}</td><td class="n">{bar["median_ms"]:.3f} ms</td><td class="n">{ratio}</td>'
            f'<td style="width:45%"><div class="b {kind}" style="width:{width:.1f}%"></div></td>'
            f"<td><small>{escape(', '.join(more))}</small></td></tr>"
        )
    body += [f'<tr><td colspan="5"><small>{escape(text)}</small></td></tr>' for text in missing]
    return "".join(body)


def chart(curve: dict) -> str:
    """One curve as an SVG figure: milliseconds against what grows, both axes logarithmic, a line for ours and peers."""
    points = curve["points"]
    lines = {"dalle_fast": [(p["x"], p["ours_ms"]) for p in points]}
    for name in dict.fromkeys(name for p in points for name in p["peers"]):
        lines[name] = [(p["x"], p["peers"][name]) for p in points if name in p["peers"]]
    xs = [p["x"] for p in points]
    ys = [y for line in lines.values() for _, y in line]
    place_x = _scale(min(xs), max(xs), LEFT, WIDTH - 8)
    place_y = _scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    marks = []
    for x in xs:
        marks.append(f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_short(x)}</text>')
    for y in sorted({min(ys), max(ys)}):
        marks.append(f'<text x="{LEFT - 4}" y="{place_y(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    keys = []
    for i, (name, line) in enumerate(lines.items()):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line)
        marks.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{2.5 if i == 0 else 1.5}"/>'
        )
        marks += [f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2" fill="{color}"/>' for x, y in line]
        keys.append(f'<span style="color:{color}">&#9632;</span> {escape(name)}')
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" font-size="10" role="img">'
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 8}" fill="none" stroke="#999"/>{"".join(marks)}'
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(curve["unit"])} (ms up)</text>'
        f"</svg><figcaption>{escape(curve['name'])}<br/><small>{' '.join(keys)}</small></figcaption></figure>"
    )


def _scale(low: float, high: float, start: float, end: float):
    """A logarithmic axis from `low` at `start` to `high` at `end`."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _short(number: float) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return f"{number}"
