# SPDX-License-Identifier: MIT
"""The one training loop: updates, averaged weights, logs, pictures, checkpoints, resume, signals."""

from __future__ import annotations

import contextlib
import fcntl
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
from ..models.store import model_files
from ..optim.gradient_scale import WINDOW
from ..optim.shards import local_part
from ..parallel import pieces
from ..parallel.gradients import Gradients, shard_model
from . import checkpoint
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
            # oneDNN also takes bfloat16 on AVX-512 without instructions for it, and is then slower than in float32
            allowed = (
                "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            )
            fast = allowed and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


class Loop:
    """Trains a recipe in a folder.

    Args:
        recipe: the stage, and the ranks that train it.
        run_dir: its folder on the machine of the first rank; `checkpoints/`, `metrics.jsonl`, `tensorboard/` and
            `samples/` appear in it.
        quiet: print nothing.
        on_phase: called with the name of each phase of a save; for tests.
    """

    def __init__(
        self, recipe: Recipe, run_dir: Path, *, quiet: bool = False, on_phase: Callable[[str], None] | None = None
    ) -> None:
        self.recipe, self.run_dir = recipe, run_dir
        self.config, self.world = recipe.loop, recipe.world
        self.quiet = quiet or not self.world.is_first
        self.model = recipe.model
        shard_model(self.world, self.model, recipe.blocks())
        self.optimizer = recipe.optimizer()
        self.scaler = recipe.gradient_scaler()
        self.gradients = Gradients(
            self.world,
            self.model,
            self._loss,
            scaler=self.scaler,
            resblocks=self.model.resblock_parameters() if self.scaler is not None else (),
            powersgd_rank=self.config.powersgd_rank,
            clip_norm=self.config.clip_norm,
            seed=self.config.seed,
        )
        self.histograms = None
        if self.config.log_histograms:
            self.histograms = GradientHistograms(self.model, self.scaler, self.world)
        self._counted: dict[str, Any] | None = None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters] if self.config.ema_decay else None
        self.dtype = precision_of(self.config.precision, recipe.device)
        self.writer = checkpoint.CheckpointWriter(self.world, run_dir, self.config.keep, on_phase)
        self.step = 0
        self.skipped_in_a_row = 0
        self.window = _Window()
        self.last: dict[str, float] = {}
        self._signal = 0  # that came here
        self._stop = 0  # that came to any rank
        self._unlisted = False
        """Whether some rank has replaced a sample in this update."""

    # ---- one update

    def update(self) -> dict[str, float]:
        """One update. Returns its metrics; skips the weights, and the gradient norm, when a gradient is not finite."""
        step, config = self.step, self.config
        rate = self.recipe.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.model.train()
        inputs = self.recipe.prepare(step)
        parts = config.accumulate
        size = len(self.recipe.rows) // parts
        sums: dict[str, torch.Tensor] = {}
        counting = self.histograms is not None and (step + 1) % config.log_histograms == 0
        with self.histograms.watch() if counting else contextlib.nullcontext():
            for i in range(parts):
                rows = slice(i * size, (i + 1) * size)
                loss, metrics = self.gradients.backward(inputs, rows, step, share=1 / parts, last=i == parts - 1)
                for name, value in {"loss": loss, **metrics}.items():
                    value = value.detach().double() / parts
                    sums[name] = sums[name] + value if name in sums else value
        self.gradients.unscale()  # from here on no gradient carries a scale
        self._counted = self.histograms.take() if counting else None
        if self.scaler is not None:
            self.scaler.update()
        norm = self.gradients.norm()
        totals = self._share(sums, norm)
        if math.isfinite(totals["grad_norm"]) and math.isfinite(totals["loss"]):
            self.gradients.clip(norm)
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

    def _loss(self, inputs: dict[str, Any], rows: slice, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The recipe's, in the run's precision."""
        with torch.autocast(self.recipe.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.recipe.loss(inputs, rows, step)

    def _share(self, sums: dict[str, torch.Tensor], norm: torch.Tensor) -> dict[str, float]:
        """Means over the ranks, and the gradient norm, read at once; tells all ranks what happened to any."""
        recipe = self.recipe
        here = [self._signal == signal.SIGINT, self._signal == signal.SIGTERM, self.writer.failed]
        here += [recipe.examined, len(recipe.replaced)]
        recipe.examined = 0
        values = torch.stack(list(sums.values()))
        numbers = self.world.sum(torch.cat([values, torch.tensor(here, dtype=values.dtype).to(values.device)]))
        numbers = torch.cat([numbers, norm.to(numbers).reshape(1)]).tolist()  # the one wait for the device
        *means, interrupt, terminate, failed, examined, replaced, grad_norm = numbers
        self._stop = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
        if failed:
            self.writer.wait()  # raises where it failed
            raise CheckpointError(f"{self.run_dir}: another rank could not write its part of the checkpoint")
        self.window.examined += int(examined)
        self.window.replaced += int(replaced)
        self._unlisted = bool(replaced)
        return {
            **{name: mean / self.world.size for name, mean in zip(sums, means, strict=True)},
            "grad_norm": grad_norm,
        }

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is not None and (self.step + 1) % self.config.ema_every == 0:
            averages, weights = ([local_part(t.detach()) for t in ts] for ts in (self.ema, self.parameters))
            torch._foreach_lerp_(averages, weights, 1 - self.config.ema_decay)

    def _skip(self) -> None:
        limit = self.config.max_skipped
        if self.scaler is not None:  # overflows go on until the scale may fall, and may fall again
            limit += WINDOW
            if self.scaler.lowered:
                self.skipped_in_a_row = 0
        self.skipped_in_a_row += 1
        self.window.skipped += 1
        if self.skipped_in_a_row > limit:
            keys = ", ".join(self.recipe.batch(self.step).keys[:4])  # of the first rank
            raise TrainingError(
                f"step {self.step}: {self.skipped_in_a_row} updates in a row had gradients that are not finite "
                f"(samples {keys}, ...); nothing of them was saved. A smaller learning rate or precision=fp32 may help."
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, in eval mode, for the time of the block."""
        self.model.eval()
        weights = [local_part(p.detach()) for p in self.parameters]
        kept = [] if self.ema is None else [w.clone() for w in weights]
        if self.ema is not None:
            torch._foreach_copy_(weights, [local_part(average) for average in self.ema])
        try:
            yield
        finally:
            if self.ema is not None:
                torch._foreach_copy_(weights, kept)
            self.gradients.reshard()

    # ---- checkpoints

    def save(self) -> Path:
        """Begins to write a checkpoint of everything that decides what comes next; `writer.wait()` sees its end."""
        tensors, groups = checkpoint.pack_optimizer(self.optimizer)
        powersgd = self.gradients.powersgd.state_dict() if self.gradients.powersgd is not None else None
        state = {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "window": vars(self.window),
            "last": self.last,
            "optimizer_groups": groups,
            "gradient_scales": self.scaler.state_dict() if self.scaler is not None else None,
            "powersgd": {name: powersgd[name] for name in ("seed", "grad_constant")} if powersgd else None,
            "recipe": self.recipe.state_dict(),
            "data": self.recipe.dataset.fingerprint(),
        }
        ema = checkpoint.averages(self.model, self.ema) if self.ema is not None else None
        files = {**model_files(self.model, ema), "state.json": state}
        if tensors:
            files["optimizer.safetensors"] = tensors
        if powersgd and powersgd["error"]:
            files["error.safetensors"] = powersgd["error"]
        return self.writer.start(self.step, files)

    def resume(self, say: Callable[[str], None] = print) -> bool:
        """Goes on from the newest good checkpoint, at any number of ranks; False when there is none.

        Raises:
            CheckpointError: it belongs to other data or another model, or every checkpoint is damaged.
        """
        world = self.world
        folder = checkpoint.find(world, self.run_dir, say)
        if folder is None:
            return False
        file = folder / "state.json"
        state = world.first(lambda: checkpoint.read_state(file))
        with checkpoint.reading(file):
            self._take_up(folder, state)
        return True

    def _take_up(self, folder: Path, state: dict[str, Any]) -> None:
        world = self.world
        world.each(lambda: self._take_recipe(folder, state))
        pieces.read_into(world, folder / "model.safetensors", self.model.state_dict())
        if self.ema is not None:
            pieces.read_into(world, folder / "ema.safetensors", checkpoint.averages(self.model, self.ema))
        files = world.first(lambda: sorted(path.name for path in folder.iterdir()))
        file = folder / "optimizer.safetensors"
        checkpoint.unpack_optimizer(
            world, self.optimizer, file if file.name in files else None, state["optimizer_groups"]
        )
        if self.scaler is not None and state.get("gradient_scales"):
            self.scaler.load_state_dict(state["gradient_scales"])
        if self.gradients.powersgd is not None and state.get("powersgd"):
            errors = pieces.read_like(world, folder / "error.safetensors", dict(self.model.named_parameters()))
            self.gradients.powersgd.load_state_dict({**state["powersgd"], "error": errors})
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.window = _Window(**state["window"])
        self.last = state["last"]

    def _take_recipe(self, folder: Path, state: dict[str, Any]) -> None:
        if state["data"] != self.recipe.dataset.fingerprint():
            raise CheckpointError(
                f"{folder}: trained on other data than {self.recipe.data.source!r} holds now; going on would mix them. "
                "Choose another run folder."
            )
        self.recipe.load_state_dict(state["recipe"])

    # ---- the run

    def run(self) -> RunResult:
        """Trains to the last step.

        Raises:
            Interrupted: after SIGINT or SIGTERM, when the run has been saved.
            TrainingError: gradients stay non-finite, or another process trains here.
            CheckpointError: nothing could be saved or resumed.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            self.world.first(lambda: stack.enter_context(_lock(self.run_dir)))
            stack.callback(self.writer.close)  # a run that fails leaves nobody writing in its folder
            stack.enter_context(self._signals())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            resumed = self.resume(lambda text: None if self.quiet else print(text, flush=True))
            first = self.world.is_first
            log = MetricsLog(self.run_dir / "metrics.jsonl", self.step) if first else None
            board = _Board(self.run_dir / "tensorboard", self.step) if first else None
            meter = Meter(self.recipe.kind, self.config.steps, self.step, quiet=self.quiet)
            if resumed:
                meter.say(f"{self.recipe.kind}: goes on at step {self.step} of {self.config.steps}")
            try:
                folder = self._train(log, meter, board)
            finally:
                meter.close()
                if first:
                    log.close()
                    board.close()
        return RunResult(self.run_dir, folder, self.step, dict(self.last), time.monotonic() - started)

    def _train(self, log: MetricsLog | None, meter: Meter, board: _Board | None) -> Path:
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
            if self._counted is not None and log is not None:
                log.write({"step": self.step, **self._counted})
                plot_gradients(log.path, self.run_dir / "gradients.png")
            if last or (self.config.sample_every and self.step % self.config.sample_every == 0):
                self._look(log, meter, board)
            if self.world.size == 1:
                self._stop = self._signal  # one that came while it looked
            if self._stop or last or self.step % self.config.save_every == 0:
                self.save()
                saved_at = self.step
            if self._stop:
                self._finish_save()
                raise Interrupted(self._stop, self.run_dir, self.step)
        if saved_at != self.step:
            self.save()
        self._finish_save()
        return self.run_dir / "checkpoints" / f"step-{self.step:08d}"

    def _finish_save(self) -> None:
        """Returns when the checkpoint is there, in all ranks: torchrun soon kills the others where one has ended."""
        self.world.each(self.writer.wait)

    def _list_replaced(self) -> None:
        """Writes what could not be read to replaced.jsonl; stops the run when it is too much."""
        if not self._unlisted:
            return
        recipe, window = self.recipe, self.window
        mine, recipe.replaced = recipe.replaced, []
        errors = [error for part in self.world.gather(mine) for error in part]
        if self.world.is_first:
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

    def _write(self, values: dict[str, float], log: MetricsLog | None, meter: Meter, board: _Board | None) -> None:
        self.last.update(values)
        if log is None or board is None:
            return
        rate = meter.rate(self.step, self.config.batch_size)
        log.write({"step": self.step, **values, "images_per_second": round(rate, 1), "time": round(time.time(), 1)})
        board.scalars(values, self.step)

    def _look(self, log: MetricsLog | None, meter: Meter, board: _Board | None) -> None:
        """Held-out metrics and pictures with averaged weights, by the first rank.

        Of a sharded model that no rank can hold whole all ranks compute the metrics, and nobody draws pictures: each
        token of one would gather all parameters.
        """
        if log is None and self.world.num_shards == 1:
            return
        picture = None
        with torch.no_grad(), self.averaged():
            whole = self.gradients.gather()
            if whole and log is None:
                return
            values = {f"eval/{name}": value for name, value in self.recipe.evaluate().items()}
            if whole:
                picture = self.recipe.pictures()
        if log is None or board is None:
            return
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
        """The first SIGINT or SIGTERM lets the update finish and saves; the second one stops at once.

        Among several ranks it does not: torchrun passes on what the terminal has sent to all, and kills after 30 s.
        """

        def on_signal(number: int, frame: Any) -> None:
            if self._signal and self.world.size == 1:
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
    run_dir.mkdir(parents=True, exist_ok=True)
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
