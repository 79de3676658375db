# SPDX-License-Identifier: MIT
"""The training step of lucidrains/DALLE-pytorch, from a clone: a row of its own, since no package of it installs today.

The clone needs einops, rotary-embedding-torch and axial-positional-embedding. Its package imports pretrained VAEs and
their packages at once; the transformer alone needs none of them.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch

from ..errors import ConfigError
from .rows import Row
from .steps import dalle_row

_PACKAGE = "dalle_pytorch"


def _load(clone: Path) -> types.ModuleType:
    """Its module with the model, without what its `__init__` imports."""
    if _PACKAGE not in sys.modules:
        package, vae = types.ModuleType(_PACKAGE), types.ModuleType(f"{_PACKAGE}.vae")
        package.__path__ = [str(clone / _PACKAGE)]
        vae.OpenAIDiscreteVAE = vae.VQGanVAE = type("NotLoaded", (), {})
        sys.modules.update({package.__name__: package, vae.__name__: vae})
    return import_module(f"{_PACKAGE}.{_PACKAGE}")


def _step(clone: Path, kinds: tuple[str, ...], *, small: bool) -> Callable[[], torch.Tensor]:
    """Forward and backward of the model with the sizes of `dalle_row`; its head is one over both vocabularies."""
    library = _load(clone)
    grid, codes, words, text_len, width, heads, size = (
        (4, 32, 64, 12, 64, 2, 32) if small else (32, 8192, 16384, 256, 512, 8, 64)
    )
    torch.manual_seed(0)
    vae = library.DiscreteVAE(image_size=8 * grid, num_tokens=codes, num_layers=3, hidden_dim=8, codebook_dim=8)
    model = library.DALLE(dim=width, vae=vae, num_text_tokens=words, text_seq_len=text_len, depth=len(kinds),
                          heads=heads, dim_head=size, attn_types=kinds)  # fmt: skip
    text, image = torch.randint(1, words, (1, text_len)), torch.randint(codes, (1, grid * grid))

    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(text, image, return_loss=True)
        loss.backward()
        return loss.detach()

    return run


def dalle_pytorch_rows(clone: str, *, small: bool = False) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of the step beside DALLE-pytorch's with the same kinds of layers, and with full attention.

    Args:
        clone: folder of a clone of lucidrains/DALLE-pytorch.

    Raises:
        ConfigError: it is not one.
    """
    folder = Path(clone)
    if not (folder / _PACKAGE / f"{_PACKAGE}.py").exists():
        raise ConfigError(f"--dalle-pytorch: expected a clone of lucidrains/DALLE-pytorch, got {clone!r}")
    axial = ("axial_row", "axial_col", "axial_row", "axial_row")
    peers = {"DALLE-pytorch axial": axial, "DALLE-pytorch full": ("full",) * 4}
    name = f"DALLE step width {64 if small else 512} float32 and its reference implementation"

    def make() -> Row:
        makers = {peer: lambda kinds=kinds: _step(folder, kinds, small=small) for peer, kinds in peers.items()}
        return dataclasses.replace(dalle_row(torch.float32, small=small), name=name, peers=makers)

    yield name, make
