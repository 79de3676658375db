# SPDX-License-Identifier: MIT
"""Errors that are the user's to mend: the command line prints them as one message, without a traceback."""

from __future__ import annotations

import math


class UserError(ValueError):
    """Something the user gave is wrong; the message names it, what was expected and what came."""

    one_line = True
    """Whether line breaks in it can only come from a name that the user gave."""


class ConfigError(UserError):
    """A flag, preset or TOML key is unknown or has an impossible value."""


class DataError(UserError):
    """A picture, caption, archive or data folder cannot be used; the message names file and member."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


class TrainingError(UserError):
    """A run cannot go on: too many updates without finite gradients, or its folder is in use."""


def shown(value: object, most: int = 200) -> str:
    """`repr` for a message: short, whatever the value."""
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits, lists in lists, a foreign object
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def require_ints(config: object, **most: int) -> None:
    """Fields of a config that are positive ints.

    Raises:
        ConfigError: one is not, or is larger than what `most` says of it.
    """
    for name, limit in most.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ConfigError(f"{name}: expected a positive int of at most {limit}, got {shown(value)}")


def require_numbers(config: object, **ranges: tuple[float, float]) -> None:
    """Fields of a config that are numbers from a low to a high end, both included; infinity as an end is not.

    Raises:
        ConfigError: one is not.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{name}: expected {_range(low, high)}, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: expected a finite number, got {value}")


def _range(low: float, high: float) -> str:
    return f"{low:g} or more" if high >= 2**63 - 1 else f"a number from {low:g} to {high:g}"
