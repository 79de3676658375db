# SPDX-License-Identifier: MIT
"""The image step of decoding, recorded once as a CUDA graph where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ..models import DALLE


class ImageDecoder:
    """Logits of one image token after the other.

    On a CUDA device the position is counted in device memory, so that all steps are the same work: the first runs as
    it is, the second is recorded as a CUDA graph, and that is replayed from then on. Where recording is impossible
    (a module that waits for the device), every step runs as it is, with a warning.

    Args:
        model: in eval mode.
        texts: [Bt, text_len] int64 captions.
        num_samples: B, a multiple of Bt: sample b belongs to text b // (B / Bt).
        prefix: [Bt, P] int64, the first P image tokens of every sample; decoding goes on with token P.
        count_on_device: whether the position is a tensor; None takes one on CUDA.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or values; the message names it.
    """

    def __init__(
        self,
        model: DALLE,
        texts: torch.Tensor,
        num_samples: int,
        prefix: torch.Tensor | None = None,
        *,
        count_on_device: bool | None = None,
    ) -> None:
        self.model = model
        self.num_samples = num_samples
        self.caches = model.prefill(texts, num_samples, prefix)
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        index = 0 if prefix is None else prefix.shape[1]
        on_device = texts.is_cuda if count_on_device is None else count_on_device
        self._index = torch.tensor([index], device=texts.device) if on_device else index
        self._records = texts.is_cuda and on_device

    @torch.no_grad()
    def __call__(self, last: torch.Tensor | None) -> torch.Tensor:
        """Logits of the next token.

        Args:
            last: [B] int64, the token before it; None for the very first.

        Returns:
            [B, V] float32; the next call may write over it.
        """
        self._steps += 1
        if self._replay is not None:
            self._last.copy_(last)
        elif self._steps == 2 and self._records:
            self._last = last.clone()
            recorded = record(lambda: self._step(self._last), self._last.device)
            if recorded is None:
                return self._step(last)
            self._logits, self._replay = recorded
        else:
            return self._step(last)
        self._replay()
        return self._logits

    def _step(self, last: torch.Tensor | None) -> torch.Tensor:
        logits = self.model.decode(self.caches, self._index, last, self.num_samples)
        self._index += 1
        return logits


def record(step: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Callable[[], None]] | None:
    """Records `step` as a CUDA graph, without running it: its result, and what runs it. None where that fails."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            result = step()
    except RuntimeError as error:
        warnings.warn(f"decoding without a CUDA graph: {error}", RuntimeWarning, stacklevel=3)
        return None
    return result, graph.replay
