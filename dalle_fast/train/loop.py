# SPDX-License-Identifier: MIT
"""The one training loop: updates, averaged weights, logs, pictures, checkpoints, resume, signals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, TrainingError
from ..models.store import (
    find_latest,
    load_weights,
    model_files,
    prune,
    read_json,
    read_tensors,
    save_snapshot,
    write_atomic,
)
from ..optim.gradient_scale import WINDOW
from .histograms import GradientHistograms, plot_gradients
from .recipe import Recipe
from .report import Meter, MetricsLog


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM came; the run has been saved. `signal_number` says which."""

    def __init__(self, signal_number: int, run_dir: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}; saved in {run_dir}. The same command goes on from there.")
        self.signal_number = signal_number


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    run_dir: Path
    checkpoint: Path
    step: int
    metrics: dict[str, float]
    """The last logged averages and held-out metrics."""
    seconds: float
    """Since the run was started or resumed."""


@dataclass
class _Window:
    """Sums since the last log line; part of the checkpoint, so that a resumed log is the uninterrupted one."""

    count: int = 0
    skipped: int = 0
    replaced: int = 0
    examined: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, float]) -> None:
        self.count += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        updates = self.count - self.skipped  # the only ones with a gradient norm
        return {name: value / (updates if name == "grad_norm" else self.count) for name, value in self.sums.items()}


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """ "auto" | "fp32" | "bf16" | "fp16-resblock" -> dtype of the autocast region (float32: none)."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            capabilities = torch.backends.cpu.get_cpu_capability()
            fast = "AVX512" in capabilities and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


class Loop:
    """Trains a recipe in a folder.

    Args:
        recipe: the stage.
        run_dir: its folder; `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/` appear in it.
        quiet: print nothing.
        on_phase: called with the name of each phase of a save; for tests.
    """

    def __init__(
        self, recipe: Recipe, run_dir: Path, *, quiet: bool = False, on_phase: Callable[[str], None] | None = None
    ) -> None:
        self.recipe, self.run_dir, self.quiet, self.on_phase = recipe, run_dir, quiet, on_phase
        self.config = recipe.loop
        self.model = recipe.model
        self.optimizer = recipe.optimizer()
        self.scaler = recipe.gradient_scaler()
        self.histograms = GradientHistograms(self.model, self.scaler) if self.config.log_histograms else None
        self._counted: dict[str, Any] | None = None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters] if self.config.ema_decay else None
        self.dtype = precision_of(self.config.precision, recipe.device)
        self.step = 0
        self.skipped_in_a_row = 0
        self.window = _Window()
        self.last: dict[str, float] = {}
        self._signal = 0

    # ---- one update

    def update(self) -> dict[str, float]:
        """One update. Returns its metrics; skips the weights, and the gradient norm, when a gradient is not finite."""
        step, config = self.step, self.config
        rate = self.recipe.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        inputs = self.recipe.prepare(step)
        part = config.batch_size // config.accumulate
        totals: dict[str, float] = {}
        counting = self.histograms is not None and (step + 1) % config.log_histograms == 0
        with self.histograms.watch() if counting else contextlib.nullcontext():
            for i in range(config.accumulate):
                torch.manual_seed((config.seed * 0x9E3779B97F4A7C15 + step * config.accumulate + i) % 2**63)  # dropout
                with torch.autocast(self.recipe.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss, metrics = self.recipe.loss(inputs, slice(i * part, (i + 1) * part), step)
                (loss / config.accumulate).backward()
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    totals[name] = totals.get(name, 0.0) + float(value) / config.accumulate
        if self.scaler is not None:  # from here on no gradient carries a scale
            self.scaler.unscale_()
        self._counted = self.histograms.take() if counting else None
        if self.scaler is not None:
            self.scaler.update()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        totals["grad_norm"] = float(norm)
        if math.isfinite(totals["grad_norm"]) and math.isfinite(totals["loss"]):
            if config.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip_norm, norm)
            self.optimizer.step()
            self._average()
            self.skipped_in_a_row = 0
            self.recipe.after_step(totals["loss"])
        else:
            del totals["grad_norm"]
            self._skip()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return totals

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is not None and (self.step + 1) % self.config.ema_every == 0:
            torch._foreach_lerp_(self.ema, self.parameters, 1 - self.config.ema_decay)

    def _skip(self) -> None:
        limit = self.config.max_skipped
        if self.scaler is not None:  # overflows go on until the scale may fall, and may fall again
            limit += WINDOW
            if self.scaler.lowered:
                self.skipped_in_a_row = 0
        self.skipped_in_a_row += 1
        self.window.skipped += 1
        if self.skipped_in_a_row > limit:
            keys = ", ".join(self.recipe.batch(self.step).keys[:4])
            raise TrainingError(
                f"step {self.step}: {self.skipped_in_a_row} updates in a row had gradients that are not finite "
                f"(samples {keys}, ...); nothing of them was saved. A smaller learning rate or precision=fp32 may help."
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, in eval mode, for the time of the block."""
        self.model.eval()
        if self.ema is None:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.ema)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    # ---- checkpoints

    def _ema_state(self) -> dict[str, torch.Tensor] | None:
        if self.ema is None:
            return None
        state = dict(self.model.state_dict())
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return {**state, **dict(zip(names, self.ema, strict=True))}

    def save(self) -> Path:
        """Writes a checkpoint of everything that decides what comes next."""
        tensors, groups = _pack_optimizer(self.optimizer)
        state = {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "window": vars(self.window),
            "last": self.last,
            "optimizer_groups": groups,
            "gradient_scales": self.scaler.state_dict() if self.scaler is not None else None,
            "recipe": self.recipe.state_dict(),
            "data": self.recipe.dataset.fingerprint(),
        }
        files = {**model_files(self.model, self._ema_state()), "state.json": state}
        if tensors:
            files["optimizer.safetensors"] = tensors
        name = f"step-{self.step:08d}"
        folder = save_snapshot(self.run_dir / "checkpoints", name, files, self.on_phase)
        prune(self.run_dir, self.config.keep)
        return folder

    def resume(self, say: Callable[[str], None] = print) -> bool:
        """Goes on from the newest good checkpoint; False when there is none.

        Raises:
            CheckpointError: it belongs to other data or another model, or every checkpoint is damaged.
        """
        damaged: list[CheckpointError] = []
        folder = find_latest(self.run_dir, damaged.append)
        for error in damaged:
            say(f"passed over: {error}")
        if folder is None:
            if damaged:
                raise CheckpointError(
                    f"{self.run_dir}: no checkpoint is whole ({damaged[0]}). To begin anew, choose another folder "
                    "or remove this one."
                )
            return False
        state = read_json(folder / "state.json")
        if state["data"] != self.recipe.dataset.fingerprint():
            raise CheckpointError(
                f"{folder}: trained on other data than {self.recipe.data.source!r} holds now; going on would mix them. "
                "Choose another run folder."
            )
        self.recipe.load_state_dict(state["recipe"])
        load_weights(self.model, read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
        if self.ema is not None:
            average = read_tensors(folder / "ema.safetensors")
            names = [name for name, p in self.model.named_parameters() if p.requires_grad]
            self.ema = [_laid_out_as(p, average[name]) for name, p in zip(names, self.parameters, strict=True)]
        file = folder / "optimizer.safetensors"
        _unpack_optimizer(self.optimizer, read_tensors(file) if file.exists() else {}, state["optimizer_groups"])
        if self.scaler is not None and state.get("gradient_scales"):
            self.scaler.load_state_dict(state["gradient_scales"])
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.window = _Window(**state["window"])
        self.last = state["last"]
        return True

    # ---- the run

    def run(self) -> RunResult:
        """Trains to the last step.

        Raises:
            Interrupted: after SIGINT or SIGTERM, when the run has been saved.
            TrainingError: gradients stay non-finite, or another process trains here.
            CheckpointError: nothing could be saved or resumed.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with _lock(self.run_dir), self._signals(), torch.random.fork_rng(devices=[]):
            resumed = self.resume(lambda text: None if self.quiet else print(text, flush=True))
            log = MetricsLog(self.run_dir / "metrics.jsonl", self.step)
            meter = Meter(self.recipe.kind, self.config.steps, self.step, quiet=self.quiet)
            board = _Board(self.run_dir / "tensorboard", self.step)
            if resumed:
                meter.say(f"{self.recipe.kind}: goes on at step {self.step} of {self.config.steps}")
            try:
                folder = self._train(log, meter, board)
            finally:
                meter.close()
                log.close()
                board.close()
        return RunResult(self.run_dir, folder, self.step, dict(self.last), time.monotonic() - started)

    def _train(self, log: MetricsLog, meter: Meter, board: _Board) -> Path:
        saved_at = self.step if self.step else -1
        while self.step < self.config.steps:
            metrics = self.update()
            self.window.add(metrics)
            self._list_replaced()
            meter.update(self.step, metrics["loss"], self.config.batch_size)
            last = self.step == self.config.steps
            if self.step % self.config.log_every == 0 or last:
                values = {**self.window.means(), "learning_rate": self.recipe.learning_rate(self.step - 1)}
                if self.window.skipped:
                    values["skipped"] = self.window.skipped
                if self.window.replaced:
                    values["replaced"] = self.window.replaced
                if self.scaler is not None:
                    low, high = self.scaler.scales.log2().aminmax()
                    values["log2_scale_min"], values["log2_scale_max"] = float(low), float(high)
                self.window = _Window()
                self._write(values, log, meter, board)
            if self._counted is not None:
                log.write({"step": self.step, **self._counted})
                plot_gradients(log.path, self.run_dir / "gradients.png")
            if last or (self.config.sample_every and self.step % self.config.sample_every == 0):
                self._look(log, meter, board)
            if self._signal or last or self.step % self.config.save_every == 0:
                self.save()
                saved_at = self.step
            if self._signal:
                raise Interrupted(self._signal, self.run_dir, self.step)
        if saved_at != self.step:
            self.save()
        return self.run_dir / "checkpoints" / f"step-{self.step:08d}"

    def _list_replaced(self) -> None:
        """Writes what could not be read to replaced.jsonl; stops the run when it is too much."""
        recipe, window = self.recipe, self.window
        errors, recipe.replaced = recipe.replaced, []
        window.examined += recipe.examined
        window.replaced += len(errors)
        recipe.examined = 0
        if not errors:
            return
        listed = MetricsLog(self.run_dir / "replaced.jsonl", self.step - 1)
        for error in errors:
            listed.write({"step": self.step, "error": error})
        listed.close()
        # a window that has just begun is judged as a whole one
        if window.replaced > self.config.max_replaced * max(
            window.examined, self.config.batch_size * self.config.log_every
        ):
            raise TrainingError(
                f"step {self.step}: {window.replaced} of the last {window.examined} samples cannot be read "
                f"({self.run_dir / 'replaced.jsonl'} lists them; the last: {errors[-1]}). "
                "Mend the data, or allow more with --loop.max-replaced."
            )

    def _write(self, values: dict[str, float], log: MetricsLog, meter: Meter, board: _Board) -> None:
        self.last.update(values)
        rate = meter.rate(self.step, self.config.batch_size)
        log.write({"step": self.step, **values, "images_per_second": round(rate, 1), "time": round(time.time(), 1)})
        board.scalars(values, self.step)

    def _look(self, log: MetricsLog, meter: Meter, board: _Board) -> None:
        with self.averaged(), torch.no_grad():
            values = {f"eval/{name}": value for name, value in self.recipe.evaluate().items()}
            picture = self.recipe.pictures()
        if values:
            self.last.update(values)
            log.write({"step": self.step, **values})
            board.scalars(values, self.step)
            meter.say(f"{self.recipe.kind} {self.step}: " + "  ".join(f"{k[5:]} {v:.4f}" for k, v in values.items()))
        if picture is not None:
            folder = self.run_dir / "samples"
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step-{self.step:08d}.png")
            board.image(picture, self.step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the update finish and saves; the second one stops at once."""

        def on_signal(number: int, frame: Any) -> None:
            if self._signal:
                raise KeyboardInterrupt
            self._signal = number

        try:
            before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller owns the signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Board:
    """TensorBoard's writer, made at the first value; what a resumed run overtakes is purged."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step, self.writer = folder, step, None

    def _get(self):
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1 if self.step else None)
        return self.writer

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._get().add_scalar(name, value, step)

    def image(self, picture: Any, step: int) -> None:
        import numpy as np

        self._get().add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


@contextlib.contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    with open(run_dir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise TrainingError(f"{run_dir}: process {owner} is training here already") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """State tensors by "index.name", and the groups as JSON."""
    state = optimizer.state_dict()
    tensors = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            tensors[f"{index}.{name}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors, json.loads(json.dumps(state["param_groups"]))


def _unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for group in groups:  # JSON has no tuples
        group.update({name: tuple(value) for name, value in group.items() if name == "betas"})
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the optimizer's state does not fit the model ({error})") from error
    for p, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.stride() != p.stride():
                entries[name] = _laid_out_as(p, value)


def _laid_out_as(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with the strides of `p`: files hold contiguous tensors, and other strides round differently."""
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_atomic(path, json.dumps(value, indent=1).encode())
