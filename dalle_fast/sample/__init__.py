# SPDX-License-Identifier: MIT
"""From captions to ranked pictures."""

from __future__ import annotations

from .generate import SampleOptions, generate_tokens
from .pictures import contact_sheet, save_result, to_uint8
from .system import SampleResult, System, rerank

__all__ = [
    "SampleOptions",
    "SampleResult",
    "System",
    "contact_sheet",
    "generate_tokens",
    "rerank",
    "save_result",
    "to_uint8",
]
