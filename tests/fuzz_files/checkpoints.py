# SPDX-License-Identifier: MIT
"""Checkpoint folders: damaged by accident, where the one before has to be used, and forged with matching hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dalle_fast.errors import CheckpointError
from dalle_fast.models import store
from dalle_fast.sample import SampleOptions, System
from dalle_fast.train import RECIPES, load_config, run

from .base import FileTarget, tiny_system
from .guard import WATCH
from .mutate import damaged, deep, json_bytes, odd_value, replace_entry

KINDS = ("dvae", "clip", "dalle")
Change = Callable[[Random, bytes], bytes]


class CheckpointTarget(FileTarget):
    """Loads, samples and goes on from a folder in which something is wrong."""

    name = "checkpoint"
    seconds = 10.0  # going on trains an update and writes two checkpoints

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        tiny_system(self.root)
        self.weights = {kind: self._saved(kind) for kind in KINDS}

    def _saved(self, kind: str) -> list[str]:
        """Weights that were saved, each as a hash."""
        folders = sorted((self.root / kind / "checkpoints").glob("step-*"))
        return [_hash_of(store.load_model(folder)) for folder in folders]

    def case(self, rng: Random, folder: Path) -> str | None:
        kind = rng.choice(KINDS)
        shutil.copytree(self.root / kind, folder / kind)
        newest = sorted((folder / kind / "checkpoints").glob("step-*"))[-1]
        forged = rng.random() < 0.6
        if rng.random() < 0.3:
            shutil.rmtree(sorted((folder / kind / "checkpoints").glob("step-*"))[0])
        self._spoil(rng, newest, forged)
        if forged and newest.is_dir() and rng.random() < 0.95:
            _forge_manifest(newest)
        if rng.random() < 0.4:
            return self._go_on(rng, kind, folder)
        path = folder / kind if rng.random() < 0.7 else newest
        model = store.load_model(path, expect=kind)
        if not forged and _hash_of(model) not in self.weights[kind]:
            return "weights that nobody saved were loaded"
        return self._use(rng, kind, model, folder)

    def _spoil(self, rng: Random, newest: Path, forged: bool) -> None:
        for _ in range(rng.choice([1, 1, 2])):
            files = sorted(path for path in newest.iterdir() if path.is_file())
            if not files:
                return
            file = rng.choice(files)
            if rng.random() < 0.15:
                replace_entry(rng, rng.choice([file, file, newest, newest.parent]))
                if not newest.is_dir():
                    return
            elif forged and file.suffix == ".safetensors":
                file.write_bytes(_forged(rng, file.read_bytes()))
            elif forged and file.suffix == ".json":
                file.write_bytes(json_bytes(rng, json.loads(file.read_bytes())))
            else:
                file.write_bytes(damaged(rng, file.read_bytes()))

    def _use(self, rng: Random, kind: str, model: torch.nn.Module, folder: Path) -> str | None:
        """A forged model either fits the others or says that it does not; then it draws."""
        if rng.random() < 0.5:
            return None
        self._link_others(kind, folder)
        if kind == "dvae" and model.config.image_size > 64:
            return None
        system = System.load(folder)
        if system.dalle.config.image_len > 100 or system.dalle.config.width > 256:
            return None
        result = system.sample("a red house", SampleOptions(num_samples=1))
        size = system.dvae.config.image_size
        return None if result.images.shape == (1, size, size, 3) else f"pictures {result.images.shape}"

    def _link_others(self, kind: str, folder: Path) -> None:
        with WATCH.off():
            for other in set(KINDS) - {kind}:
                os.symlink(self.root / other, folder / other)

    def _go_on(self, rng: Random, kind: str, folder: Path) -> str | None:
        """The run goes on, or does not begin; what was good before is there afterwards."""
        self._link_others(kind, folder)
        config = load_config(RECIPES[kind][0], folder / kind / "config.toml")
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=3))
        parent = folder / kind / "checkpoints"
        good = {path.name for path in parent.glob("step-*") if _is_good(path)}
        try:
            result = run(config, folder / kind, quiet=True)
        except CheckpointError:
            lost = good - {path.name for path in parent.glob("step-*") if _is_good(path)}
            if lost:
                return f"refused, and {sorted(lost)} lost"
            raise
        if result.step != 3 or not _is_good(result.checkpoint):
            return f"ended at {result.step} with {result.checkpoint}"
        left = {path.name for path in parent.glob("step-*") if _is_good(path)}
        return None if len(left) >= min(2, len(good) + 1) else f"only {sorted(left)} is left of {sorted(good)}"


def _is_good(folder: Path) -> bool:
    try:
        store.verify(folder)
    except CheckpointError:
        return False
    return True


def _hash_of(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _forge_manifest(folder: Path) -> None:
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name != store.MANIFEST and path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24:
            entries[path.name] = {"size": path.stat().st_size, "sha256": store.file_hash(path)}
    manifest = folder / store.MANIFEST
    if manifest.exists() and not manifest.is_file():
        return
    manifest.write_text(json.dumps({"version": 1, "files": entries}))


# ---- safetensors that are well formed and wrong


def _shapes(rng: Random, content: bytes) -> bytes:
    tensors = load(content)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    others = [tensor.reshape(-1), tensor[..., None], torch.stack((tensor, tensor)), torch.zeros(0),
              torch.zeros(3, 0, 5), torch.zeros(()), tensor.mT if tensor.dim() > 1 else tensor]  # fmt: skip
    tensors[name] = rng.choice(others).contiguous().clone()
    return save(tensors)


def _dtypes(rng: Random, content: bytes) -> bytes:
    tensors = load(content)
    other = rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.int16,
                        torch.float8_e4m3fn, torch.complex64])  # fmt: skip
    names = list(tensors) if rng.random() < 0.3 else [rng.choice(list(tensors))]
    return save({name: t.to(other) if name in names else t for name, t in tensors.items()})


def _numbers(rng: Random, content: bytes) -> bytes:
    tensors = load(content)
    name = rng.choice(list(tensors))
    tensors[name] = torch.full_like(tensors[name], rng.choice([float("nan"), float("inf"), 1e30, 0.0]))
    return save(tensors)


def _names(rng: Random, content: bytes) -> bytes:
    tensors = load(content)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    if rng.random() < 0.5:
        del tensors[name]
    tensors[rng.choice(["", "x", name + ".x", "0.0", "x.y", "99.step", "-1.step", "٣.step", "0", "é", "__x__"])] = (
        tensor
    )
    return save(tensors)


def _header(rng: Random, content: bytes) -> bytes:
    """The header as JSON, with odd values; the numbers as they are."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header[rng.choice(list(header.keys() - {"__metadata__"}))]
    key = rng.choice(["dtype", "shape", "data_offsets"])
    choices: dict[str, list[Any]] = {
        "dtype": ["F64", "F8_E4M3", "C64", "X", 3, None, "BOOL"],
        "shape": [[2**62, 4], [2**40], [-1], [0], [], [1.5], "x", [2**63, 2], [10**30], [[1]]],
        "data_offsets": [[0, 2**60], [2**60, 0], [0, 0], [-1, 5], [0], "x", [1, 5]],
    }
    entry[key] = rng.choice(choices[key]) if rng.random() < 0.8 else odd_value(rng)
    if rng.random() < 0.2:
        header["__metadata__"] = odd_value(rng)
    if rng.random() < 0.1:
        header["deep"] = deep(900)
    text = json.dumps(header).encode("utf-8", "replace")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _forged(rng: Random, content: bytes) -> bytes:
    try:
        return rng.choice(_FORGERIES)(rng, content)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # damaged already
        return damaged(rng, content)


def _bytes(rng: Random, content: bytes) -> bytes:
    return damaged(rng, content)


_FORGERIES: list[Change] = [_shapes, _dtypes, _numbers, _names, _header, _header, _bytes]
