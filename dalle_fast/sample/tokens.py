# SPDX-License-Identifier: MIT
"""Pictures to a file of dVAE tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from ..data import load_batch, open_dataset
from ..errors import UserError
from ..models.store import load_model, write_atomic


@torch.no_grad()
def write_tokens(
    run_dir: Path | str,
    source: str,
    split: str,
    output: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a safetensors file: `tokens` int32 [n, h, w]; captions and keys as JSON in its metadata.

    Args:
        run_dir: run folder of a dVAE.
        source: "emoji", "shapes", a folder or a .tar.
        split: "train", "heldout", "seen" or "all".
        output: the file.
        progress: called with (pictures done, in all).

    Returns:
        Number of pictures.

    Raises:
        UserError: the model or the data cannot be read, or the file cannot be written.
    """
    dvae = load_model(run_dir, expect="dvae")
    size = dvae.config.image_size
    dataset = open_dataset(source, split, size)
    parts, captions, keys = [], [], []
    for begin in range(0, len(dataset), 64):
        batch = load_batch(dataset, range(begin, min(begin + 64, len(dataset))), size=size)
        parts.append(dvae.encode(batch.images.float() / 255).to(torch.int32))
        captions += batch.captions
        keys += batch.keys
        progress(len(captions), len(dataset))
    tokens = torch.cat(parts) if parts else torch.empty(0, *dvae.grid, dtype=torch.int32)
    metadata = {"captions": json.dumps(captions), "keys": json.dumps(keys)}
    try:
        write_atomic(output, save({"tokens": tokens}, metadata=metadata))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error
    return len(captions)
