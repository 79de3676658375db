# SPDX-License-Identifier: MIT
"""Machines of several GPUs and their rates, as `dalle-fast plan` takes them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError

REACHED = 0.4
"""Share of the data sheet's FLOP/s that a training step is assumed to reach; --compute takes what yours does reach."""


class DataSheet(NamedTuple):
    """What the vendor's data sheet promises of a GPU; nothing here was measured."""

    compute: float
    """FLOP/s of 16-bit tensor cores, dense."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""
    intra: float
    """Bytes/s of its NVLinks, one way."""


GPUS = {
    "v100-16gb": DataSheet(125e12, 16e9, 900e9, 150e9),
    "a100-80gb": DataSheet(312e12, 80e9, 2039e9, 300e9),
    "h100-80gb": DataSheet(989e12, 80e9, 3350e9, 450e9),
}


@dataclass(frozen=True)
class Cluster:
    """Machines of several GPUs, and their rates."""

    gpus: int
    gpus_per_node: int
    link: float
    """Bytes/s between machines: of one machine, one way, for all its GPUs."""
    intra: float
    """Bytes/s within a machine: of one GPU, one way."""
    latency: float
    """Seconds of a message, whatever its size."""
    compute: float
    """FLOP/s of one GPU in training."""
    bandwidth: float
    """Bytes/s of one GPU's memory."""
    memory: float
    """Bytes of one GPU."""

    def __post_init__(self) -> None:
        for name in ("link", "intra", "compute", "bandwidth", "memory"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise ConfigError(f"latency: expected 0 or more, got {self.latency}")
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.gpus % self.gpus_per_node:
            raise ConfigError(
                f"gpus: expected a multiple of the {self.gpus_per_node} in a machine (gpus_per_node), got {self.gpus}"
            )

    @property
    def machines(self) -> int:
        return self.gpus // self.gpus_per_node


# ---- what the command line takes


def parse_rate(name: str, text: str) -> float:
    """Bytes/s of "25Gbit", "400Gbit/s", "50Mbit", "150GB/s".

    Raises:
        ConfigError: not a positive rate.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(bit|bps|B)(?:/s)?\s*", text)
    value = float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]] if match else 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a rate such as 25Gbit, 400Gbit/s, 50Mbit or 150GB/s, got {text!r}")
    return value if match[3] == "B" else value / 8


def cluster_of(
    gpus: int,
    link: str,
    *,
    gpus_per_node: int | None = None,
    gpu: str = "v100-16gb",
    intra: str | None = None,
    latency: float = 10.0,
    compute: float | None = None,
    memory: float | None = None,
) -> Cluster:
    """A cluster from flags: what is not given stands in a data sheet, or is assumed.

    Args:
        gpus, gpus_per_node: in all; in a machine (None: 8, or all if there are fewer).
        link, intra: rates as `parse_rate` takes them.
        gpu: a key of `GPUS`.
        latency: microseconds.
        compute: TFLOP/s that a GPU reaches; None: `REACHED` of the data sheet.
        memory: GB of a GPU.

    Raises:
        ConfigError: an argument is out of range or does not parse.
    """
    if gpu not in GPUS:
        raise ConfigError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    sheet = GPUS[gpu]
    return Cluster(
        gpus=gpus,
        gpus_per_node=min(8, max(1, gpus)) if gpus_per_node is None else gpus_per_node,
        link=parse_rate("link", link),
        intra=sheet.intra if intra is None else parse_rate("intra", intra),
        latency=latency * 1e-6,
        compute=REACHED * sheet.compute if compute is None else compute * 1e12,
        bandwidth=sheet.bandwidth,
        memory=sheet.memory if memory is None else memory * 1e9,
    )
