# SPDX-License-Identifier: MIT
"""What the targets share: numbered cases made from files that are prepared once, and a tiny trained system."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path
from random import Random

import numpy as np
from fuzz.runner import Outcome
from PIL import Image
from tiny import clip_config, dalle_config, dvae_config

from .guard import judged

CAPTIONS = ("a red house", "a blue boat", "two green trees", "a cat on a mat", "the sun", "a dog, running")


for _name in ("open_clip", "torchvision", "matplotlib.backends.backend_agg", "tyro", "torch.utils.tensorboard"):
    importlib.import_module(_name)  # before a case is watched


class FileTarget:
    """Files that are right, and calls that read them after something went wrong with them."""

    name = ""
    seconds = 5.0
    """Of processor time that a case may take."""

    def __init__(self, root: Path) -> None:
        self.root = root / self.name
        self.root.mkdir(parents=True)

    def case(self, rng: Random, folder: Path) -> str | None:
        """Damages files in the empty `folder` and reads them. Returns what is wrong; raises what the reader raises."""
        raise NotImplementedError

    def names(self, text: str, folder: Path) -> bool:
        """Whether a refusal says where the mistake is."""
        return str(folder) in text

    def make(self, seed: int, number: int, without: frozenset[int] = frozenset()) -> FileCase:
        return FileCase(self, seed, number)


class FileCase:
    """One number of a target."""

    num_parts = 0

    def __init__(self, target: FileTarget, seed: int, number: int) -> None:
        self.target, self.seed, self.number = target, seed, number

    def describe(self) -> str:
        return f"{self.target.name} {self.seed} {self.number}"

    def run(self) -> Outcome:
        rng = Random(self.describe())
        return judged(lambda folder: self.target.case(rng, folder), self.target.names)


def draw_pictures(folder: Path, captions: tuple[str, ...] = CAPTIONS) -> Path:
    """Pictures with captions, small and all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(captions):
        pixels = np.random.default_rng(i).integers(0, 255, (16 + i, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def tiny_system(root: Path) -> Path:
    """dVAE, CLIP and transformer of two updates on six pictures; two checkpoints of each."""
    from dalle_fast.train import run

    source = str(draw_pictures(root / "pictures"))
    for config in (dvae_config(2, save_every=1), clip_config(2, save_every=1), dalle_config(2, save_every=1)):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
        kind = type(config).__name__.removesuffix("TrainConfig").lower()
        run(config, root / kind, quiet=True)
        shutil.rmtree(root / kind / "tensorboard")
    return root
