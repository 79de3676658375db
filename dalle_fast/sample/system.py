# SPDX-License-Identifier: MIT
"""The trained system as one object: caption -> candidates -> ranked pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import Tokenizer
from ..errors import CheckpointError, UserError
from ..models import CLIP, DALLE, DVAE
from ..models.store import load_model
from . import pretrained
from .generate import SampleOptions, generate_tokens
from .pictures import to_uint8


@dataclass(frozen=True)
class SampleResult:
    """Candidates of one caption, best first."""

    caption: str
    images: np.ndarray
    """[N, H, W, 3] uint8."""
    scores: torch.Tensor | None
    """[N] float32 cosine similarities, descending; None without a CLIP."""
    order: torch.Tensor
    """[N] int64: which candidate stands at each rank."""
    tokens: torch.Tensor
    """[N, height * width] int64."""
    options: SampleOptions
    system: str = ""
    """ "pretrained emoji" where a system of the package drew them; empty for one's own."""


def rerank(clip: CLIP, images: torch.Tensor, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Order of [N, 3, H, W] pictures by their score against the caption, best first, and the sorted scores."""
    scores = clip.score(images, [caption])
    order = torch.argsort(scores, descending=True, stable=True)
    return order, scores[order]


class System:
    """A dVAE, a transformer, its tokenizer and, for ranking, a CLIP.

    Raises:
        UserError: the dVAE's tokens are not the transformer's.
    """

    def __init__(self, dvae: DVAE, dalle: DALLE, clip: CLIP | None, tokenizer: Tokenizer) -> None:
        if dvae.config.vocab_size != dalle.config.image_vocab_size or dvae.grid != dalle.config.grid:
            raise UserError(
                f"the dVAE ({dvae.config.vocab_size} codes, grid {dvae.grid}) does not fit the transformer "
                f"({dalle.config.image_vocab_size} codes, grid {dalle.config.grid}): it was trained on another dVAE"
            )
        if tokenizer.vocab_size > dalle.config.text_vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the transformer {dalle.config.text_vocab_size}"
            )
        self.dvae, self.dalle, self.clip, self.tokenizer = dvae.eval(), dalle.eval(), clip, tokenizer
        self.name = ""
        """ "pretrained emoji" for a system of the package; its pictures carry it."""

    @classmethod
    def load(cls, run_dir: Path | str, *, device: str | torch.device = "cpu") -> System:
        """Loads `run_dir/{dvae,dalle,clip}`; a missing `clip` means no ranking.

        Args:
            run_dir: folder, or the name of a system that comes with the package: "emoji". A folder of that name in
                the current directory comes first.
            device: where to.

        Raises:
            CheckpointError: a stage is missing or damaged.
        """
        folder = Path(run_dir)
        if not folder.is_dir():
            shipped = pretrained.find(str(run_dir))
            if shipped is None:
                known = ", ".join(pretrained.names()) or "none"
                raise CheckpointError(f"{run_dir}: no such run folder, nor a pretrained system (there is: {known})")
            folder = shipped
        dvae = load_model(folder / "dvae", expect="dvae").to(device)
        dalle = load_model(folder / "dalle", expect="dalle").to(device)
        if getattr(dalle, "tokenizer", None) is None:
            raise CheckpointError(f"{folder / 'dalle'}: its checkpoint has no tokenizer.json")
        clip = load_model(folder / "clip", expect="clip").to(device) if (folder / "clip").is_dir() else None
        system = cls(dvae, dalle, clip, dalle.tokenizer)
        if pretrained.is_pretrained(folder):
            system.name = f"pretrained {folder.name}"
        return system

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.dalle.start_of_image.device

    def sample(
        self, caption: str, options: SampleOptions | None = None, *, progress: Callable[[int, int], None] | None = None
    ) -> SampleResult:
        """Draws candidates for a caption and ranks them.

        Args:
            caption: any text; lower-cased, cut after the model's text_len tokens.
            options: how to draw; None takes the defaults.
            progress: called with (tokens done, tokens in all).
        """
        return self._finish(caption, options or SampleOptions(), None, progress)

    def complete(
        self,
        caption: str,
        image: np.ndarray,
        keep_rows: int,
        options: SampleOptions | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> SampleResult:
        """Keeps the top of a picture and draws the rest (paper section 3.3, appendix G).

        Args:
            caption: any text.
            image: [H, W, 3] uint8 of the dVAE's size.
            keep_rows: rows of tokens to keep, 0 to the grid's height (the paper keeps 15 of 32).
            options: how to draw.
            progress: called with (tokens done, tokens in all).

        Raises:
            ValueError: the picture has the wrong shape or dtype.
            UserError: `keep_rows` is out of range.
        """
        size = self.dvae.config.image_size
        if image.shape != (size, size, 3) or image.dtype != np.uint8:
            raise ValueError(f"image: expected uint8 [{size}, {size}, 3], got {image.dtype} {list(image.shape)}")
        height, width = self.dalle.config.grid
        if not 0 <= keep_rows <= height:
            raise UserError(f"keep_rows: expected 0 to {height} rows of tokens, got {keep_rows}")
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device) / 255
        with torch.no_grad():
            tokens = self.dvae.encode(x).flatten()
        return self._finish(caption, options or SampleOptions(), tokens[: keep_rows * width], progress)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, height * width] int64 -> [N, 3, H, W] in [0, 1]."""
        return torch.cat([self.dvae.decode(part.unflatten(1, self.dalle.config.grid)) for part in tokens.split(64)])

    @torch.no_grad()
    def _finish(self, caption, options, prefix, progress) -> SampleResult:
        text = self.tokenizer.encode([caption], self.dalle.config.text_len)[0].to(self.device)
        tokens = generate_tokens(self.dalle, text, options, prefix=prefix, progress=progress)
        images = self.decode(tokens)
        order, scores = torch.arange(tokens.shape[0]), None
        if self.clip is not None:
            order, scores = rerank(self.clip, images, caption)
            order, scores = order.cpu(), scores.cpu()
        picked = order.to(tokens.device)
        found = tokens[picked].cpu()
        return SampleResult(caption, to_uint8(images[picked]), scores, order, found, options, self.name)
