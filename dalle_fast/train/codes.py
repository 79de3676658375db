# SPDX-License-Identifier: MIT
"""A dVAE that begins with a code book: k-means on what its untrained encoder makes of some pictures."""

from __future__ import annotations

import torch

from ..models import DVAE
from ..nn import map_pixels

MEAN_ENTROPY = 0.5
"""Nats that the encoder's first distributions over the codes have on average: sure, and still open to change."""
_ROUNDS = 8
_WINDOW = 0.3
"""Deviation of the Gaussian window on the first convolution, in sides of a cell. Measured at 4 pixels a cell: the mean
patch of each code has an error of 0.0237 without, 0.0199 at 0.5, 0.0179 at 0.3, 0.0216 at 0.125."""


@torch.no_grad()
def begin_with_codes(dvae: DVAE, images: torch.Tensor, seed: int = 0) -> None:
    """Sets the encoder's two ends and the decoder's stem so that all codes are alive before the first update.

    From random weights a relaxed code book begins with a dozen codes, and most updates of a short run go by until the
    others are found. A random encoder keeps enough of a picture for its features to be clustered instead. With centres
    c_k of k-means over all grid cells, the head becomes l_k = s (c_k x - |c_k|^2 / 2), whose argmax is the nearest
    centre, s such that softmax(l) has a mean entropy of 1 nat; the stem gives code k a random orthogonal projection of
    c_k, so that like codes begin alike.

    The first convolution, 7 x 7, gets a Gaussian window, at the same norm: a cell's features are to be about its own
    pixels first.

    The features move under the head, whose logits grow with s: train the encoder with smaller steps than the decoder
    (`DVAETrainConfig.encoder_lr_scale`).

    Args:
        dvae: fresh, any memory format.
        images: [N, 3, H, W] floating in [0, 1], of the training set; N * h * w cells, at least as many as codes.
        seed: of the first centres and the projection.

    Raises:
        ValueError: fewer cells than codes.
    """
    *blocks, head = dvae.encoder.blocks
    _narrow(dvae.encoder.blocks.input.w, _WINDOW * dvae.config.downsampling)
    features = []
    for part in images.split(64):
        x = map_pixels(part)
        for block in blocks:
            x = block(x)
        features.append(head.relu(x).float().permute(0, 2, 3, 1).flatten(0, 2))
    x = torch.cat(features)  # [cells, C]
    generator = torch.Generator().manual_seed(seed)
    centres = kmeans(x, dvae.config.vocab_size, _ROUNDS, generator)
    half = centres.square().sum(1) / 2
    chosen = x[torch.randperm(x.shape[0], generator=generator)[:4096].to(x.device)]
    scale = _scale_for(chosen @ centres.t() - half, MEAN_ENTROPY)
    head.conv.w.copy_((scale * centres)[:, :, None, None])
    head.conv.b.copy_(scale * (half.mean() - half))

    stem = dvae.decoder.blocks.input
    width, channels = stem.w.shape[0], centres.shape[1]
    square = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square)[0][:, :width].to(centres)  # [C, min(width, C)]
    vectors = (centres - centres.mean(0)) @ basis
    stem.w[: vectors.shape[1]] = (vectors / vectors.std().clamp(min=1e-6)).t()[:, :, None, None]


def _narrow(weight: torch.Tensor, deviation: float) -> None:
    """[out, in, k, k] times a Gaussian around its middle, at the norm it had."""
    side = weight.shape[-1]
    offsets = torch.arange(side, device=weight.device) - (side - 1) / 2
    window = torch.exp(-(offsets[:, None].square() + offsets.square()) / (2 * deviation**2))
    norm = weight.norm()
    weight.mul_(window)
    weight.mul_(norm / weight.norm())


def _scale_for(logits: torch.Tensor, entropy: float) -> float:
    """The s for which softmax(s logits) has this mean entropy, by bisection between 2^-40 and 2^40."""
    low, high = -40.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        log_p = (logits * 2**middle).log_softmax(1)
        if float(-(log_p.exp() * log_p).sum(1).mean()) > entropy:
            low = middle
        else:
            high = middle
    return 2**middle


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
        nearest = (x @ centres.t() - centres.square().sum(1) / 2).argmax(1)
        members = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], centres)
    return centres
