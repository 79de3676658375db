# SPDX-License-Identifier: MIT
"""One HTML file with everything in it: samples beside originals, reconstructions, curves, numbers."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..models.store import write_atomic
from ..sample import contact_sheet
from ..train.report import read_lines
from .metrics import Evaluation

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h2{margin-top:2.2rem;font-size:1.25rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse}td,th{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #eee}
td.n{text-align:right;font-variant-numeric:tabular-nums}img.p{width:72px;height:72px;image-rendering:pixelated;margin:1px}
img.o{outline:2px solid #888}.c{max-width:17rem}.s{color:#777;font-size:.8rem;display:block;text-align:center}
figure{display:inline-block;margin:0 2px 4px;vertical-align:top}.y{color:#197a2f}.w{color:#b3261e}
.chart{max-width:100%}code{background:#f4f4f4;padding:.1rem .3rem}
"""
_LABELS = {"seen": "Seen combinations", "heldout": "Held-out combinations, never in training"}
_JUDGED = {"kind": "kind (person or activity)", "tone": "skin tone", "style": "style", "all": "all at once"}


def _png(picture: np.ndarray | Image.Image) -> str:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(
    picture: np.ndarray, note: str = "", original: bool = False, verdict: dict[str, bool] | None = None
) -> str:
    kind = "p o" if original else "p"
    note = f'<span class="s">{html.escape(note)}</span>' if note else ""
    for label, right in (verdict or {}).items():
        note += f'<span class="s {"y" if right else "w"}">{"✓" if right else "✗"} {html.escape(label)}</span>'
    return f'<figure><img class="{kind}" src="{_png(picture)}" alt="">{note}</figure>'


