# SPDX-License-Identifier: MIT
"""Orthonormalised momentum for matrices, AdamW16 for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..ops import orthonormalize
from .adamw16 import AdamW16

UPDATE_RMS = 0.2
"""Root mean square of an update of full rank for a step size of 1: what AdamW's typically have (Liu et al. 2025)."""

NOISE = 1e-6
"""Directions shorter than this share of the longest are what float32 rounds; they are not blown up to full length."""
_TINY = torch.finfo(torch.float32).tiny


class Dion(AdamW16):
    """Momentum of low rank, orthonormalised (Dion, Ahn et al., arXiv 2504.05295); AdamW16 for the other parameters.

    For a weight W [m, n] with gradient G, momentum M and basis V [n, r], r = min(rank, m, n):

        M <- M + G
        P = Q of the QR decomposition of M V          (`ops.orthonormalize`)
        R = M^T P
        M <- M - (1 - momentum) P R^T                 what the update did not take stays
        V <- R, each column divided by its norm       (or 1e-6 of the largest norm, if that is more)
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) P V^T

    One step of power iteration an update, begun from the last one's basis, follows the r leading singular directions
    of the momentum, and every one of them moves the weight as far: small gradients count as much as large ones. The
    last factor (Liu et al., arXiv 2502.16982) gives an update the size of AdamW's, so both kinds of parameters share a
    step size. 8 m n r operations beside 6 m n an input for the gradient itself, where five Newton-Schulz steps (Muon)
    take 20 m n min(m, n) and more.

    A convolution's weight [out, in, kh, kw] is the matrix [out, in kh kw].

    Args:
        params: float32 parameters, or groups. Groups may set `rank`: 0 leaves their parameters to AdamW16; above 0,
            all of them have two dimensions or more.
        lr: step size.
        rank: directions an update may have; of parameters in groups that do not say.
        momentum: share of the momentum's leading part that stays.
        betas, eps, weight_decay, variance_clip, ema_decay, backend: see `AdamW16`; the first, second and fourth count
            for rank 0 alone.

    State of a matrix: "momentum" like the parameter and "basis" [n, r], float32. Ranks that hold equal gradients
    compute equal updates. Weights in parts (`fully_shard`) are refused: a basis needs the whole matrix.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter of a group with rank > 0 is no matrix.
        TypeError: such a parameter is a DTensor.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = Dion([{"params": [layer.weight], "rank": 16}, {"params": [layer.bias], "rank": 0}], lr=1e-3)
        >>> layer(torch.randn(8, 64)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4.5e-4,
        rank: int = 64,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
        variance_clip: float = 5.0,
        ema_decay: float | None = None,
        backend: str = "auto",
    ) -> None:
        self._own = {"rank": rank, "momentum": momentum}
        super().__init__(params, lr, betas, eps, weight_decay, variance_clip, ema_decay, backend=backend)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim."""
        group = {**self._own, **param_group}
        if not isinstance(group["rank"], int) or group["rank"] < 0:
            raise ValueError(f"rank: expected an int of at least 0, got {group['rank']!r}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {group['momentum']}")
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"] if group["rank"] else ():
            if p.dim() < 2:
                raise ValueError(f"params: expected matrices in a group of rank {group['rank']}, got {list(p.shape)}")
            if hasattr(p, "to_local"):
                raise TypeError("params: expected whole matrices (rank > 0), got a DTensor; AdamW16 takes shards")

    def _step_group(
        self, group: dict[str, Any], grad_scale: float | torch.Tensor, found_inf: torch.Tensor | None
    ) -> None:
        if not group["rank"]:
            super()._step_group(group, grad_scale, found_inf)
            return
        params = [p for p in group["params"] if p.grad is not None]
        if not params or (found_inf is not None and found_inf.item()):
            return
        for p in params:
            self._check(p)
            if not self.state[p]:
                self._start_matrix(p, group)
        weights = [_matrix(p.detach()) for p in params]
        momenta = [_matrix(self.state[p]["momentum"]) for p in params]
        bases = [self.state[p]["basis"] for p in params]
        grads = [_matrix(p.grad, like=p) for p in params]
        if isinstance(grad_scale, torch.Tensor) or grad_scale != 1.0:
            grads = torch._foreach_div(grads, float(grad_scale))
        torch._foreach_add_(momenta, grads)
        products = [m @ v for m, v in zip(momenta, bases, strict=True)]
        products = [p / p.norm().clamp(min=_TINY) for p in products]  # what `orthonormalize` adds is absolute
        products = orthonormalize(products, backend=group["backend"])
        for w, m, v, p in zip(weights, momenta, bases, products, strict=True):
            r = m.t() @ p  # [n, r]
            m.addmm_(p, r.t(), alpha=group["momentum"] - 1)
            norms = r.norm(dim=0)
            r /= norms.clamp(min=max(float(norms.max()) * NOISE, _TINY))
            v.copy_(torch.where(norms > 0, r, v))
            w.mul_(1 - float(group["lr"]) * group["weight_decay"])
            w.addmm_(p, r.t(), alpha=-float(group["lr"]) * UPDATE_RMS * max(w.shape) ** 0.5)
        if group["ema_decay"] is not None:
            averages = [self.state[p]["ema"] for p in params]
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - group["ema_decay"])

    def _start_matrix(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["momentum"] = torch.zeros_like(p)
        state["basis"] = self._first_basis(_matrix(p.detach()), group["rank"], group["backend"])
        if group["ema_decay"] is not None:
            state["ema"] = p.detach().clone()

    @staticmethod
    def _first_basis(weight: torch.Tensor, rank: int, backend: str) -> torch.Tensor:
        """Any basis [n, r] that gradients are not orthogonal to; the same on every rank."""
        columns, rank = weight.shape[1], min(rank, *weight.shape)
        draws = torch.randn(columns, rank, generator=torch.Generator().manual_seed(columns * 65537 + rank))
        return orthonormalize(draws.to(weight.device), backend=backend)

    def _restored(self, p: torch.Tensor, name: str, value: torch.Tensor, capturable: bool) -> torch.Tensor:
        if name == "basis":
            return value.detach().to(p.device, copy=True).contiguous()
        return super()._restored(p, name, value, capturable)


def _matrix(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """[out, ...] as [out, n], without a copy where the layout is dense; columns in the memory order of `like`."""
    like = tensor if like is None else like
    order = sorted(range(1, tensor.dim()), key=lambda d: -like.stride(d))
    return tensor.permute(0, *order).flatten(1)
