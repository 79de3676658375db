# SPDX-License-Identifier: MIT
"""PowerSGD: gradients cross machines as two thin 16-bit factors (Vogels et al. 2019; DALL-E section 2.5, appendix E).

Per matrix: E += G; P = mean(E Q) with Q fixed; P <- orthonormal; R = mean(E^T P); gradient P R^T; E -= P R^T.

One convention for the two averages: a rank's loss is the mean over its own samples, as DDP has it, and both P and R are
averaged over the ranks. P R^T is then the part of the global mean loss's gradient that lies in the span of P, all of it
at full rank. (With losses divided by the global batch, R would be a sum and each rank would take P R^T / ranks from its
E: the same numbers.) What is left in the mean of E is what has not been applied yet.

A block (a DDP bucket, an FSDP module) passes through a pipeline that stops whenever a collective is under way. When the
next block arrives its P leaves first, then older ones go on, so that factors travel while backward computes. The order
depends on the blocks' order alone: all ranks issue the same collectives in the same order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..ops import minifloat_decode, orthonormalize, powersgd_project, powersgd_reconstruct
from ..optim.shards import local_part
from .blocks import Block, Plain, Verdict
from .matrices import KEEP, SPLIT, Entry, Sizes, clean_name, count_sizes, make_entry, sharded_like
from .wire import Traffic, all_reduce_codes, averaging, flatten_codes, ring_bytes

LARGE = 1 << 16  # uncompressed gradients of so many numbers leave with their block, smaller ones together at the end


class PowerSGD:
    """Compresses the gradients of a model that is trained on several machines.

    Embeddings, heads, gains and biases travel as float32; all other weights as factors in the 1-6-9 format, each with
    an error buffer in that format (2 bytes a parameter, no other gradient buffer). After `backward` the gradients of
    all ranks are the same, clipped, and `grad_norm` has their norm before that. If it is not finite, skip the update:
    the gradients hold NaN then.

    Args:
        module: the model, before or after DDP or `fully_shard` wrapped it (for `fully_shard`: after).
        rank: of the factors, in total: each of m shards has rank / m.
        group: ranks that hold the same parameters; None: those of `module` if it is DDP, else all.
        shard_group: ranks that hold the other shards of them, within a machine.
        clip_norm: largest global norm of the gradients; None: no limit.
        seed: of the fixed Gaussian factors.
        grad_scale: the scale that the gradient of a named parameter carries; gradients are divided by it first.
        grad_constant, p_constant, q_constant: gradients in E, P and R are kept times these, to fit a format that ends
            at 16 (powers of two: they change no result unless something over- or underflows).
        eps: times the identity is added to P, in units of the gradient. A matrix whose gradients are far smaller is
            heard late: when enough of them has come together in E.
        keep: patterns (fnmatch) of parameter names that are not compressed.
        split: patterns of parameters that are several matrices one below the other, and how many.
        mode: how codes are averaged: "auto", "gather" or "scatter" (`all_reduce_codes`).
        backend: "auto", "cpu", "cuda" or "reference", for the ops.

    Raises:
        ValueError: a number out of range, or a rank that the shards do not divide.

    Example:
        >>> import torch.distributed as dist
        >>> from dalle_fast.parallel import PowerSGD, powersgd_hook
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ddp = DistributedDataParallel(model)
        >>> powersgd = PowerSGD(ddp, rank=4, clip_norm=1.0)
        >>> ddp.register_comm_hook(powersgd, powersgd_hook)
        >>> ddp(torch.randn(16, 64)).square().mean().backward()
        >>> if powersgd.finite:
        ...     optimizer.step()
        >>> powersgd.traffic.bytes_sent  # to nobody: there is one rank
        0
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int,
        group: dist.ProcessGroup | None = None,
        shard_group: dist.ProcessGroup | None = None,
        clip_norm: float | None = None,
        seed: int = 0,
        grad_scale: Callable[[str], float] | None = None,
        grad_constant: float = 1.0,
        p_constant: float = 2.0**-6,
        q_constant: float = 2.0**-6,
        eps: float = 1e-6,
        keep: Sequence[str] = KEEP,
        split: Mapping[str, int] = SPLIT,
        mode: str = "auto",
        backend: str = "auto",
    ) -> None:
        for name, value in (
            ("clip_norm", clip_norm),
            ("grad_constant", grad_constant),
            ("p_constant", p_constant),
            ("q_constant", q_constant),
        ):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if mode not in ("auto", "gather", "scatter"):
            raise ValueError(f"mode: expected 'auto', 'gather' or 'scatter', got {mode!r}")
        num_shards = shard_group.size() if shard_group is not None else 1
        if rank < 1 or rank % num_shards:
            raise ValueError(f"rank: expected a positive multiple of the {num_shards} shards, got {rank}")
        self.group = group or getattr(module, "process_group", None) or dist.group.WORLD
        self.shard_group = shard_group
        self.clip_norm, self.seed, self.eps = clip_norm, seed, eps
        self.grad_scale = grad_scale
        self.grad_constant, self.p_constant, self.q_constant = grad_constant, p_constant, q_constant
        self.mode, self.backend = mode, backend
        self.traffic = Traffic()
        """What this rank has sent."""
        self.grad_norm = 0.0
        """Global norm of the last gradients before clipping; inf where the update has to be skipped."""
        self.nonfinite: frozenset[str] = frozenset()
        """Parameters with a gradient, error buffer or factor that was not finite on some rank, in the last backward."""
        shard = dist.get_rank(shard_group) if shard_group is not None else 0
        self._entries = [
            make_entry(clean_name(name), parameter, rank // num_shards, keep, split, seed, shard)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        if not self._entries:
            raise ValueError("module: expected parameters that require a gradient, got none")
        self.device = local_part(self._entries[0].parameter).device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        """Where factors are computed and sent, beside the stream of backward; None on CPU."""
        self._entry_of = {id(entry.parameter): entry for entry in self._entries}
        self._blocks: list[Block] = []
        self._running: list[Generator[None, None, None]] = []

    @property
    def finite(self) -> bool:
        """Whether the last gradients may be applied."""
        return math.isfinite(self.grad_norm)

    @property
    def sizes(self) -> Sizes:
        """How much is compressed to how much."""
        return count_sizes(
            (math.prod(local_part(e.parameter).shape), [(*m.error.shape, m.rank) for m in e.matrices])
            for e in self._entries
        )

    # ---- blocks

    def entry(self, parameter: nn.Parameter) -> Entry:
        """What is kept of a parameter.

        Raises:
            ValueError: the module given to PowerSGD does not have it.
        """
        found = self._entry_of.get(id(parameter))
        if found is None:
            raise ValueError(f"PowerSGD: its module has no parameter of shape {list(parameter.shape)} like this one")
        return found

    @torch.no_grad()
    def start(self, gradients: list[tuple[Entry, torch.Tensor]], when_done: Callable[[], None] | None = None) -> None:
        """Takes a block of gradients, which `finish` will overwrite, and gets its factors on their way.

        The work is queued on `stream`, after what is queued on the current one; `finish` calls `when_done`.
        """
        with self._on_stream():
            block = Block(gradients, when_done)
            older = list(self._running)
            self._blocks.append(block)
            self._running.append(self._compress(block))
            self._go_on(self._running[-1])
            for pipeline in older:
                self._go_on(pipeline)

    def reset(self) -> None:
        """Forgets blocks of a backward pass that did not come to its end."""
        self._blocks, self._running = [], []

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def _go_on(self, pipeline: Generator[None, None, None]) -> None:
        try:
            next(pipeline)
        except StopIteration:
            self._running.remove(pipeline)

    def _inverse_scale(self, entry: Entry) -> float:
        return 1.0 / self.grad_scale(entry.name) if self.grad_scale is not None else 1.0

    def _compress(self, block: Block) -> Generator[None, None, None]:
        """Steps of a block until its factors are everywhere; stops while a collective is under way."""
        large = [(e, g) for e, g in block.gradients if not e.matrices and g.numel() >= LARGE]
        if large:
            block.plain.append(self._send_plain(large))
        factors, status = [], []
        for entry, grad in block.gradients:
            grad = grad.reshape(grad.shape[0], -1) if entry.matrices else grad
            for matrix in entry.matrices:
                product = powersgd_project(
                    matrix.error,
                    matrix.factor,
                    matrix.of(grad),
                    inverse_grad_scale=self._inverse_scale(entry) * self.grad_constant,
                    scale=self.p_constant,
                    backend=self.backend,
                )
                block.matrices.append(matrix)
                factors.append(product.code)
                status.append(product.status)
        if not block.matrices:
            block.failed = torch.zeros(0, 4, device=self.device)
            return
        block.bases = yield from self._average(factors)
        eps = self.eps * self.grad_constant * self.p_constant
        block.bases = orthonormalize(block.bases, eps, backend=self.backend)
        factors = []
        for i, matrix in enumerate(block.matrices):
            product = powersgd_project(matrix.error.mT, block.bases[i], scale=self.q_constant, backend=self.backend)
            factors.append(product.code)
            status[i] = torch.cat((status[i], product.status[2:]))
        block.failed = 1.0 - torch.stack(status)
        block.factors = yield from self._average(factors)
        block.norm = minifloat_decode(flatten_codes(block.factors), "1-6-9", backend=self.backend).norm()

    def _average(self, codes: list[torch.Tensor]) -> Generator[None, None, list[torch.Tensor]]:
        """All factors of a block in one exchange."""
        flat = yield from averaging(self.group, flatten_codes(codes), self.mode, self.traffic)
        parts = flat.split([code.numel() for code in codes])
        return [part.view(code.shape) for part, code in zip(parts, codes)]

    def _send_plain(self, gradients: list[tuple[Entry, torch.Tensor]], *extra: torch.Tensor) -> Plain:
        """Starts the sum of gradients, and of `extra` numbers behind them, as float32."""
        pieces = [grad.reshape(-1).float() * self._inverse_scale(entry) for entry, grad in gradients]
        flat = torch.cat([*pieces, *extra])
        ranks, work = self.group.size(), None
        if ranks > 1 and flat.numel():
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            self.traffic.add(ring_bytes(flat.numel(), ranks))
        return Plain(gradients, flat, work)

    # ---- the end of backward

    @torch.no_grad()
    def finish(self, targets: Mapping[str, torch.Tensor] | None = None) -> None:
        """Ends the blocks' exchanges, then decompresses, clips and writes all gradients and updates error buffers.

        Gradients go where they came from, or to the tensors named in `targets`.
        The host waits for the device once (twice with shards): what comes next depends on the global norm.
        """
        if not self._blocks:
            return
        with self._on_stream():
            grouped = None
            while self._running or grouped is None:
                for pipeline in list(self._running):
                    self._go_on(pipeline)
                if grouped is None and all(block.failed is not None for block in self._blocks):
                    grouped = self._send_grouped()
            blocks, self._blocks = self._blocks, []
            plain = [p for block in blocks for p in block.plain] + [grouped]
            for sent in plain:
                if sent.work is not None:
                    sent.work.wait()
            self._judge(blocks, plain)
            for sent in plain:
                self._write_plain(sent, targets or {})
            for block in blocks:
                self._write_block(block, targets or {})
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        for block in blocks:
            if block.when_done is not None:
                block.when_done()

    def _send_grouped(self) -> Plain:
        """One sum of all small gradients; the flags of all matrices ride along."""
        small = [(e, g) for block in self._blocks for e, g in block.gradients if not e.matrices and g.numel() < LARGE]
        return self._send_plain(small, *(block.failed.flatten() for block in self._blocks))

    def _judge(self, blocks: list[Block], plain: list[Plain]) -> None:
        """Sets `grad_norm`, `nonfinite` and the verdicts on all matrices from what all ranks have said."""
        grouped = plain[-1]
        num_small = sum(grad.numel() for _, grad in grouped.gradients)
        shared, grouped.flat = grouped.flat[num_small:], grouped.flat[:num_small]
        for sent in plain:
            sent.flat.div_(self.group.size())
        parts = [part for sent in plain for part in sent.parts()]
        norms = list(torch._foreach_norm(parts)) if parts else []
        norms += [block.norm for block in blocks if block.norm is not None]
        here = torch.cat([block.failed[:, 1] for block in blocks])
        numbers = torch.cat([shared, here, torch.stack(norms)]).tolist()  # the one wait for the device
        count = len(here)
        norms = numbers[5 * count :]
        square = math.fsum(x * x for x in norms[: len(parts)])
        square += math.fsum(x * x for x in norms[len(parts) :]) / (self.q_constant * self.grad_constant) ** 2

        failures = dict.fromkeys((entry.name for entry in self._entries), 0.0)
        for (entry, _), norm in zip((pair for sent in plain for pair in sent.gradients), norms):
            failures[entry.name] += not math.isfinite(norm)
        verdicts = (Verdict(*numbers[4 * i : 4 * i + 4], numbers[4 * count + i]) for i in range(count))
        for block in blocks:
            for entry, _ in block.gradients:
                for _ in entry.matrices:
                    block.verdicts.append(next(verdicts))
                    failures[entry.name] += sum(block.verdicts[-1][:4])
        if self.shard_group is not None:
            square = square if math.isfinite(square) else math.inf
            total = torch.tensor([square, *failures.values()], dtype=torch.float64, device=self.device)
            dist.all_reduce(total, group=self.shard_group)
            square, *sums = total.tolist()
            failures = dict(zip(failures, sums))
        self.nonfinite = frozenset(name for name, failed in failures.items() if failed)
        self.grad_norm = math.inf if self.nonfinite else math.sqrt(square)

    def _clip(self) -> float:
        """What gradients are multiplied by."""
        if not self.finite:
            return math.nan
        return min(1.0, self.clip_norm / (self.grad_norm + 1e-6)) if self.clip_norm is not None else 1.0

    def _write_plain(self, sent: Plain, targets: Mapping[str, torch.Tensor]) -> None:
        clip = self._clip()
        if clip != 1.0:
            sent.flat.mul_(clip)
        for (entry, grad), part in zip(sent.gradients, sent.parts()):
            targets.get(entry.name, grad).copy_(part.view(grad.shape))

    def _write_block(self, block: Block, targets: Mapping[str, torch.Tensor]) -> None:
        """Decompresses a block's gradients; E keeps what is left of it, or all where a factor was not finite."""
        factors = zip(block.matrices, block.bases, block.factors, block.verdicts)
        # Where the norm is not finite neither is the clip; the gradients become NaN below, E still takes what is left.
        grad_factor = self._clip() / (self.q_constant * self.grad_constant) if self.finite else 0.0
        for entry, grad in block.gradients:
            if not entry.matrices:
                continue
            grad = targets.get(entry.name, grad)
            rows = grad.reshape(grad.shape[0], -1)
            for matrix, p, r, verdict in (next(factors) for _ in entry.matrices):
                if verdict.p or verdict.r:  # then the norm is not finite: the update is skipped
                    if verdict.error_here:
                        matrix.error.zero_()
                    continue
                target = matrix.of(rows)
                written = powersgd_reconstruct(
                    p,
                    r,
                    matrix.error,
                    grad_factor=grad_factor,
                    error_factor=1.0 / self.q_constant,
                    out=target if target.dtype == torch.float32 else None,
                    backend=self.backend,
                )
                if written is not target:
                    target.copy_(written)
            if not self.finite:
                grad.fill_(math.nan)
            elif rows.data_ptr() != grad.data_ptr():  # a gradient whose rows are not contiguous
                grad.copy_(rows.view(grad.shape))

    # ---- checkpoints

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What decides the steps to come; called by all ranks.

        Error feedback depends on the mean of the error buffers over `group` alone (appendix E: their sum, which with
        gradients of the global batch is the same numbers). So that is what is returned, for this shard, and what all
        ranks go on with, so that a run resumed from here has the same bits as one that was not stopped. Buffers of
        sharded parameters are DTensors, for torch.distributed.checkpoint.
        """
        error = {}
        for entry in self._entries:
            if entry.error is not None:
                all_reduce_codes(self.group, [entry.error], self.mode)
                error[entry.name] = sharded_like(entry.error.clone(), entry.parameter)
        return {"seed": self.seed, "grad_constant": self.grad_constant, "error": error}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state, from any number of ranks; `state_dict` was called with as many shards, or resharded.

        Raises:
            ValueError: another seed or constant, or buffers of other parameters.
        """
        for name in ("seed", "grad_constant"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: expected {getattr(self, name)} as constructed, got {state[name]}")
        mine = {entry.name: entry for entry in self._entries if entry.error is not None}
        if mine.keys() != state["error"].keys():
            odd = sorted(mine.keys() ^ state["error"].keys())
            raise ValueError(f"error: expected buffers of the compressed parameters; {odd[0]} is only on one side")
        for name, entry in mine.items():
            saved = local_part(state["error"][name])
            if saved.shape != entry.error.shape:
                raise ValueError(f"{name}: expected shape {list(entry.error.shape)}, got {list(saved.shape)}")
            entry.error.copy_(saved)
