# SPDX-License-Identifier: MIT
"""A teacher for the codes of a dVAE: k-means on the pixels of grid cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..models import DVAE

_ROUNDS = 10
_CHUNK = 8192  # points whose products with all centres are held at once


class CodeTeacher:
    """Tells every grid cell its code: the nearest of V centres, each a patch of pixels.

    A relaxed code book begins with a dozen codes, and most updates of a short run go by until others are found; codes
    given by the data are all in use at once. The encoder learns them by a cross-entropy beside the evidence lower
    bound (`DVAETrainConfig.teacher_weight`), which goes on choosing what serves the decoder.

    Args:
        images: [N, 3, H, W] floating in [0, 1], of the training set; N * h * w cells, at least as many as codes.
        num_codes: V.
        downsampling: side of a cell in pixels.
        seed: of the first centres.

    Raises:
        ValueError: fewer cells than codes.
    """

    def __init__(self, images: torch.Tensor, num_codes: int, downsampling: int, seed: int = 0) -> None:
        self.downsampling = downsampling
        patches = self._patches(images).flatten(0, 2)
        self.centres = kmeans(patches, num_codes, _ROUNDS, torch.Generator().manual_seed(seed))
        """[V, 3 * downsampling^2]."""

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, h, w, 3 * downsampling^2]."""
        return F.pixel_unshuffle(images.contiguous(), self.downsampling).permute(0, 2, 3, 1)

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, h, w] int64."""
        patches = self._patches(images)
        return nearest(patches.flatten(0, 2), self.centres).view(patches.shape[:3])

    @torch.no_grad()
    def set_codebook(self, dvae: DVAE, seed: int = 0) -> None:
        """Gives the decoder's codes projections of their patches, of deviation 1, in place: like codes begin alike."""
        weight = dvae.decoder.blocks.input.w  # [D, V, 1, 1]
        centres = self.centres - self.centres.mean(0)
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(centres.shape[1], weight.shape[0], generator=generator).to(centres)
        vectors = centres @ projection
        weight.copy_((vectors / vectors.std().clamp(min=1e-6)).t()[:, :, None, None])


def nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centre, [n] int64, of points [n, d] among centres [V, d]."""
    bias = centres.square().sum(dim=1) / 2
    return torch.cat([(part @ centres.t()).sub_(bias).argmax(dim=1) for part in points.split(_CHUNK)])


@torch.no_grad()
def kmeans(x: torch.Tensor, num_centres: int, num_rounds: int, generator: torch.Generator) -> torch.Tensor:
    """Centres by k-means++ (Arthur and Vassilvitskii 2007) and Lloyd's rounds.

    Args:
        x: [N, C] floating, finite.
        num_centres: K <= N.
        num_rounds: of Lloyd's algorithm; a centre that loses all its points stays where it is.
        generator: on CPU, of the first centres.

    Returns:
        [K, C].

    Raises:
        ValueError: fewer points than centres, or K is not positive.
    """
    count = x.shape[0]
    if not 1 <= num_centres <= count:
        raise ValueError(f"num_centres: expected 1 to {count}, the number of points, got {num_centres}")
    norms = x.square().sum(1)
    draws = torch.rand(num_centres, generator=generator, dtype=torch.float64).tolist()
    centres = x.new_empty(num_centres, x.shape[1])
    distance = torch.ones_like(norms)
    for k, draw in enumerate(draws):
        total = distance.double().cumsum(0)
        # where all points are centres already, any will do
        index = min(int(torch.searchsorted(total, draw * float(total[-1]), right=True)), count - 1)
        centres[k] = x[index]
        new = (norms - 2 * (x @ centres[k]) + norms[index]).clamp_(min=0)
        distance = new if k == 0 else torch.minimum(distance, new)
    for _ in range(num_rounds):
        owner = nearest(x, centres)
        members = torch.bincount(owner, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, owner, x)
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], centres)
    return centres
