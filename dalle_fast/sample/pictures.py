# SPDX-License-Identifier: MIT
"""Results as people look at them: contact sheets, PNG and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError

if TYPE_CHECKING:
    from .system import SampleResult


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] floating in [0, 1] -> [B, H, W, 3] uint8, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow brings it; sizes need FreeType, which its wheels have


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.ImageFont, max_lines: int) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font=font) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] += " ..."
    return lines


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    *,
    headers: Sequence[str] = (),
    side: int = 96,
    marks: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Pictures in rows, each row beside its caption.

    Args:
        rows: rows of uint8 [H, W, 3] pictures; rows may differ in length.
        captions: one per row.
        headers: column titles, or none.
        side: pixels each picture is drawn at; small pictures grow without smoothing.
        marks: short texts under the pictures (scores), or none.

    Raises:
        ValueError: rows and captions differ in number, or there are none.
    """
    if not rows or len(rows) != len(captions):
        raise ValueError(f"captions: expected one for each of {len(rows)} rows, got {len(captions)}")
    font, small = _font(13), _font(10)
    gap, text_width, mark_height = 6, 190, 14 if marks else 0
    columns = max(len(row) for row in rows)
    top = 24 if headers else gap
    cell = side + gap
    sheet = Image.new("RGB", (text_width + columns * cell + gap, top + len(rows) * (cell + mark_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, header in enumerate(headers):
        draw.text((text_width + c * cell, 6), header, fill="black", font=small)
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + r * (cell + mark_height)
        for i, line in enumerate(_wrap(draw, caption, text_width - 2 * gap, font, max(side // 16, 1))):
            draw.text((gap, y + 2 + i * 16), line, fill="black", font=font)
        for c, picture in enumerate(row):
            filter_ = Image.Resampling.NEAREST if picture.shape[0] <= side else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(picture).resize((side, side), filter_), (text_width + c * cell, y))
            if marks and c < len(marks[r]):
                draw.text((text_width + c * cell, y + side + 1), marks[r][c], fill="dimgray", font=small)
    return sheet


def file_stem(text: str, limit: int = 60) -> str:
    """A caption as a harmless file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].strip("-") or "caption"


def save_result(result: SampleResult, folder: Path | str) -> dict[str, Path]:
    """Writes each picture, a contact sheet and a JSON record (caption, options, rank, score, seed, tokens, file, and
    the system where it is one of the package).

    Returns:
        {"sheet": ..., "json": ...} paths.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    stem = file_stem(result.caption)
    records = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, picture in enumerate(result.images):
            name = f"{stem}-{rank:03d}.png"
            Image.fromarray(picture).save(folder / name)
            records.append(
                {
                    "rank": rank,
                    "file": name,
                    "seed": result.options.seed,
                    "sample": int(result.order[rank]),
                    "score": None if result.scores is None else float(result.scores[rank]),
                    "tokens": result.tokens[rank].tolist(),
                }
            )
        marks = [] if result.scores is None else [[f"{score:.3f}" for score in result.scores.tolist()]]
        sheet_path, json_path = folder / f"{stem}.png", folder / f"{stem}.json"
        headers = [result.system] if result.system else []
        contact_sheet([list(result.images)], [result.caption], headers=headers, marks=marks).save(sheet_path)
        record = {"caption": result.caption, "options": asdict(result.options), "samples": records}
        if result.system:
            record["system"] = result.system
        json_path.write_text(json.dumps(record, indent=1, ensure_ascii=False))
    except OSError as error:
        raise UserError(f"{folder}: the pictures could not be written ({error.strerror or error})") from error
    return {"sheet": sheet_path, "json": json_path}
