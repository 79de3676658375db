# SPDX-License-Identifier: MIT
"""Where the drawings of `emoji-styles` come from: npm packages, fetched by npm, read in place and never unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files import cache_folder, parse_json
from ..images import MAX_BYTES

MAX_MEMBER_BYTES = 256 << 20
_TIMEOUT = 600.0  # seconds for one package; the largest has 16 MB


@dataclass(frozen=True)
class Package:
    """An npm package of drawings."""

    name: str
    version: str
    file: str
    """What `npm pack` calls it."""
    sha256: str
    """Of that file; a version never changes."""
    style: str
    """Which drawings it holds, a key of `STYLES`."""


PACKAGES = (
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "flat",
    ),
    Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "iconify-json-fluent-emoji-1.2.7.tgz",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "shaded",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "3d",
    ),
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "noto",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "iconify-json-emojione-1.2.3.tgz",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "emojione",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "iconify-json-fxemoji-1.2.2.tgz",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "fx",
    ),
)


def data_folder() -> Path:
    """Where packages and pictures are kept: $DALLE_FAST_DATA, else a folder of the user's cache."""
    chosen = os.environ.get("DALLE_FAST_DATA")
    return (Path(chosen) if chosen else cache_folder()) / "emoji-styles"


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`; `npm pack` brings it there when it is missing.

    Raises:
        DataError: npm is missing or fails, or the file is not the one that is expected.
    """
    path = folder / package.file
    if not path.exists():
        _npm_pack(package, folder)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if found != package.sha256:
        raise DataError(f"{path}: its SHA-256 is not that of {package.name} {package.version}; delete it and try again")
    return path


def _npm_pack(package: Package, folder: Path) -> None:
    wanted = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"emoji-styles: npm fetches the drawings and is not installed (Debian: apt install npm); or put the file "
            f"that `npm pack {wanted}` writes elsewhere into {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as aside:
            done = subprocess.run(
                [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", aside, wanted],
                cwd=aside,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
            made = Path(aside) / package.file
            if done.returncode or not made.exists():
                last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
                raise DataError(f"emoji-styles: `npm pack {wanted}` failed ({last}); is there a network?")
            os.replace(made, folder / package.file)
    except subprocess.TimeoutExpired:
        raise DataError(f"emoji-styles: `npm pack {wanted}` took more than {_TIMEOUT:.0f} s") from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """A package file.

    Raises:
        DataError: it is damaged.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            yield archive
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole .tgz file ({error})") from error


def members(path: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(stem, content) of the plain files `package/<folder>/*<suffix>`, in the archive's order.

    Raises:
        DataError: the archive is damaged, or a file is larger than a picture may be.
    """
    prefix = f"package/{folder}/"
    with opened(path) as archive:
        for member in archive:
            stem = member.name.removeprefix(prefix).removesuffix(suffix)
            if not member.isreg() or member.name != f"{prefix}{stem}{suffix}" or "/" in stem:
                continue
            if member.size > MAX_BYTES:
                raise DataError(f"{path}:{member.name}: {member.size} bytes, expected at most {MAX_BYTES}")
            yield stem, archive.extractfile(member).read()


def read_json_members(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """`package/<name>` for each name that is there.

    Raises:
        DataError: the archive is damaged, or a member is too large or no JSON object.
    """
    found = {}
    with opened(path) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if not member.isreg() or name not in names:
                continue
            where = f"{path}:{member.name}"
            if member.size > MAX_MEMBER_BYTES:
                raise DataError(f"{where}: {member.size} bytes, expected at most {MAX_MEMBER_BYTES}")
            try:
                value = parse_json(archive.extractfile(member).read())
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
            found[name] = value
    return found
