# SPDX-License-Identifier: MIT
"""AdamW16: constructed, stepped and loaded rightly and wrongly, beside the same optimizer on the reference."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from typing import Any

import torch

from dalle_fast.ops.minifloat.reference import minifloat_decode_reference
from dalle_fast.optim import AdamW16

from . import arguments as kinds
from .arguments import Draw, show
from .calls import CONTEXTS, REFUSALS, is_real, overlaps, same_bits, snapshot
from .runner import Outcome

OPTIONS = ("lr", "betas", "eps", "weight_decay", "variance_clip", "ema_decay", "capturable", "backend")
NAMES = ("params", "grads", "param_group", "grad_scale", "found_inf", *OPTIONS)
# codes have 9 and 10 bits; where float32 sums straddle a tie they are one apart, also before terms that cancel
_TOLERANCE = {"p": (1e-5, 1e-6), "mean": (8e-3, 1e-5), "variance": (8e-3, 1e-9), "ema": (1e-5, 1e-6)}


class OptimizerCall:
    """Some parameters, hyperparameters and updates."""

    num_parts = 0

    def __init__(self, seed: int, number: int) -> None:
        draw = Draw(f"adamw16/{seed}/{number}")
        self.expect, self.notes = "right", []
        self.params = [
            draw.tensor(*(draw.size(most=17) for _ in range(draw.integer(0, 3)))) for _ in range(draw.integer(1, 4))
        ]
        self.options: dict[str, Any] = {
            name: draw.choice(values)
            for name, values in {
                "lr": (1e-2, 0.0, 1, 4.5e-4, torch.tensor(1e-2, dtype=torch.float64)),
                "betas": ((0.9, 0.96), (0.0, 0.5), [0.5, 0.9]),
                "eps": (1e-8, 1e-3),
                "weight_decay": (0.0, 4.5e-2),
                "variance_clip": (5.0, 1e-3),
                "ema_decay": (None, 0.9, 0.0),
                "capturable": (False, True),
                "backend": ("auto", "cpu"),
            }.items()
            if draw.chance(0.4)
        }
        self.steps = draw.integer(1, 3)
        self.grads = [[draw.tensor(*p.shape, scale=1e-2) for p in self.params] for _ in range(self.steps)]
        self.scaling: dict[str, Any] = {}
        if draw.chance(0.3):
            self.scaling["grad_scale"] = draw.choice((8.0, 1024, torch.tensor(8.0)))
        if draw.chance(0.3):
            self.scaling["found_inf"] = torch.tensor(draw.choice((0.0, 1.0))).view(draw.choice(((), (1,))))
        self.context = draw.choice(sorted(CONTEXTS)) if draw.chance(0.2) else ""
        if self.context == "inference_mode":
            self.context = "no_grad"
        for _ in range(draw.choice((0, 1, 1, 2))):
            getattr(self, draw.choice(("_layout", "_layout", "_layout", "_special", "_share")))(draw)
        for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
            if isinstance(self.params, list):
                getattr(self, draw.choice(("_option", "_option", "_param", "_scale", "_gradient")))(draw)

        if self._shares_memory():
            self._weaken("either" if "gradient: none" in self.notes else "wrong")
        self.start = snapshot(self._real())

    def _weaken(self, expect: str) -> None:
        self.expect = max(self.expect, expect, key=("right", "either", "wrong").index)

    # ---- what is done to them

    def _layout(self, draw: Draw) -> None:
        lists = draw.choice((self.params, *self.grads))
        i = draw.integer(0, len(lists) - 1)
        layout = draw.choice(sorted(set(kinds.LAYOUTS) - {"negative view"}))
        if is_real(lists[i]) and (lists[i].dim() or layout in ("offset", "between elements")):
            lists[i] = kinds.LAYOUTS[layout](lists[i], draw)
            self.notes.append(layout)

    def _special(self, draw: Draw) -> None:
        grads = draw.choice(self.grads)
        i = draw.integer(0, len(grads) - 1)
        if is_real(grads[i]) and grads[i].is_floating_point():
            grads[i] = draw.choice((kinds.special, kinds.extreme))(grads[i], draw)
            self.notes.append("special gradient")

    def _share(self, draw: Draw) -> None:
        """Parameters whose elements share memory, or that share it with each other."""
        i = draw.integer(0, len(self.params) - 1)
        old = self.params[i]
        if not is_real(old) or not old.dim() or old.numel() < 2:
            return
        if draw.chance(0.5):
            self.params[i] = kinds.expanded(old, draw)
        else:
            self.params.append(old.detach().view(old.shape))
            for grads in self.grads:
                grads.append(draw.tensor(*old.shape))
        self.notes.append("shared memory")

    def _shares_memory(self) -> bool:
        real = [p for p in self._real() if p.numel()]
        ranges = sorted((p.data_ptr(), p.data_ptr() + p.itemsize * (1 + _reach(p))) for p in real)
        return any(overlaps(p) for p in real) or any(a[1] > b[0] for a, b in itertools.pairwise(ranges))

    def _option(self, draw: Draw) -> None:
        name = draw.choice(OPTIONS)
        value = draw.choice(kinds.NUMBERS + kinds.JUNK)
        if name == "betas" and draw.chance(0.6):
            value = (value, 0.9) if draw.chance(0.5) else (0.9, value)
        self.options[name] = value
        self.notes.append(f"{name} replaced")
        self._weaken("either")

    def _param(self, draw: Draw) -> None:
        i = draw.integer(0, len(self.params) - 1)
        old = self.params[i]
        if not is_real(old):
            return
        kind = draw.choice(("junk", "dtype", "sparse", "twice", "all", "meta", "no leaf"))
        if kind == "junk":
            self.params[i] = draw.choice([j for j in kinds.JUNK if not isinstance(j, (list, tuple))])
        elif kind == "dtype":
            self.params[i] = kinds.other_dtype(old, draw)
        elif kind == "sparse":
            self.params[i] = kinds.foreign_layout(old, draw)
        elif kind == "meta":
            self.params[i] = old.to("meta")
        elif kind == "no leaf" and not old.is_floating_point():
            return
        elif kind == "no leaf":
            self.params[i] = old.detach().requires_grad_() * 1
        elif kind == "twice":
            self.params.append(old)
            for grads in self.grads:
                grads.append(grads[i])
        else:
            self.params = draw.choice([j for j in kinds.JUNK if not isinstance(j, list)])
        self.notes.append(f"params: {kind}")
        self._weaken("either" if kind in ("dtype", "meta") else "wrong")

    def _scale(self, draw: Draw) -> None:
        name = draw.choice(("grad_scale", "found_inf"))
        value = kinds.number_tensors(draw) if draw.chance(0.3) else draw.choice(kinds.NUMBERS + kinds.JUNK)
        self.scaling[name] = value
        self.notes.append(f"{name} replaced")
        self._weaken("either")

    def _gradient(self, draw: Draw) -> None:
        grads = draw.choice(self.grads)
        i = draw.integer(0, len(grads) - 1)
        if not is_real(grads[i]):
            return
        kind = draw.choice(("none", "dtype", "sparse"))
        if kind == "none":
            grads[i] = None
        else:
            grads[i] = kinds.other_dtype(grads[i], draw) if kind == "dtype" else kinds.foreign_layout(grads[i], draw)
            self._weaken("either")
        self.notes.append(f"gradient: {kind}")

    # ---- running

    def describe(self) -> str:
        options = {**self.options, **self.scaling}
        text = ", ".join(f"{k}={show(v)}" for k, v in options.items())
        grads = "; ".join(show(g) for g in self.grads)
        notes = "; ".join([self.expect, *self.notes, *filter(None, [self.context])])
        return f"AdamW16({show(self.params)}, {text}), {self.steps} steps with gradients {grads}   [{notes}]"

    def run(self) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._run()

    def _run(self) -> Outcome:
        before = snapshot(self._real())
        optimizer = None
        try:
            optimizer, params = self._construct(self.params, self.options)
            for grads in self.grads:
                before = snapshot(self._real())
                if not self._give(params, grads):
                    return Outcome("refused", "torch refuses the gradient")
                with CONTEXTS[self.context]() if self.context else contextlib.nullcontext():
                    optimizer.step(**self.scaling)
        except Exception as error:
            return self._refused(error, before)
        if self.expect == "wrong":
            return Outcome("accepted", "wrong parameters were updated")
        return self._check(optimizer, params)

    def _real(self) -> list[torch.Tensor]:
        return [p for p in self.params if is_real(p)] if isinstance(self.params, list) else []

    @staticmethod
    def _construct(params: Any, options: dict[str, Any]) -> tuple[AdamW16, Any]:
        options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return AdamW16(params, **options), params

    @staticmethod
    def _give(params: Any, grads: list) -> bool:
        """Whether torch lets the gradients be those of the parameters."""
        for p, g in zip(params, grads):
            try:
                if isinstance(g, torch.Tensor) and g.dtype != p.dtype:
                    p.grad_dtype = None
                p.grad = g
            except (RuntimeError, TypeError):
                return False
        return True

    def _refused(self, error: Exception, before: list) -> Outcome:
        text = f"{type(error).__name__}: {error}"
        if self.expect == "right":
            return Outcome("refused a right call", text)
        named = re.match(rf"({'|'.join(NAMES)})(\[\d+\])*: .*(\bgot\b|is not supported)", str(error), re.DOTALL)
        if type(error) not in REFUSALS or not (named or "cannot run" in str(error)):
            return Outcome("raw", text)
        if not same_bits(snapshot(self._real()), before):
            return Outcome("changed", f"parameters have other values after {text}")
        return Outcome("refused", text)

    def _check(self, optimizer: AdamW16, params: list[torch.Tensor]) -> Outcome:
        """The same updates on the reference."""
        if not all(is_real(p) for p in params) or "special gradient" in self.notes or self._shares_memory():
            return Outcome("right")
        if any(
            isinstance(value, (int, float)) and value > 100 for value in self.options.values()
        ):  # numbers beyond any tolerance
            return Outcome("right")
        twin, twins = self._construct([p.clone() for p in self.start], {**self.options, "backend": "reference"})
        for grads in self.grads:
            for p, g in zip(twins, grads):
                p.grad = None if g is None else snapshot(g).float()
            twin.step(**self.scaling)
        for i, (p, q) in enumerate(zip(params, twins)):
            pairs = {"p": (p, q)} | {k: (v, twin.state[q][k]) for k, v in optimizer.state[p].items() if k != "step"}
            for name, (a, e) in pairs.items():
                a, e = snapshot(a), snapshot(e)
                if name in ("mean", "variance"):
                    fmt = "1-6-9" if name == "mean" else "0-6-10"
                    a, e = (minifloat_decode_reference(t, fmt) for t in (a, e))
                rtol, atol = _TOLERANCE[name]
                if name in ("p", "ema"):  # a code may be the next one where float32 sums straddle a tie
                    atol += 2e-2 * float(self.options.get("lr", 4.5e-4))
                off = ~torch.isclose(a, e, rtol=rtol, atol=atol, equal_nan=True)
                if off.any():
                    return Outcome("value", f"{name} of parameter {i}: {int(off.sum())} of {off.numel()} differ")
        return Outcome("right")


def _reach(t: torch.Tensor) -> int:
    """Elements from the first to the last in memory."""
    return sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape))


class OptimizerTarget:
    """AdamW16."""

    name = "adamw16"

    def make(self, seed: int, number: int, without: frozenset[int] = frozenset()) -> OptimizerCall:
        return OptimizerCall(seed, number)
