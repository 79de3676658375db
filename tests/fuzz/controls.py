# SPDX-License-Identifier: MIT
"""Planted bugs, one of each kind that the fuzzer has to notice."""

from __future__ import annotations

import dataclasses
import os
import signal

import torch

from dalle_fast import ops

from .calls import OpCall
from .ops import SIGNATURES


def _crash(x: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ops.null(x)


def _hang(x: torch.Tensor) -> torch.Tensor:
    while True:
        pass


def _deadlock(x: torch.Tensor) -> torch.Tensor:
    signal.pause()
    return ops.null(x)


def _value(x: torch.Tensor) -> torch.Tensor:
    return ops.null(x) + (x.shape[1] == 9)


def _gradient(x: torch.Tensor) -> torch.Tensor:
    return ops.null(x.detach() * 2) - ops.null(x)


def _raw(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t() if x.dim() == 2 and x.is_floating_point() else x.view(-1, 1, 1, 7)


def _accepts_all(x: torch.Tensor) -> torch.Tensor:
    return ops.null(x) if isinstance(x, torch.Tensor) else torch.zeros(1, 1)


def _changes(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = ops.null(x)
        x.add_(1)
    return out


def _alias(x: torch.Tensor) -> torch.Tensor:
    ops.null(x)
    return x


def _memory(x: torch.Tensor) -> torch.Tensor:
    return ops.null(x + torch.empty(1 << 33, 1)[: x.shape[0]])


PLANTED = {
    "crash": (_crash, "death"),
    "hang": (_hang, "hang"),
    "deadlock": (_deadlock, "hang"),
    "value": (_value, "value"),
    "gradient": (_gradient, "value"),
    "raw": (_raw, "raw"),
    "accepts all": (_accepts_all, "accepted"),
    "changes": (_changes, "changed"),
    "alias": (_alias, "alias"),
    "memory": (_memory, "raw"),
}


class PlantedTarget:
    """`null` with a bug in it."""

    def __init__(self, kind: str) -> None:
        self.name = f"planted {kind}"
        self.signature = dataclasses.replace(SIGNATURES[0], function=PLANTED[kind][0])

    def make(self, seed: int, number: int, without: frozenset[int] = frozenset()) -> OpCall:
        return OpCall(self.signature, seed, number, without)
