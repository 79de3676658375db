# SPDX-License-Identifier: MIT
"""AdamW that keeps its moments in 16 bits each (paper section 2.4, appendix B.2 and D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..ops._backend import check_backend
from ..ops._checks import check_bool, check_tensor, finite, shown
from ..ops.adamw16 import adamw16
from .shards import local_part

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
        capturable: keep the step numbers, and the step size as a tensor in `group["lr"]`, on the parameters' device:
            `step()` can be captured in a CUDA graph and replayed with other step sizes, scales and skip flags. Same
            numbers, same checkpoints.
        backend: "auto", "cuda", "cpu" or "reference".

    `torch.amp.GradScaler` leaves unscaling and skipping to `step()`, as with the fused optimizers of torch.

    Raises:
        TypeError: a parameter is no strided tensor, or a hyperparameter of the wrong type.
        ValueError: a hyperparameter is out of range, or there are no parameters, or one is there twice.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> optimizer = AdamW16(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 4.5e-4,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
        variance_clip: float = 5.0,
        ema_decay: float | None = None,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "variance_clip": variance_clip,
            "ema_decay": ema_decay,
            "capturable": capturable,
            "backend": backend,
        }
        _check_options(defaults)
        if isinstance(params, torch.Tensor) or not isinstance(params, Iterable):
            raise TypeError(f"params: expected an iterable of tensors or of groups, got {shown(params)}")
        params = list(params)
        if not params:
            raise ValueError("params: expected at least one tensor or group, got none")
        if any(isinstance(group, dict) for group in params) and not all(isinstance(group, dict) for group in params):
            raise TypeError("params: expected tensors or groups, got both")
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Optimizers that were pickled before there was `capturable`."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim.

        Raises:
            TypeError: it is no group of strided tensors.
            ValueError: a hyperparameter is out of range, or a tensor is not a leaf or in a group already.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f'param_group: expected a dict with "params", got {shown(param_group)}')
        params = param_group["params"]
        if isinstance(params, (str, bytes, set)) or not isinstance(params, (torch.Tensor, Iterable)):
            raise TypeError(f"params: expected a tensor or an iterable of them, got {shown(params)}")
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        there = {id(p) for group in self.param_groups for p in group["params"]}
        for i, p in enumerate(p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in params):  # named ones
            if not isinstance(p, torch.Tensor):
                raise TypeError(f"params[{i}]: expected a torch.Tensor, got {shown(p)}")
            if p.layout is not torch.strided or p.is_nested:
                raise TypeError(f"params[{i}]: expected a dense tensor, got {shown(p)} without strides")
            if not (p.is_leaf or p.retains_grad):
                raise ValueError(f"params[{i}]: expected a leaf, got the result of {p.grad_fn.name()}")
            if id(p) in there:
                raise ValueError(f"params[{i}]: expected each tensor once, got one that is in a group already")
            there.add(id(p))
        _check_options({**self.defaults, **param_group})
        super().add_param_group({**param_group, "params": params})
        group = self.param_groups[-1]
        if group["capturable"]:
            group["lr"] = _as_tensor(group["lr"], group)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | torch.Tensor = 1.0,
        found_inf: torch.Tensor | None = None,
    ) -> Any:
        """One update.

        Args:
            closure: recomputes the loss, as in torch.optim.
            grad_scale: gradients are divided by it first.
            found_inf: float32, one element; where it is not zero the update is skipped.

        Returns:
            What `closure` returned.

        Raises:
            TypeError: a parameter is not float32, its gradient is sparse or of a wrong dtype, or `grad_scale` or
                `found_inf` is of the wrong type.
            ValueError: `grad_scale` is not positive, elements of a parameter, or two parameters, share memory.
            RuntimeError: a CUDA graph is being captured and a group is not capturable.
        """
        grad_scale = _checked_scale(grad_scale, found_inf)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # what torch.amp.GradScaler leaves for a step
        if (scale := getattr(self, "grad_scale", None)) is not None:
            grad_scale = scale if isinstance(grad_scale, float) and grad_scale == 1.0 else scale * grad_scale
        found_inf = getattr(self, "found_inf", found_inf)
        for group in self.param_groups:
            self._step_group(group, grad_scale, found_inf)
        return loss

    def _step_group(
        self, group: dict[str, Any], grad_scale: float | torch.Tensor, found_inf: torch.Tensor | None
    ) -> None:
        updated = [p for p in group["params"] if p.grad is not None]
        if not updated:
            return
        states = [self.state[p] for p in updated]
        for p, state in zip(updated, states, strict=True):
            self._check(p)
            if not state:
                self._start(p, state, group)
        steps = [state["step"] for state in states]
        device = updated[0].device
        if group["capturable"] or device.type == "cpu":  # step numbers lie where the kernel counts them
            lr = group["lr"] if group["capturable"] else float(group["lr"])
            self._update(group, updated, states, steps, lr, _on(device, grad_scale), _on(device, found_inf))
            return
        if updated[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("step() is captured in a CUDA graph: construct AdamW16 with capturable=True")
        if found_inf is not None and found_inf.item():
            return
        torch._foreach_add_(steps, 1)
        by_step: dict[int, list[int]] = {}
        for i, number in enumerate(torch.stack(steps).tolist()):
            by_step.setdefault(number, []).append(i)
        for number, chosen in by_step.items():
            some = [updated[i] for i in chosen], [states[i] for i in chosen]
            self._update(group, *some, number, float(group["lr"]), float(grad_scale), None)

    @staticmethod
    def _check(p: torch.Tensor) -> None:
        sparse = p.grad.layout is not torch.strided
        if p.dtype != torch.float32 or sparse:
            what = "a sparse gradient" if sparse else f"dtype {p.dtype}"
            raise TypeError(f"params: expected dense float32, got {what}")

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        step: int | list[torch.Tensor],
        lr: float | torch.Tensor,
        grad_scale: float | torch.Tensor,
        found_inf: torch.Tensor | None,
    ) -> None:
        codes = ([s[name] for s in states] for name in _CODES)
        lists = [params, [p.grad for p in params], *codes, [s["ema"] for s in states if "ema" in s]]
        if any(hasattr(p, "to_local") for p in params):
            lists = [[local_part(t) for t in tensors] for tensors in lists]
        adamw16(
            *lists,
            step=step,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            variance_clip=group["variance_clip"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            ema_decay=group["ema_decay"] or 0.0,
            backend=group["backend"],
        )

    def _start(self, p: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.int64, device=p.device if group["capturable"] else "cpu")
        for name in _CODES:  # in the parameter's memory order
            state[name] = torch.zeros_like(p, dtype=torch.uint16)
        if group["ema_decay"] is not None:
            state["ema"] = p.detach().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but the 16-bit codes keep their dtype (torch casts all state to the parameter's).

        `backend` and `capturable` stay as constructed: they belong to this machine, and older checkpoints do not hold
        them. So does the tensor that holds a capturable group's step size, with the value loaded.
        """
        constructed = [{name: group[name] for name in ("backend", "capturable", "lr")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, constructed, strict=True):
            lr = float(group["lr"])
            group.update(kept)
            group["lr"] = _as_tensor(group["lr"], group).fill_(lr) if group["capturable"] else lr
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group["capturable"]) for group in self.param_groups for p in group["params"]]
        for i, (p, capturable) in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = self._restored(p, name, value, capturable)

    def _restored(self, p: torch.Tensor, name: str, value: torch.Tensor, capturable: bool) -> torch.Tensor:
        """What the state of a loaded optimizer holds under a name."""
        if name == "step":
            return value.detach().to("cpu" if not capturable else p.device, copy=True)
        # codes and averages in the parameter's memory order, whatever the file had
        return torch.empty_like(p, dtype=value.dtype).copy_(value.detach())


