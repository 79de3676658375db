# SPDX-License-Identifier: MIT
"""Drawings to pixels: SVG by resvg, in a square on white; nothing that reaches outside the drawing."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import DataError
from ..augment import augment_image
from ..images import decode_image

# References to other files, scripts, text (whose look depends on the fonts that are installed) and entities.
_REFUSED = ("<image", "<text", "<script", "<style", "<foreignObject", "<!", "<?", "@import")
_MAX_BODY = 4 << 20


def resvg() -> Any:
    """The renderer.

    Raises:
        DataError: it is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("emoji-styles: resvg-py draws the pictures; pip install 'dalle_fast[styles]'") from error
    return resvg_py


def svg_of(icon: dict[str, Any], default: dict[str, Any], size: int, name: str) -> str:
    """An icon of Iconify's JSON as a square SVG of `size` pixels, its drawing centred.

    Raises:
        DataError: the drawing is no plain SVG.
    """
    body = icon.get("body")
    box = [icon.get(key, default.get(key, least)) for key, least in _BOX]
    if not isinstance(body, str) or len(body) > _MAX_BODY or not all(isinstance(x, (int, float)) for x in box):
        raise DataError(f"{name}: expected an icon of Iconify's JSON (body, left, top, width, height)")
    for word in _REFUSED:
        if word in body:
            raise DataError(f"{name}: the drawing has {word!r}, which is not read")
    if "href" in body and any(not part.startswith("#") for part in _targets(body)):
        raise DataError(f"{name}: the drawing refers to something outside of it")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{" ".join(map(str, box))}">{body}</svg>'
    )


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def _targets(body: str) -> list[str]:
    return [part.lstrip(" =\"'") for part in body.split("href")[1:]]


def draw_svg(svg: str, size: int, name: str) -> np.ndarray:
    """SVG text -> uint8 [size, size, 3] on white.

    Raises:
        DataError: it cannot be drawn, or resvg-py is missing.
    """
    renderer = resvg()
    try:
        png = bytes(renderer.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True))
    except ValueError as error:
        raise DataError(f"{name}: cannot be drawn ({error})") from error
    picture = decode_image(png, name)
    if picture.shape != (size, size, 3):
        raise DataError(f"{name}: drawn as {list(picture.shape)}, expected [{size}, {size}, 3]")
    return picture


def draw_picture(content: bytes, size: int, name: str) -> np.ndarray:
    """A picture file -> uint8 [size, size, 3] on white.

    Raises:
        DataError: see `decode_image`.
    """
    return augment_image(decode_image(content, name), size, "none")
