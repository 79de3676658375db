# SPDX-License-Identifier: MIT
"""What a trained system can do, on combinations it has seen and on ones it has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data import PairDataset, load_batch, open_dataset, shapes
from ..errors import ConfigError, DataError
from ..sample import SampleOptions, System, to_uint8
from .frechet import frechet_distance
from .judge import Judge, judge_for

SPLITS = ("seen", "heldout")


@dataclass(frozen=True)
class EvaluationOptions:
    """How much to look at."""

    num_losses: int = 512
    """Pairs per split for losses and reconstruction."""
    num_captions: int = 32
    """Captions per split to sample."""
    num_samples: int = 8
    """Candidates per caption; the curve over N uses its powers of two."""
    temperature: float = 0.5
    """Temperature of the samples."""
    guidance_scale: float = 1.0
    """Guidance of the samples."""
    seed: int = 0
    """Seed of the samples."""
    inception: str = ""
    """Path of torch-fidelity's Inception weights; without them the distance is taken in the CLIP's features."""

    def __post_init__(self) -> None:
        for name in ("num_losses", "num_captions", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass
class Evaluation:
    """Numbers, and the pictures behind them."""

    numbers: dict[str, Any] = field(default_factory=dict)
    """JSON: by split, see `run_evaluation`."""
    reconstructions: dict[str, tuple[np.ndarray, np.ndarray, list[str]]] = field(default_factory=dict)
    """split -> (originals, reconstructions, captions) of the first few."""
    samples: dict[str, list[tuple[str, np.ndarray, np.ndarray, list[float]]]] = field(default_factory=dict)
    """split -> rows of (caption, original, samples best first, scores)."""
    verdicts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """split -> label -> bool [captions, samples]: is it right, in the order of `samples`? Where there is a judge."""


def _take(dataset: PairDataset, count: int) -> list[int]:
    """Up to `count` indices, spread evenly."""
    count = min(count, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


@torch.no_grad()
def _reconstruction(system: System, images: torch.Tensor) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    tokens = torch.cat([system.dvae.encode(part) for part in images.split(64)])
    decoded = torch.cat([system.dvae.decode(part) for part in tokens.split(64)])
    error = (decoded - images).square().mean()
    counts = torch.bincount(tokens.flatten(), minlength=system.dvae.config.vocab_size).double()
    p = counts[counts > 0] / counts.sum()
    numbers = {
        "mse": float(error),
        "psnr_db": float(-10 * torch.log10(error.clamp(min=1e-12))),
        "variance_of_pixels": float(images.var(dim=0).mean()),
        "codes_used": int((counts > 0).sum()),
        "code_perplexity": float(torch.exp(-(p * p.log()).sum())),
    }
    return numbers, tokens.flatten(1), decoded


@torch.no_grad()
def _losses(system: System, captions: list[str], tokens: torch.Tensor) -> dict[str, float]:
    text = system.tokenizer.encode(captions, system.dalle.config.text_len).to(system.device)
    image_total = text_total = 0.0
    text_count = 0
    for begin in range(0, text.shape[0], 64):
        part = slice(begin, begin + 64)
        loss = system.dalle.loss(text[part], tokens[part])
        count = int((text[part] >= 0).sum())
        image_total += float(loss.image_loss) * text[part].shape[0]
        text_total += float(loss.text_loss) * count
        text_count += count
    return {"image_loss": image_total / text.shape[0], "text_loss": text_total / max(text_count, 1)}


def _powers(count: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= count:
        sizes.append(sizes[-1] * 2)
    return sizes


def _best_of(order: torch.Tensor, n: int) -> int:
    """Rank of the best-scored among the candidates drawn first, 0..n-1."""
    return int((order < n).nonzero()[0])


def _features(system: System, images: torch.Tensor, options: EvaluationOptions) -> tuple[str, torch.Tensor] | None:
    if options.inception:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            net = NoTrainInceptionV3("inception-v3-compat", ["2048"], options.inception)
        except ImportError as error:
            raise ConfigError(f"inception: needs the packages torchmetrics and torch-fidelity ({error})") from error
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"inception: {options.inception} cannot be loaded ({error})") from error
        return "fid", torch.cat([net((part * 255).to(torch.uint8)).float() for part in images.split(64)])
    if system.clip is None:
        return None
    return "frechet_clip", torch.cat([system.clip.encode_image(part) for part in images.split(64)])


@torch.no_grad()
def run_evaluation(
    system: System,
    source: str,
    options: EvaluationOptions | None = None,
    *,
    splits: Sequence[str] = SPLITS,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a system.

    `numbers` holds, for each split: `mse`, `psnr_db`, `variance_of_pixels` (what a constant picture would err),
    `codes_used`, `code_perplexity`; `image_loss`, `text_loss` in nats per token; `clip_best_of`, the mean score of the
    best of the first N candidates for N = 1, 2, 4, ...; `frechet_clip` (or `fid` with Inception weights); for
    shapes `accuracy_best_of`, the share of captions whose best candidate passes the exact checker, with
    `accuracy_of_reconstructions` as the ceiling that the dVAE sets; and for emoji what the judge says: `kind_best_of`,
    the share of captions whose best candidate by CLIP shows the right kind, `kind_any_of`, where any candidate does,
    `kind_by_chance`, what the same pictures score on the captions of others, and `kind_of_reconstructions` and
    `kind_of_originals` as ceilings; the same for `tone`, and for `all`, which is kind and tone at once.

    Args:
        system: models and tokenizer.
        source: what the data config of its runs says: "emoji", "shapes", a folder or a tar.
        options: how much.
        splits: of "seen" and "heldout".
        progress: called with (what, done, of how many).

    Raises:
        DataError: a split is empty or cannot be read.
    """
    options = options or EvaluationOptions()
    tell = progress or (lambda what, done, total: None)
    result = Evaluation(numbers={"source": source, "options": dataclasses.asdict(options)})
    size = system.dvae.config.image_size
    for split in splits:
        try:
            dataset = open_dataset(source, split, size)
        except DataError:
            if split == "seen":
                raise
            continue
        if len(dataset) == 0:
            continue
        batch = load_batch(dataset, _take(dataset, options.num_losses), size=size)
        images = batch.images.to(system.device).float() / 255
        numbers, tokens, decoded = _reconstruction(system, images)
        numbers.update(_losses(system, batch.captions, tokens))
        result.reconstructions[split] = (to_uint8(images[:16]), to_uint8(decoded[:16]), batch.captions[:16])
        if source == "shapes":
            read = [shapes.check(picture, c).ok for picture, c in zip(to_uint8(decoded), batch.captions)]
            numbers["accuracy_of_reconstructions"] = sum(read) / len(read)
        numbers.update(_samples(system, source, split, dataset, options, result, tell))
        result.numbers[split] = numbers
    return result


