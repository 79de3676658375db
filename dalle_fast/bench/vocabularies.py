# SPDX-License-Identifier: MIT
"""The loss of text and image tokens, a vocabulary for each kind, beside one joint vocabulary that is masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..ops import linear_cross_entropy
from .rows import Row, relative, size_of

_TEXT_WEIGHT = 1 / 8  # paper section 2.2


def _joint_loss(x, weight, target, hidden: torch.Tensor, num_text: int) -> torch.Tensor:
    """All logits of all rows, those of the other kind hidden: what implementations with one output layer do."""
    logits = F.linear(x, weight).float().masked_fill_(hidden, -torch.finfo(torch.float32).max)
    text = F.cross_entropy(logits[:num_text], target[:num_text])
    return _TEXT_WEIGHT * text + (1 - _TEXT_WEIGHT) * F.cross_entropy(logits[num_text:], target[num_text:])


def vocabulary_row(
    dtype: torch.dtype,
    *,
    text: tuple[int, int] = (256, 16384),
    image: tuple[int, int] = (1024, 8192),
    width: int = 512,
    device: str = "cpu",
) -> Row:
    """Forward and backward of both losses; `text` and `image` are (rows, codes)."""
    generator = torch.Generator(device).manual_seed(0)
    rows, codes = text[0] + image[0], text[1] + image[1]
    x = torch.randn(rows, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn(codes, width, generator=generator, device=device) * width**-0.5
    weight = weight.to(dtype).requires_grad_()
    targets = [torch.randint(v, (n,), generator=generator, device=device) for n, v in (text, image)]
    joint_target = torch.cat((targets[0], targets[1] + text[1]))
    is_text_row = torch.arange(rows, device=device) < text[0]
    is_text_code = torch.arange(codes, device=device) < text[1]
    hidden = is_text_row[:, None] != is_text_code

    def split(loss, x, weight) -> torch.Tensor:
        text_loss = loss(x[: text[0]], weight[: text[1]], targets[0])
        return _TEXT_WEIGHT * text_loss + (1 - _TEXT_WEIGHT) * loss(x[text[0] :], weight[text[1] :], targets[1])

    def composed(x, weight, target) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target)

    def gradients(loss: Callable[..., torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: torch.autograd.grad(loss(x, weight), (x, weight))

    def error() -> float:
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        expected = torch.autograd.grad(split(composed, *exact), exact)
        actual = gradients(lambda x, weight: split(linear_cross_entropy, x, weight))()
        return max(relative(a, e) for a, e in zip(actual, expected, strict=True))

    return Row(
        f"text {text[0]}x{text[1]} and image {image[0]}x{image[1]} loss {str(dtype)[6:]} forward+backward",
        gradients(lambda x, weight: split(linear_cross_entropy, x, weight)),
        error,
        1e-4 if dtype == torch.float32 else 1e-2,
        2 * size_of(x, weight),
        6 * width * (text[0] * text[1] + image[0] * image[1]),
        {
            "joint vocabulary, masked": lambda: gradients(
                lambda x, weight: _joint_loss(x, weight, joint_target, hidden, text[0])
            ),
            "F.cross_entropy(F.linear) twice": lambda: gradients(lambda x, weight: split(composed, x, weight)),
        },
        flop_dtype=dtype,
    )


def vocabulary_rows() -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        name = f"text 256x16384 and image 1024x8192 loss {str(dtype)[6:]} forward+backward"
        yield name, lambda dtype=dtype: vocabulary_row(dtype)
