# SPDX-License-Identifier: MIT
"""Emoji in seven styles, for systems that ship: real drawings of npm packages, named and split."""

from __future__ import annotations

from .names import STYLES
from .packages import data_folder
from .pairs import EmojiStylesPairs

__all__ = ["STYLES", "EmojiStylesPairs", "data_folder"]