def _samples(system, source, split, dataset, options, result, tell) -> dict[str, Any]:
    size = system.dvae.config.image_size
    batch = load_batch(dataset, _take(dataset, options.num_captions), size=size)
    originals = to_uint8(batch.images.float() / 255)
    draw = SampleOptions(
        num_samples=options.num_samples,
        temperature=options.temperature,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
    )
    sizes = _powers(options.num_samples)
    orders = []
    scores: dict[int, list[float]] = {n: [] for n in sizes}
    right: dict[int, list[bool]] = {n: [] for n in sizes}
    rows, best = [], []
    for i, caption in enumerate(batch.captions):
        tell(f"{split} captions", i, len(batch.captions))
        drawn = system.sample(caption, draw)
        for n in sizes:
            rank = _best_of(drawn.order, n)
            if drawn.scores is not None:
                scores[n].append(float(drawn.scores[rank]))
            if source == "shapes":
                right[n].append(shapes.check(drawn.images[rank], caption).ok)
        best.append(drawn.images[0])
        orders.append(drawn.order)
        shown = [] if drawn.scores is None else drawn.scores.tolist()
        rows.append((caption, originals[i], drawn.images, shown))
    tell(f"{split} captions", len(batch.captions), len(batch.captions))
    result.samples[split] = rows
    numbers: dict[str, Any] = {}
    if system.clip is not None:
        numbers["clip_best_of"] = {str(n): sum(s) / len(s) for n, s in scores.items()}
        real = batch.images.to(system.device).float() / 255
        matched = system.clip.score(real, batch.captions)
        numbers["clip_of_originals"] = float(matched.mean())
    if source == "shapes":
        numbers["accuracy_best_of"] = {str(n): sum(r) / len(r) for n, r in right.items()}
    judge = judge_for(source, size) if hasattr(dataset, "labels") else None
    if judge is not None:
        pictures = np.stack([images for _, _, images, _ in rows])
        decoded = _reconstruction(system, batch.images.to(system.device).float() / 255)[2]
        judged, result.verdicts[split] = _judged(judge, batch.captions, pictures, orders, sizes)
        numbers.update(judged)
        numbers.update(_ceilings(judge, batch.captions, {"reconstructions": to_uint8(decoded), "originals": originals}))
    if len(best) >= 2:
        real = batch.images.to(system.device).float() / 255
        made = torch.from_numpy(np.stack(best)).permute(0, 3, 1, 2).to(system.device).float() / 255
        features = _features(system, real, options), _features(system, made, options)
        if features[0] is not None and features[1] is not None:
            numbers[features[0][0]] = frechet_distance(features[0][1], features[1][1])
    return numbers


def _judged(
    judge: Judge, captions: list[str], pictures: np.ndarray, orders: list[torch.Tensor], sizes: list[int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Numbers and verdicts about uint8 [C, N, H, W, 3] samples, best first."""
    count, num_samples = pictures.shape[:2]
    nearest = judge.nearest(pictures.reshape(-1, *pictures.shape[2:]))
    right = judge.compare(nearest, [caption for caption in captions for _ in range(num_samples)])
    verdicts = {label: values.reshape(count, num_samples) for label, values in right.items()}
    asked = judge.has(captions)
    chance = judge.chance(nearest.reshape(count, num_samples)[:, 0], captions)
    numbers: dict[str, Any] = {}
    for label, values in verdicts.items():
        rows = np.flatnonzero(asked[label])
        if not len(rows):
            continue
        best = {n: [values[i, _best_of(orders[i], n)] for i in rows] for n in sizes}
        numbers[f"{label}_best_of"] = {str(n): float(np.mean(b)) for n, b in best.items()}
        numbers[f"{label}_any_of"] = {str(num_samples): float(values[rows].any(1).mean())}
        numbers[f"{label}_by_chance"] = chance[label]
    return numbers, verdicts


def _ceilings(judge: Judge, captions: list[str], pictures: dict[str, np.ndarray]) -> dict[str, float]:
    """What the judge says of pictures that show their captions as well as they can."""
    asked = judge.has(captions)
    numbers = {}
    for name, images in pictures.items():
        for label, right in judge.judge(images, captions).right.items():
            if asked[label].any():
                numbers[f"{label}_of_{name}"] = float(right[asked[label]].mean())
    return numbers
