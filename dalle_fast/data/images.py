# SPDX-License-Identifier: MIT
"""Pictures from strangers: few formats, bounded size, always RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from ..files import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Bytes of a picture -> uint8 [H, W, 3].

    The first frame of an animation; transparency on white; palette, grey, 16-bit and CMYK become RGB; the camera's
    rotation is applied.

    Args:
        content: the file.
        name: file (and member) for messages.

    Raises:
        DataError: not a picture of FORMATS, cut off, or of more than 64 million pixels.
    """
    if len(content) > MAX_BYTES:
        raise DataError(f"{name}: {len(content)} bytes, expected at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is an error here
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS}")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: not a picture (expected {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: too many pixels, expected at most {MAX_PIXELS}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly everything: SyntaxError, struct.error, zlib.error, ...
        raise DataError(f"{name}: the picture is damaged ({' '.join(str(error).split())[:300]})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bit grey: Pillow's convert would clip it
        grey = np.asarray(image).astype(np.float64)
        grey = (grey / 257).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.array(image.convert("RGB"))


def read_image(path: Path | str) -> np.ndarray:
    """A picture file -> uint8 [H, W, 3].

    Raises:
        DataError: missing, or see `decode_image`.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return decode_image(content, str(path))
