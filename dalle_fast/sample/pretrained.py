# SPDX-License-Identifier: MIT
"""Trained systems that come with the package, by name. `make pretrained` makes them; nothing else changes them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "pretrained"
DEFAULT = "emoji"
TEMPERATURE = 0.7
"""Of the command line's samples: fewer odd pictures than at 1."""


def names() -> list[str]:
    """Of the systems that this installation holds."""
    return sorted(path.parent.name for path in FOLDER.glob("*/dalle") if path.is_dir())


def find(name: str = DEFAULT) -> Path | None:
    """The folder (dvae/, clip/, dalle/, README.md) of a system, for `System.load`; None where there is none."""
    return FOLDER / name if name in names() else None


def is_pretrained(path: Path | str) -> bool:
    """Whether a folder is that of a system which came with the package."""
    return Path(path).resolve().parent == FOLDER.resolve()
