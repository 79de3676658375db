# SPDX-License-Identifier: MIT
"""Matrix products whose bits do not depend on the number of threads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# On some processors MKL has kernels for float32 products of few rows, or of few columns that do not fill its vectors,
# which divide the work by threads in another order of sums. Such products get zeros at their edges.
_ROWS, _COLUMNS, _FEW_COLUMNS = 16, 16, 112


def _missing(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    """Rows of `a` and columns of `b` to add."""
    if a.device.type != "cpu" or a.dtype != torch.float32:
        return 0, 0
    rows, columns = a.shape[0], b.shape[1]
    return _ROWS - rows if rows < _ROWS else 0, -columns % _COLUMNS if columns < _FEW_COLUMNS else 0


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """torch.mm(a, b): [M, K] [K, N] -> [M, N]."""
    rows, columns = _missing(a, b)
    if not (rows or columns):
        return torch.mm(a, b, out=out)
    product = torch.mm(F.pad(a, (0, 0, 0, rows)), F.pad(b, (0, columns)))[: a.shape[0], : b.shape[1]]
    return product if out is None else out.copy_(product)


def addmm(start: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """torch.addmm(start, a, b): start + a b, `start` [N] or [M, N]; it may be `out`."""
    if any(_missing(a, b)):
        return torch.add(start, mm(a, b), out=out)
    return torch.addmm(start, a, b, out=out)
