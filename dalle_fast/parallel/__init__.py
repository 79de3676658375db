# SPDX-License-Identifier: MIT
"""Training on several machines: gradients compressed by PowerSGD, for DDP and for FSDP2."""

from __future__ import annotations

from .hooks import attach_powersgd, powersgd_hook
from .matrices import compression_rate
from .powersgd import PowerSGD
from .shard import shard_blocks, shard_placement
from .wire import Traffic, all_reduce_codes, wire_bytes

__all__ = [
    "PowerSGD",
    "Traffic",
    "all_reduce_codes",
    "attach_powersgd",
    "compression_rate",
    "powersgd_hook",
    "shard_blocks",
    "shard_placement",
    "wire_bytes",
]
