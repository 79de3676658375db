# SPDX-License-Identifier: MIT
"""Trains the system that ships in the package, evaluates it and writes it as 16-bit weights: `make pretrained`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from .bench.report import commit
from .data import open_dataset
from .errors import CheckpointError, ConfigError
from .evaluate.judge import judge_for
from .model_card import model_card
from .models.store import find_latest, load_model, model_files, read_json, save_snapshot, write_atomic
from .presets import preset
from .sample import SampleOptions, System, contact_sheet
from .train import run
from .train.config import save_config
from .train.loop import Loop, RunResult
from .train.patches import PatchCodes, PatchDALLERecipe, PatchDVAERecipe, fit_codes
from .train.report import read_lines
from .train.run import device_of, seeded

STAGES = ("codes", "dvae", "clip", "dalle")
SOURCE = "emoji-styles"
MAX_BYTES = 12_000_000
"""Of all files of a system that ships."""


# ---- training


def _codes(run_dir: Path) -> PatchCodes:
    """The clusters of the run; found when there are none yet."""
    config = preset("dvae", SOURCE)
    path = run_dir / "codes.safetensors"
    if not path.exists():
        dataset = open_dataset(config.data.source, config.data.split, config.model.image_size)
        PatchCodes(fit_codes(dataset, config.model, config.loop.seed), config.model.downsampling).save(path)
    return PatchCodes.load(path, config.model.downsampling)


def train_stage(stage: str, run_dir: Path | str, steps: int | None = None, quiet: bool = False) -> RunResult | None:
    """Trains a stage of the system, or goes on with it.

    Args:
        stage: "codes", "dvae", "clip" or "dalle"; the later ones find the codes if there are none.
        run_dir: folder of all of them.
        steps: updates in all; None: the preset's.
        quiet: print nothing.

    Raises:
        ConfigError: no such stage.
        DataError, CheckpointError, TrainingError, Interrupted: see `train.run`.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    run_dir = Path(run_dir)
    codes = _codes(run_dir)
    if stage == "codes":
        return None
    config = preset(stage, SOURCE)
    if steps is not None:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))
    folder = run_dir / stage
    if stage == "clip":
        return run(config, folder, quiet=quiet)
    device = device_of(config.loop.device)
    with seeded(config.loop.seed):
        if stage == "dvae":
            recipe = PatchDVAERecipe(config, device, codes)
        else:
            recipe = PatchDALLERecipe(config, device, codes, run_dir / "dvae")
    loop = Loop(recipe, folder, quiet=quiet)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.toml", stage)
    return loop.run()


# ---- looking


@torch.no_grad()
def evaluate_system(system: System, num_captions: int = 64, num_samples: int = 8) -> dict[str, Any]:
    """What the judge says of seen and held-out captions, in all styles and in the bare ones of `emoji`.

    Args:
        system: trained on `emoji-styles`.
        num_captions: of each split at most, spread evenly.
        num_samples: candidates, of which the CLIP's first counts.

    Returns:
        source -> split -> label -> share that is right; "chance_" labels: of captions of others, "drawn_" labels: of
        the originals, encoded and decoded.
    """
    size = system.dvae.config.image_size
    found: dict[str, Any] = {}
    for source in (SOURCE, "emoji"):
        judge = judge_for(source, size)
        for split in ("seen", "heldout"):
            dataset = open_dataset(source, split, size)
            count = min(num_captions, len(dataset))
            picked = [dataset[i * len(dataset) // count] for i in range(count)]
            captions = [sample.caption for sample in picked]
            options = SampleOptions(num_samples=num_samples, temperature=0.7)
            best = torch.stack([torch.from_numpy(system.sample(c, options).images[0]) for c in captions]).numpy()
            originals = torch.stack([torch.from_numpy(sample.image) for sample in picked]).permute(0, 3, 1, 2)
            drawn = system.decode(system.dvae.encode(originals.float() / 255).flatten(1))
            error = float((drawn - originals.float() / 255).square().mean())
            again = (drawn * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
            verdict = judge.judge(best, captions)
            numbers = {name: float(right.mean()) for name, right in verdict.right.items()}
            numbers |= {f"chance_{name}": v for name, v in judge.chance(verdict.nearest, captions).items()}
            numbers |= {f"drawn_{name}": float(r.mean()) for name, r in judge.judge(again, captions).right.items()}
            found.setdefault(source, {})[split] = {**numbers, "captions": count, "reconstruction_mse": error}
    return found


def sheet_of(system: System, captions: list[str], num_samples: int = 8, seed: int = 0):
    """A contact sheet of captions, best samples first, which says whose pictures they are."""
    options = SampleOptions(num_samples=num_samples, temperature=0.7, seed=seed)
    rows = [list(system.sample(caption, options).images) for caption in captions]
    return contact_sheet(rows, captions, headers=[system.name or "samples"])


# ---- what ships


def export(run_dir: Path | str, folder: Path | str, dtype: torch.dtype = torch.float16) -> Path:
    """Writes the averaged weights of a run as a system that `System.load` takes: `folder/{dvae,clip,dalle}`.

    Raises:
        CheckpointError: a stage is missing or damaged.
        ConfigError: a weight does not fit the dtype, or all of it is larger than MAX_BYTES.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    for stage in STAGES[1:]:
        model = load_model(run_dir / stage, expect=stage)
        files = model_files(model)
        weights = {name: tensor.to(dtype) for name, tensor in files["model.safetensors"].items()}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ConfigError(f"dtype: {stage} has weights beyond what {dtype} holds")
        files["model.safetensors"] = weights
        save_snapshot(folder, stage, files)
    (folder / "latest").unlink()
    total = size_of(folder)
    if total > MAX_BYTES:
        raise ConfigError(f"{folder}: {total} bytes, expected at most {MAX_BYTES}")
    return folder


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _facts(run_dir: Path) -> dict[str, Any]:
    """Commit, seed, updates and a few lines of the log of each stage."""
    stages = {}
    for stage in STAGES[1:]:
        checkpoint = find_latest(run_dir / stage)
        if checkpoint is None:
            raise CheckpointError(f"{run_dir / stage}: no checkpoint")
        lines = [line for line in read_lines(run_dir / stage / "metrics.jsonl") if "loss" in line]
        kept = [lines[i * (len(lines) - 1) // 5] for i in range(6)] if len(lines) > 5 else lines
        config = preset(stage, SOURCE)
        stages[stage] = {
            "updates": read_json(checkpoint / "state.json")["step"],
            "batch": config.loop.batch_size,
            "seed": config.loop.seed,
            "parameters": sum(p.numel() for p in load_model(checkpoint, expect=stage).parameters()),
            "log": kept,
        }
    dataset = open_dataset(SOURCE, "train", preset("dvae", SOURCE).model.image_size)
    notes = run_dir / "notes.txt"  # what was done by hand, if anything
    return {
        "notes": notes.read_text(encoding="utf-8").strip() if notes.exists() else "",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "data": {"pictures": len(dataset), "fingerprint": dataset.fingerprint()},
        "stages": stages,
    }


def publish(run_dir: Path | str, folder: Path | str) -> Path:
    """Exports a run, evaluates what was exported and writes its model card and numbers beside it.

    The text of `run_dir/notes.txt`, where there is one, goes into the card.
    """
    run_dir, folder = Path(run_dir), export(run_dir, folder)
    record = {**_facts(run_dir), "bytes": size_of(folder), "numbers": evaluate_system(System.load(folder))}
    write_atomic(folder / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(folder / "README.md", model_card(record).encode())
    return folder
