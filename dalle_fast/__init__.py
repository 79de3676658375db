# SPDX-License-Identifier: MIT
"""Fast CUDA and CPU ops, models and a trainer for text-to-image transformers on discrete tokens."""

from __future__ import annotations

__version__ = "0.1.0"
