# SPDX-License-Identifier: MIT
"""Exponents of gradients by resblock: whether a number format holds them, and times which constant (appendix D).

Bins are powers of two: a number counts under floor(log2 |x|).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..errors import DataError
from ..models import DALLE
from ..optim import ResblockGradScaler
from ..optim.shards import local_part
from ..parallel.world import World
from .report import read_lines

FIRST, LAST = -100, 60
"""Exponents that have a bin; what is beyond counts in the last one."""
_NUM_BINS = LAST - FIRST + 1

# (exponent of the smallest subnormal, exponent of the largest number)
FORMATS = {"float16": (-24, 15), "1-6-9": (-67, 3)}


def count_exponents(x: torch.Tensor) -> torch.Tensor:
    """int64 [LAST - FIRST + 3]: numbers with exponent FIRST..LAST, zeros, and what is not finite."""
    x = x.detach().float()
    exponent = torch.frexp(x).exponent - 1  # x = f * 2^exponent, 1 <= |f| < 2
    bins = (exponent - FIRST).clamp(0, _NUM_BINS - 1)
    bins = torch.where(x == 0, _NUM_BINS, torch.where(x.isfinite(), bins, _NUM_BINS + 1))
    return torch.bincount(bins.flatten(), minlength=_NUM_BINS + 2)


class GradientHistograms:
    """Counts the exponents of a transformer's gradients in one update.

    Activations: the gradients of each resblock's output, as they are before any scale. Parameters: the gradients of
    each resblock's matrices, without its scale.

    Args:
        model: the transformer.
        scaler: its scales are recorded beside the counts.
        world: counts are those of all ranks.
    """

    def __init__(self, model: DALLE, scaler: ResblockGradScaler | None = None, world: World | None = None) -> None:
        self.model, self.scaler, self.world = model, scaler, world or World()
        self._activations: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Counts activations in the forward and backward passes of the block, however many parts they come in."""
        self._activations = {}

        def count(first: int, index: int, g: torch.Tensor) -> None:
            counts = count_exponents(g)
            i = first + index
            self._activations[i] = self._activations[i] + counts if i in self._activations else counts

        for i, block in enumerate(self.model.blocks):
            block.on_gradient = partial(count, 2 * i)
        try:
            yield
        finally:
            for block in self.model.blocks:
                block.on_gradient = None

    def take(self) -> dict[str, Any]:
        """JSON values of a line of metrics.jsonl; call it while the unscaled gradients are there."""
        matrices = [
            [local_part(p.grad) for p in resblock if p.dim() == 2] for resblock in self.model.resblock_parameters()
        ]
        parameters = torch.stack([torch.stack([count_exponents(g) for g in grads]).sum(0) for grads in matrices])
        activations = self.world.sum(torch.stack([self._activations[i] for i in range(len(matrices))]))
        if self.world.num_shards > 1:  # else every rank has all gradients
            dist.all_reduce(parameters, group=self.world.shards)
        line = {"histograms": {"activations": _pack(activations), "parameters": _pack(parameters)}}
        if self.scaler is not None:
            line["log2_scales"] = [round(s, 3) for s in self.scaler.scales.log2().tolist()]
        return line


def _pack(counts: torch.Tensor) -> dict[str, Any]:
    """Rows of counts [N, bins] without the empty bins at both ends."""
    table = counts.cpu()
    used = table[:, :_NUM_BINS].sum(0).nonzero().flatten()
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    return {
        "first": FIRST + low,
        "counts": table[:, low:high].tolist(),
        "zeros": table[:, _NUM_BINS].tolist(),
        "not_finite": table[:, _NUM_BINS + 1].tolist(),
    }


# ---- constants


class Constant(NamedTuple):
    """A power of two to multiply by before rounding to a format."""

    exponent: int
    """The constant is 2^exponent."""
    headroom: int
    """Powers of two between the largest number seen and the largest of the format."""
    underflow: float
    """Share of the numbers that would become zero."""