def _chart(
    title: str, curves: dict[str, tuple[Sequence[float], Sequence[float]]], ylabel: str, log: bool = False
) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.1), layout="constrained")
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(x) < 12 else None, markersize=3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("candidates N" if log else "update", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if log:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="chart" src="data:image/svg+xml;base64,{data}" alt="{html.escape(title)}">'


def _curves(run_dir: Path) -> list[str]:
    charts = []
    wanted = {
        "dvae": ("dVAE", {"nll": "nll", "eval/mse": "held-out mse"}),
        "clip": ("CLIP", {"loss": "loss", "eval/retrieval": "held-out retrieval"}),
        "dalle": (
            "transformer",
            {"image_loss": "image", "eval/seen_image_loss": "seen", "eval/heldout_image_loss": "held out"},
        ),
    }
    for stage, (title, names) in wanted.items():
        lines = read_lines(run_dir / stage / "metrics.jsonl")
        curves = {}
        for key, label in names.items():
            points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
            if points:
                curves[label] = ([p[0] for p in points], [p[1] for p in points])
        if stage != "dalle":  # quantities of different scales get charts of their own
            charts += [_chart(f"{title}: {label}", {label: curve}, label) for label, curve in curves.items()]
        elif curves:
            charts.append(_chart(f"{title}: image-token loss", curves, "nats per token"))
    return charts


def verdict_of(verdicts: dict[str, np.ndarray], row: int, rank: int) -> dict[str, bool]:
    """label -> right? of a sample; without the sum of them."""
    return {label: bool(values[row, rank]) for label, values in verdicts.items() if label != "all"}


def judged_labels(numbers: dict[str, Any]) -> list[str]:
    """What a judge has looked at in a split's numbers: "kind", "tone", "all"."""
    return [key.removesuffix("_best_of") for key in numbers if f"{key.removesuffix('_best_of')}_by_chance" in numbers]


def judge_table(numbers: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the first a head: what the judge says, beside chance and ceilings; empty without a judge."""
    rows = []
    for split in _LABELS:
        n = numbers.get(split, {})
        for label in judged_labels(n):
            best = n[f"{label}_best_of"]
            if not rows:
                rows.append(
                    ["", "share right", *(f"best of {k}" for k in best), "chance", "dVAE's ceiling", "originals"]
                )
            values = [*best.values(), *(n[f"{label}_{c}"] for c in ("by_chance", "of_reconstructions", "of_originals"))]
            rows.append(
                [split.replace("heldout", "held out"), _JUDGED.get(label, label), *(f"{v:.2f}" for v in values)]
            )
    return rows


def judge_lines(numbers: dict[str, Any]) -> list[str]:
    """`judge_table` in columns for a terminal."""
    rows = judge_table(numbers)
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))] if rows else []
    return [
        "    " + "  ".join(f"{cell:<{w}}" if c < 2 else f"{cell:>{w}}" for c, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]


def _judge_table_html(numbers: dict[str, Any]) -> str:
    head, *rows = judge_table(numbers) or [[]]
    if not rows:
        return ""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    for row in rows:
        words, shares = row[:2], row[2:]
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in words)
        lines.append(cells + "".join(f'<td class="n">{cell}</td>' for cell in shares))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _judge_section(numbers: dict[str, Any]) -> str:
    table = _judge_table_html(numbers)
    if not table:
        return ""
    return (
        f"<h2>Right or wrong</h2>{table}<p>A sample shows what its nearest original among all emoji of all tones shows "
        "(averages of 8 x 8 squares; nothing of it is trained). Best of N: the one that CLIP ranks first. Chance: the "
        "same pictures judged against the captions of others. Ceiling: originals encoded and decoded by the dVAE. At "
        f"most {numbers['options']['num_captions']} captions of each split.</p>"
    )


def _table(numbers: dict[str, Any]) -> str:
    splits = [split for split in _LABELS if split in numbers]
    rows: dict[str, dict[str, Any]] = {}
    for split in splits:
        for key, value in numbers[split].items():
            if isinstance(value, dict):
                for n, v in value.items():
                    rows.setdefault(f"{key} {n}", {})[split] = v
            else:
                rows.setdefault(key, {})[split] = value
    head = "".join(f"<th>{html.escape(_LABELS[split])}</th>" for split in splits)
    body = "".join(
        f"<tr><td>{html.escape(key.replace('_', ' '))}</td>"
        + "".join(f'<td class="n">{values.get(s, ""):.4g}</td>' if s in values else "<td></td>" for s in splits)
        + "</tr>"
        for key, values in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _sample_rows(
    rows: list[tuple[str, np.ndarray, np.ndarray, list[float]]], verdicts: dict[str, np.ndarray], limit: int
) -> str:
    parts = ["<table><tr><th>Caption</th><th>Original</th><th>Samples, best first (score)</th></tr>"]
    for row, (caption, original, images, scores) in enumerate(rows[:limit]):
        notes = [f"{score:.2f}" for score in scores] or [""] * len(images)
        pictures = "".join(
            _picture(image, note, verdict=verdict_of(verdicts, row, rank))
            for rank, (image, note) in enumerate(zip(images[:8], notes))
        )
        cells = f'<td class="c">{html.escape(caption)}</td><td>{_picture(original, original=True)}</td>'
        parts.append(f"<tr>{cells}<td>{pictures}</td></tr>")
    return "".join(parts) + "</table>"


def sample_sheet(evaluation: Evaluation, split: str, num_rows: int = 12, num_samples: int = 6) -> Image.Image:
    """Originals beside the best samples of a split; under each sample what the judge finds right, if there is one."""
    rows, verdicts = evaluation.samples[split][:num_rows], evaluation.verdicts.get(split, {})
    shown = min(num_samples, max(len(images) for _, _, images, _ in rows))
    marks = [
        ["", *(" ".join(label for label, right in verdict_of(verdicts, r, i).items() if right) for i in range(shown))]
        for r in range(len(rows))
    ]
    return contact_sheet(
        [[original, *images[:shown]] for _, original, images, _ in rows],
        [caption for caption, *_ in rows],
        headers=["original"] + [f"sample {i + 1}" for i in range(shown)],
        side=72,
        marks=marks if verdicts else (),
    )


def write_report(
    evaluation: Evaluation,
    run_dir: Path | str,
    *,
    title: str = "dalle_fast report",
    beside: tuple[str, Evaluation] | None = None,
) -> dict[str, Path]:
    """Writes `report.html`, `evaluation.json`, `heldout.png`, `seen.png` and `reconstructions.png` into a run folder.

    Args:
        evaluation: what to show.
        run_dir: the folder; curves come from the runs in it.
        title: of the page.
        beside: (what it is, evaluation) of another system, shown in a section of its own under that name.

    Returns:
        name -> path of each file.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    numbers = evaluation.numbers
    paths = {"json": run_dir / "evaluation.json"}
    write_atomic(paths["json"], json.dumps(numbers, indent=1).encode())
    source = numbers.get("source", "")
    sections = [f"<h1>{html.escape(title)}</h1><p>Data: <code>{html.escape(str(source))}</code></p>"]
    for split in ("heldout", "seen"):
        if split in evaluation.samples:
            rows, verdicts = evaluation.samples[split], evaluation.verdicts.get(split, {})
            sections.append(f"<h2>{_LABELS[split]}: samples</h2>{_sample_rows(rows, verdicts, 24)}")
            paths[split] = run_dir / f"{split}.png"
            sample_sheet(evaluation, split).save(paths[split])
    sections.append(_judge_section(numbers))
    if beside is not None:
        name, other = beside
        sections.append(f"<h2>For comparison: {html.escape(name)}</h2>")
        for split, rows in other.samples.items():
            sections.append(_sample_rows(rows, other.verdicts.get(split, {}), 6))
        sections.append(_judge_table_html(other.numbers))
    sections.append(f"<h2>Numbers</h2>{_table(numbers)}")
    curves = {
        split: ([int(n) for n in numbers[split]["clip_best_of"]], list(numbers[split]["clip_best_of"].values()))
        for split in _LABELS
        if "clip_best_of" in numbers.get(split, {})
    }
    charts = _curves(run_dir)
    for split in _LABELS:
        best = {label: numbers[split][f"{label}_best_of"] for label in judged_labels(numbers.get(split, {}))}
        if best:
            shares = {_JUDGED.get(k, k): ([int(n) for n in b], list(b.values())) for k, b in best.items()}
            charts.append(_chart(f"Right, best of N: {_LABELS[split].split()[0].lower()}", shares, "share", log=True))
    if curves:
        charts.append(_chart("Score of the best of N", curves, "cosine similarity", log=True))
    if charts:
        sections.append("<h2>Curves</h2>" + "".join(charts))
    for split, (originals, decoded, captions) in evaluation.reconstructions.items():
        pairs = "".join(
            f'<figure title="{html.escape(c)}"><img class="p o" src="{_png(a)}" alt=""><br>'
            f'<img class="p" src="{_png(b)}" alt=""></figure>'
            for a, b, c in zip(originals, decoded, captions)
        )
        sections.append(f"<h2>{_LABELS[split]}: pictures and what the dVAE keeps of them</h2>{pairs}")
    if "heldout" in evaluation.reconstructions:
        originals, decoded, _ = evaluation.reconstructions["heldout"]
        paths["reconstructions"] = run_dir / "reconstructions.png"
        contact_sheet([list(originals), list(decoded)], ["held-out pictures", "reconstructed"], side=72).save(
            paths["reconstructions"]
        )
    if source == "emoji":
        sections.append("<p>Emoji art: Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0.</p>")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    page += f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>"
    paths["report"] = run_dir / "report.html"
    write_atomic(paths["report"], page.encode())
    return paths
