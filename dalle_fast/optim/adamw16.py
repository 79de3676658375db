# SPDX-License-Identifier: MIT
"""AdamW that keeps its moments in 16 bits each (paper section 2.4, appendix B.2 and D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..ops.adamw16 import adamw16

_CODES = ("mean", "variance")


class AdamW16(torch.optim.Optimizer):
    """AdamW with the running mean in 1-6-9, the running variance in 0-6-10 and a variance clip.

    4 bytes of state a parameter instead of 8; unscaling, clipping of the variance, weight decay, the update and the
    averaged parameters are one pass over memory.

    Args:
        params: float32 parameters, or groups.
        lr: step size.
        betas: decay of mean and variance. A change below half a unit in the last place of a code is rounded away, so a
            variance stops falling for betas[1] > 1 - 2^-11 and a mean for betas[0] > 1 - 2^-10 (about 0.9995, 0.999).
        eps: added to the root of the variance.
        weight_decay: decoupled.
        variance_clip: running variances are clipped to this value before they are used or kept.
        ema_decay: keep averaged parameters with this decay in `state[p]["ema"]`; None keeps none.
        backend: "auto", "cuda", "cpu" or "reference".

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> optimizer = AdamW16(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4.5e-4,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
        variance_clip: float = 5.0,
        ema_decay: float | None = None,
        backend: str = "auto",
    ) -> None:
        for name, value, low, high in (
            ("lr", lr, 0.0, float("inf")),
            ("betas[0]", betas[0], 0.0, 1.0),
            ("betas[1]", betas[1], 0.0, 1.0),
            ("eps", eps, 0.0, float("inf")),
            ("weight_decay", weight_decay, 0.0, float("inf")),
            ("ema_decay", ema_decay or 0.0, 0.0, 1.0),
        ):
            if not low <= value < high:
                raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}), got {value}")
        if not 0 < variance_clip < 15.99:
            raise ValueError(f"variance_clip: expected a number in (0, 15.99), got {variance_clip}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "variance_clip": variance_clip,
            "ema_decay": ema_decay,
            "backend": backend,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0) -> Any:
        """One update.

        Args:
            closure: recomputes the loss, as in torch.optim.
            grad_scale: gradients are divided by it first.

        Returns:
            What `closure` returned.

        Raises:
            TypeError: a parameter is not float32, or its gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            if not updated:
                continue
            for p in updated:
                if p.dtype != torch.float32 or p.grad.is_sparse:
                    what = "a sparse gradient" if p.grad.is_sparse else f"dtype {p.dtype}"
                    raise TypeError(f"params: expected dense float32, got {what}")
                if not self.state[p]:
                    self._start(p, group["ema_decay"] is not None)
            steps = [self.state[p]["step"] for p in updated]
            torch._foreach_add_(steps, 1)
            by_step: dict[int, list[torch.Tensor]] = {}
            for p, number in zip(updated, torch.stack(steps).tolist(), strict=True):
                by_step.setdefault(number, []).append(p)
            for number, params in by_step.items():
                states = [self.state[p] for p in params]
                adamw16(
                    params,
                    [p.grad for p in params],
                    *([s[name] for s in states] for name in _CODES),
                    [s["ema"] for s in states if "ema" in s],
                    step=number,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    variance_clip=group["variance_clip"],
                    grad_scale=grad_scale,
                    ema_decay=group["ema_decay"] or 0.0,
                    backend=group["backend"],
                )
        return loss

    def _start(self, p: torch.Tensor, with_ema: bool) -> None:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.int64)
        for name in _CODES:  # in the parameter's memory order
            state[name] = torch.zeros_like(p, dtype=torch.uint16)
        if with_ema:
            state["ema"] = p.detach().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but the 16-bit codes keep their dtype (torch casts all state to the parameter's).

        `backend` stays as constructed: it belongs to this machine, and older checkpoints do not hold one.
        """
        backends = [group["backend"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, backend in zip(self.param_groups, backends, strict=True):
            group["backend"] = backend
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                value = value.detach()
                # codes and averages in the parameter's memory order, whatever the file had
                kept = value.cpu().clone() if name == "step" else torch.empty_like(p, dtype=value.dtype).copy_(value)
                self.state[p][name] = kept
