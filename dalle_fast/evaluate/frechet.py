# SPDX-License-Identifier: MIT
"""Fréchet distance of two sets of features. Only with Inception features may it be called FID."""

from __future__ import annotations

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians that fit the features.

    The trace of the root comes from the singular values of the product of the centred data matrices, so it is real and
    right also when there are fewer samples than dimensions.

    Args:
        a: [n, d] floating, n >= 2.
        b: [m, d] floating, m >= 2.

    Raises:
        ValueError: wrong shapes, too few samples, or features that are not finite.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or x.shape[0] < 2:
            raise ValueError(f"{name}: expected [n, d] with n >= 2, got {list(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected finite features")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: expected {a.shape[1]} features, got {b.shape[1]}")
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    x = (a - mean_a) / (a.shape[0] - 1) ** 0.5  # x^T x is the covariance
    y = (b - mean_b) / (b.shape[0] - 1) ** 0.5
    # tr((S_a S_b)^(1/2)) is the sum of the singular values of x y^T
    root = torch.linalg.svdvals(x @ y.t()).sum()
    distance = (mean_a - mean_b).square().sum() + x.square().sum() + y.square().sum() - 2 * root
    return float(distance.clamp(min=0))