def _check_options(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for hyperparameters that cannot be."""
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {shown(betas)}")
    lr, ema_decay = options["lr"], options["ema_decay"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lr: expected a number or a float64 or float32 tensor of one element, got {shown(lr)}")
        lr = 0.0 if lr.device.type != "cpu" else float(lr)  # the host does not wait for a device
    for name, value, low, high in (
        ("lr", lr, 0.0, float("inf")),
        ("betas[0]", betas[0], 0.0, 1.0),
        ("betas[1]", betas[1], 0.0, 1.0),
        ("eps", options["eps"], 0.0, float("inf")),
        ("weight_decay", options["weight_decay"], 0.0, float("inf")),
        ("ema_decay", 0.0 if ema_decay is None else ema_decay, 0.0, 1.0),
    ):
        if not low <= finite(name, value) < high:
            raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}), got {value}")
    if not 0 < finite("variance_clip", options["variance_clip"]) < 15.99:
        raise ValueError(f"variance_clip: expected a number in (0, 15.99), got {options['variance_clip']}")
    check_bool("capturable", options["capturable"])
    check_backend(options["backend"])


def _checked_scale(grad_scale: Any, found_inf: Any) -> float | torch.Tensor:
    """`grad_scale`, a number as a float."""
    if found_inf is not None:
        _check_element("found_inf", found_inf)
    if isinstance(grad_scale, torch.Tensor):
        _check_element("grad_scale", grad_scale)
        return grad_scale
    scale = finite("grad_scale", grad_scale)
    if not scale > 0:
        raise ValueError(f"grad_scale: expected a positive number, got {grad_scale}")
    return scale


def _check_element(name: str, value: Any) -> None:
    check_tensor(name, value, (torch.float32,), "a float32")
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {list(value.shape)}")


def _as_tensor(lr: float | torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    if isinstance(lr, torch.Tensor):
        return lr
    return torch.full((), float(lr), dtype=torch.float64, device=group["params"][0].device)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
