# SPDX-License-Identifier: MIT
"""Image tokens one after the other from a cache of keys and values (paper section 2.6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..models import DALLE
from ..ops import gumbel_softmax
from .decoder import ImageDecoder


@dataclass(frozen=True)
class SampleOptions:
    """How to draw candidates."""

    num_samples: int = 8
    """Candidates per caption; the paper draws 512 and shows the best."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token. The paper uses 1."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability; 1 is all."""
    guidance_scale: float = 1.0
    """Logits are uncond + scale * (cond - uncond); 1 is no guidance. Needs a model trained with caption dropout."""
    seed: int = 0
    """Sample i is a function of (seed, i)."""
    batch_size: int = 64
    """Candidates decoded together; changes memory and speed, not which noise a candidate gets."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("batch_size", 1), ("top_k", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}: expected an int of at least {least}, got {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: expected an int in [0, 2^63), got {self.seed!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: expected 0 or a positive number, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ConfigError(f"guidance_scale: expected 0 or a positive number, got {self.guidance_scale!r}")


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """[B, V] with -Inf where a token may not be drawn. The most likely token always stays; ties at rank k stay."""
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities  # mass of the more likely ones
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


@torch.no_grad()
def generate_tokens(
    model: DALLE,
    text: torch.Tensor,
    options: SampleOptions,
    *,
    prefix: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Candidates for one caption.

    Args:
        model: in eval mode.
        text: [T] int64 caption tokens, -1 where there is none.
        options: how to draw.
        prefix: [P] int64, the first P image tokens to keep (section 3.3 of the paper keeps the top rows).
        progress: called with (tokens done, tokens in all).

    Returns:
        [N, height * width] int64.

    Raises:
        ValueError: `text` or `prefix` has the wrong shape.
    """
    if text.dim() != 1:
        raise ValueError(f"text: expected [T], got {list(text.shape)}")
    image_len = model.config.image_len
    num_kept = 0 if prefix is None else prefix.numel()
    if prefix is not None and (prefix.dim() != 1 or prefix.dtype != torch.int64 or num_kept > image_len):
        raise ValueError(f"prefix: expected [P] int64 with P <= {image_len}, got {prefix.dtype} {list(prefix.shape)}")
    if prefix is not None:
        model._check_image(prefix[None], 1)
    texts = text[None]
    guided = options.guidance_scale != 1
    if guided:
        texts = torch.cat((texts, torch.full_like(texts, -1)))

    chunks = []
    total = options.num_samples * image_len
    for begin in range(0, options.num_samples, options.batch_size):
        size = min(options.batch_size, options.num_samples - begin)
        rows = size * (2 if guided else 1)
        decoder = ImageDecoder(model, texts, rows, None if prefix is None else prefix.expand(len(texts), -1))
        tokens = torch.empty(size, image_len, dtype=torch.int64, device=text.device)
        if prefix is not None:
            tokens[:, :num_kept] = prefix
        for index in range(num_kept, image_len):
            last = None if index == 0 else tokens[:, index - 1]
            if guided and last is not None:
                last = torch.cat((last, last))
            logits = decoder(last)
            if guided:
                conditional, free = logits.chunk(2)
                logits = free + options.guidance_scale * (conditional - free)
            tokens[:, index] = _draw(logits, options, index, begin)
            if progress:
                progress(begin * image_len + size * (index + 1), total)
        chunks.append(tokens)
    return torch.cat(chunks)


def _draw(logits: torch.Tensor, options: SampleOptions, position: int, first: int) -> torch.Tensor:
    if options.temperature == 0:
        return logits.argmax(dim=1)
    logits = filter_logits(logits / options.temperature, options.top_k, options.top_p)
    # Gumbel-max: the argmax of logits + noise is a draw from their softmax
    return gumbel_softmax(logits, 1.0, dim=1, seed=options.seed, offset=position, hard=True, row_offset=first)
