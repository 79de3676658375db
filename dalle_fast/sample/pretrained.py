# SPDX-License-Identifier: MIT
"""Trained systems that ship inside the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "pretrained"


def find(name: str = "emoji") -> Path | None:
    """The folder of a system that ships (`dvae`, `clip`, `dalle`), for `System.load`; None where there is none."""
    folder = _FOLDER / name
    return folder if (folder / "dalle").is_dir() else None
