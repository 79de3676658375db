# SPDX-License-Identifier: MIT
"""Every room's smaller cases on CUDA, forward and backward: what the sanitizers watch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from rooms import all_rooms, build, call, fresh, gradients, map_tensors, tensors_of

LARGEST = 20_000  # elements of all tensors of a case


def main() -> None:
    done = 0
    for room in all_rooms():
        for case in room.cases:
            for dtype in case.dtypes:
                arguments = build(room, case, dtype)
                if sum(t.numel() for t in tensors_of(arguments)) > LARGEST:
                    continue
                arguments = map_tensors(lambda t: t.cuda(), arguments)
                call(room.function, fresh(arguments), backend="cuda")
                if room.differentiable and any(t.requires_grad for t in tensors_of(arguments)):
                    gradients(room.function, arguments, backend="cuda")
                done += 1
    torch.cuda.synchronize()
    print(f"{done} calls")


if __name__ == "__main__":
    main()
