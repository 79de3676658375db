# SPDX-License-Identifier: MIT
"""Errors that are the user's to mend: the command line prints them as one message, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong; the message names it, what was expected and what came."""


class ConfigError(UserError):
    """A flag, preset or TOML key is unknown or has an impossible value."""


class DataError(UserError):
    """A picture, caption, archive or data folder cannot be used; the message names file and member."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


class TrainingError(UserError):
    """A run cannot go on: too many updates without finite gradients, or its folder is in use."""
