# SPDX-License-Identifier: MIT
"""Files from strangers: no pipe is waited for, no device is read without end, no size or depth is taken on trust."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_TEXT = 64 << 20
"""Bytes of a JSON, TOML or log file."""


def open_regular(path: Path | str) -> BinaryIO:
    """Opens an ordinary file for reading.

    Raises:
        OSError: missing, unreadable, or a folder, pipe, socket or device.
    """
    try:
        # a pipe that nobody writes to would block
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, str(error), repr(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return file


def read_bytes(path: Path | str, most: int = MAX_TEXT) -> bytes:
    """All of a file.

    Raises:
        OSError: see `open_regular`; or it has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size} bytes, expected at most {most}", str(path))
        return file.read(most)


def parse_json(content: bytes | str) -> Any:
    """A JSON value.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def cache_folder() -> Path:
    """Where this library keeps what it can make again: $XDG_CACHE_HOME/dalle_fast, or ~/.cache/dalle_fast.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle_fast"
