# SPDX-License-Identifier: MIT
"""Where autocast must stay out."""

from __future__ import annotations

import contextlib

import torch


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A region without autocast on the device of `x`: logits and codes are float32 (paper section 2.4)."""
    if x.device.type == "meta":  # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