def recommend_constant(counts: Sequence[int], first: int, fmt: str, *, headroom: int = 2) -> Constant:
    """The power of two that best fits numbers into a 16-bit format (section 2.4: "neither underflow nor overflow").

    Half-way between overflow and the loss of the smallest thousandth, but always `headroom` powers of two away from
    overflow, which spoils a whole update where underflow costs single numbers.

    Args:
        counts: how many numbers have the exponent first, first + 1, ...
        first: exponent of the first bin.
        fmt: "float16" or "1-6-9".
        headroom: least distance to overflow.

    Raises:
        ValueError: nothing was counted, or `fmt` is unknown.
    """
    if fmt not in FORMATS:
        raise ValueError(f"fmt: expected one of {', '.join(FORMATS)}, got {fmt!r}")
    counts = np.asarray(counts, dtype=np.int64)
    if not counts.any():
        raise ValueError("counts: expected at least one number")
    smallest, largest = FORMATS[fmt]
    top = first + int(counts.nonzero()[0][-1])
    below = counts.cumsum() / counts.sum()  # share up to each bin
    bottom = first + int((below > 1e-3).argmax())
    exponent = min((largest - top + smallest - bottom) // 2, largest - headroom - top)
    lost = counts[: max(smallest - exponent - first, 0)].sum() / counts.sum()
    return Constant(exponent, largest - exponent - top, float(lost))


def _shifted(histogram: dict[str, Any], shifts: Sequence[int] | None = None) -> np.ndarray:
    """Counts over all exponents [N, LAST - FIRST + 1], row i times 2^shifts[i]."""
    table = np.zeros((len(histogram["counts"]), _NUM_BINS), np.int64)
    for i, row in enumerate(histogram["counts"]):
        offset = histogram["first"] - FIRST + (shifts[i] if shifts else 0)
        bins = np.clip(np.arange(len(row)) + offset, 0, _NUM_BINS - 1)
        np.add.at(table[i], bins, row)
    return table


def _counted_lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines with histograms, all of as many resblocks.

    Raises:
        DataError: one holds something else under that name.
    """
    lines = [line for line in read_lines(metrics) if "histograms" in line]
    sizes = set()
    for line in lines:
        try:
            sizes |= {_num_rows(line["histograms"][part]) for part in ("activations", "parameters")}
            scales = line.get("log2_scales")
            if scales is not None:
                sizes.add(len(scales))
                if not all(abs(scale) <= 300 for scale in scales):
                    raise ValueError("scales are beyond 2^300")
            if len(sizes) != 1:
                raise ValueError(f"numbers of resblocks differ: {sorted(sizes)}")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{metrics}: step {line['step']}: damaged histograms ({error})") from None
    return lines


def _num_rows(histogram: dict[str, Any]) -> int:
    rows, first = histogram["counts"], histogram["first"]
    if type(first) is not int or not FIRST <= first <= LAST or not isinstance(rows, list) or not rows:
        raise ValueError("expected rows of counts from an exponent on")
    if not 1 <= len(rows[0]) <= _NUM_BINS or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("expected rows of one length")
    if not all(type(count) is int and 0 <= count < 2**48 for row in rows for count in row):
        raise ValueError("expected counts")
    return len(rows)


def describe(metrics: Path) -> str:
    """A table of constants for what a run's metrics.jsonl has counted.

    Raises:
        DataError: it holds no histograms, or something else under that name.
    """
    lines = _counted_lines(metrics)
    if not lines:
        raise DataError(f"{metrics}: no histograms; train with --log-histograms N")
    total: dict[tuple[str, str], np.ndarray] = {}

    def add(what: str, fmt: str, table: np.ndarray) -> None:
        total[what, fmt] = total.get((what, fmt), 0) + table

    for line in lines:
        parameters, activations = line["histograms"]["parameters"], line["histograms"]["activations"]
        add("gradients of matrices", "1-6-9", _shifted(parameters))
        add("activations' gradients, one scale for all", "float16", _shifted(activations))
        if "log2_scales" in line:
            shifts = [round(s) for s in line["log2_scales"]]
            add("gradients of matrices times their scale", "float16", _shifted(parameters, shifts))
            add("activations' gradients times their scale", "float16", _shifted(activations, shifts))
    text = [
        f"{len(lines)} histograms, updates {lines[0]['step']} to {lines[-1]['step']}\n",
        f"{'':42}{'format':>8}{'constant':>10}{'headroom':>10}{'underflow':>11}{'worst resblock':>16}",
    ]
    for (what, fmt), table in total.items():
        if not table.any():
            continue
        constant = recommend_constant(table.sum(0), FIRST, fmt)
        cut = max(FORMATS[fmt][0] - constant.exponent - FIRST, 0)
        worst = (table[:, :cut].sum(1) / table.sum(1).clip(1)).max()
        text.append(
            f"{what:42}{fmt:>8}{f'2^{constant.exponent}':>10}{f'2^{constant.headroom}':>10}"
            f"{constant.underflow:>11.2%}{worst:>16.2%}"
        )
    return "\n".join(text)


# ---- the plot


def plot_gradients(metrics: Path, picture: Path) -> bool:
    """Draws the newest histograms, and the scales of the run over time, into a PNG; False when there are none.

    Raises:
        DataError: a line of `metrics` holds something else under "histograms", or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _counted_lines(metrics)
    if not lines:
        return False
    newest = lines[-1]
    scales = newest.get("log2_scales")
    figure = Figure(figsize=(15 if scales else 10, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if scales else 2, squeeze=False)[0]
    _heatmap(axes[0], newest["histograms"]["activations"], scales)
    axes[0].set(title=f"gradients of activations, update {newest['step']}", ylabel="exponent (base 2)")
    _heatmap(axes[1], newest["histograms"]["parameters"], scales)
    axes[1].set(title="gradients of matrices")
    figure.colorbar(axes[1].images[0], ax=axes[1], label="share of the resblock")
    if scales:
        from matplotlib import colormaps

        scaled = [line for line in lines if "log2_scales" in line]
        for i in range(len(scales)):
            style = {"color": colormaps["viridis"](i / max(len(scales) - 1, 1)), "linestyle": ("-", "--")[i % 2]}
            label = f"resblock {i} ({('attention', 'MLP')[i % 2]})" if i in (0, 1, len(scales) - 1) else None
            values = [line["log2_scales"][i] for line in scaled]
            axes[2].plot([line["step"] for line in scaled], values, lw=1.2, label=label, **style)
        axes[2].set(title="gradient scales", xlabel="update", ylabel="log2 of the scale")
        axes[2].grid(alpha=0.3)
        axes[2].legend(fontsize=8)
    try:
        figure.savefig(picture)
    except OSError as error:
        raise DataError(f"{picture}: cannot be written ({error.strerror or error})") from error
    return True


def _heatmap(axes: Any, histogram: dict[str, Any], scales: list[float] | None) -> None:
    from matplotlib.colors import LogNorm

    counts = np.asarray(histogram["counts"], dtype=float)  # [N, bins]
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    num_resblocks, num_bins = counts.shape
    first = histogram["first"]
    axes.imshow(
        np.where(shares > 0, shares, np.nan).T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        norm=LogNorm(1e-5, 1),
        cmap="magma_r",
        extent=(-0.5, num_resblocks - 0.5, first, first + num_bins),
    )
    low, high = first, first + num_bins
    if scales:  # what float16 holds of each resblock at its scale
        edges = np.arange(num_resblocks + 1) - 0.5
        smallest, largest = FORMATS["float16"]
        low, high = min(low, smallest - max(scales)), max(high, largest + 1 - min(scales))
        for exponent, label in ((largest + 1, "range of float16 at the scale"), (smallest, None)):
            axes.stairs(exponent - np.asarray(scales), edges, baseline=None, color="tab:blue", lw=1.2, label=label)
        axes.legend(fontsize=8, loc="upper right")
    axes.set(xlabel="resblock", ylim=(low - 2, high + 5))
