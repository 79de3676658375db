# SPDX-License-Identifier: MIT
"""One gradient scale per resblock for training in float16 (paper section 2.4, appendix D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .shards import local_part

# Scales in steps of 2^(1/1000), counted from M, the number of data-parallel replicas (appendix D).
STEPS_PER_OCTAVE = 1000
INITIAL = 13 * STEPS_PER_OCTAVE
"""M * 2^13."""
LOWEST, HIGHEST = 7 * STEPS_PER_OCTAVE, 24 * STEPS_PER_OCTAVE
"""Clamped to [M * 2^7, M * 2^24]."""
GROWTH = 1
"""* 2^(1/1000) after an update in which all gradients of the block are finite."""
DIVISION = STEPS_PER_OCTAVE // 2
"""/ sqrt(2) after one in which some are not."""
WINDOW = 125
"""Two divisions of one scale are at least so many updates apart."""


class ResblockGradScaler:
    """Keeps the gradients of each resblock within the range of float16 by a scale of its own.

    The backward pass of resblock i works on gradients times `scales[i]` (`dalle_fast.nn.scaled_branch`), so the
    gradients of its parameters carry that factor. `unscale_` removes it and looks for what is not finite; `update`
    moves the scales: a resblock with finite gradients multiplies its own by 2^(1/1000), one with an Inf or NaN divides
    it by sqrt(2), but not twice within 125 updates. Growth and division are steps on the lattice M * 2^(k / 1000), so
    the state is integers: exact, equal on every rank, and independent of M. All of it runs on the device of the
    parameters; nothing is read back to the host.

    With M replicas divide the loss by the global batch, sum the gradients, and pass `num_replicas=M`: the factor M in
    the scales makes up for the division (appendix D). Parameters may be DTensors (`fully_shard`): each rank looks at
    its shards, and `reduce_flags` shares what it found.

    Args:
        resblocks: parameters of each resblock, in the order of `scales`; `DALLE.resblock_parameters()`.
        num_replicas: M.
        reduce_flags: called in each `unscale_` with the flags, float32 [N], to take their maximum over all ranks, e.g.
            `lambda flags: dist.all_reduce(flags, dist.ReduceOp.MAX)`.

    Raises:
        ValueError: there is no resblock, or `num_replicas` is not positive.

    Example:
        >>> scaler = ResblockGradScaler(model.resblock_parameters())
        >>> model.set_gradient_scales(scaler.scales)
        >>> model.loss(text, image).loss.backward()  # several times to accumulate
        >>> scaler.unscale_()
        >>> if not scaler.found_inf:  # or hand the tensor to a fused optimizer
        ...     optimizer.step()
        >>> scaler.update()
    """

    def __init__(
        self,
        resblocks: Iterable[Sequence[torch.Tensor]],
        num_replicas: int = 1,
        reduce_flags: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self._resblocks = [list(parameters) for parameters in resblocks]
        if not self._resblocks or not all(self._resblocks):
            raise ValueError("resblocks: expected at least one, each with parameters")
        if num_replicas < 1:
            raise ValueError(f"num_replicas: expected at least 1, got {num_replicas}")
        self.num_replicas = num_replicas
        self._reduce_flags = reduce_flags
        count, device = len(self._resblocks), self._resblocks[0][0].device
        self.exponents = torch.full((count,), INITIAL, dtype=torch.int32, device=device)  # [N]
        """The scales are M * 2^(exponents / 1000)."""
        self._cooldown = torch.zeros_like(self.exponents)  # [N], updates in which a scale is not divided again
        self.scales = torch.empty(count, device=device)  # [N]
        """float32 [N], changed in place: resblocks may keep views."""
        self.inverse_scales = torch.empty_like(self.scales)  # [N]
        """What gradients are multiplied by; for who unscales on the way, as `powersgd_project` does."""
        self.flags = torch.zeros_like(self.scales)  # [N]
        """float32 [N]: 1 where `unscale_` met a gradient that is not finite; who unscales on the way adds to it."""
        self.lowered = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last `update` made any scale smaller."""
        self._set_scales()

    @property
    def found_inf(self) -> torch.Tensor:
        """float32 scalar: 1 when a resblock has a gradient that is not finite, so that the update is to be skipped."""
        return self.flags.amax()

    @torch.no_grad()
    def unscale_(self) -> None:
        """Divides the gradients of each resblock by its scale, in place, and sets the flags. Once per update."""
        self.flags.zero_()
        for i, parameters in enumerate(self._resblocks):
            grads = [local_part(p.grad) for p in parameters if p.grad is not None]
            if grads:
                torch._amp_foreach_non_finite_check_and_unscale_(
                    grads, self.flags[i : i + 1], self.inverse_scales[i : i + 1]
                )
        if self._reduce_flags is not None:
            self._reduce_flags(self.flags)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the scales by what `unscale_` found, whether or not the update was skipped."""
        overflowed = self.flags > 0
        divided = overflowed & (self._cooldown == 0)
        self.lowered.copy_((divided & (self.exponents > LOWEST)).any())
        self.exponents.add_(GROWTH * ~overflowed - DIVISION * divided).clamp_(LOWEST, HIGHEST)
        self._cooldown.sub_(1).clamp_(min=0).masked_fill_(divided, WINDOW - 1)
        self._set_scales()

    def _set_scales(self) -> None:
        # in float64, whose exp2 leaves the same float32 on every device
        self.scales.copy_(torch.exp2(self.exponents.double() / STEPS_PER_OCTAVE) * self.num_replicas)
        torch.reciprocal(self.scales, out=self.inverse_scales)

    def state_dict(self) -> dict[str, list[int]]:
        """JSON values that `load_state_dict` takes back, at any number of replicas."""
        return {"exponents": self.exponents.tolist(), "cooldown": self._cooldown.tolist()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            ValueError: it belongs to another number of resblocks.
        """
        count = len(self._resblocks)
        for name, tensor in (("exponents", self.exponents), ("cooldown", self._cooldown)):
            values = state.get(name, [])
            if len(values) != count:
                raise ValueError(f"state: expected {count} values in {name!r}, got {len(values)}")
            tensor.copy_(torch.tensor(values, dtype=torch.int32))
        self._set_scales()
