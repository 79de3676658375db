# SPDX-License-Identifier: MIT
"""Linear layer and cross-entropy in plain torch: mean over the targets of logsumexp(logits) - logits[target]."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The plain twin of `linear_cross_entropy`: logits in the dtype of `x`, the loss at least in float32."""
    logits = F.linear(x, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, target, ignore_index=ignore_index)
