# SPDX-License-Identifier: MIT
"""Exponent histograms: counted right, written, drawn, and turned into constants."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DALLE as TINY
from tiny import dalle_config, dvae_config

from dalle_fast.cli import main
from dalle_fast.errors import ConfigError
from dalle_fast.models import DALLE
from dalle_fast.train import run
from dalle_fast.train.histograms import FIRST, LAST, GradientHistograms, count_exponents, recommend_constant


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    run(dvae_config(3), root / "dvae", quiet=True)
    config = dataclasses.replace(dalle_config(4, precision="fp16-resblock", log_histograms=2), dvae=str(root / "dvae"))
    run(config, root / "dalle", quiet=True)
    return root


def test_a_number_counts_under_the_floor_of_its_logarithm():
    x = torch.tensor([1.0, 1.75, -2.0, 0.75, 2.0**-24, 1e-45, 3e38, 0.0, -0.0, float("inf"), float("nan")])
    counts = count_exponents(x)
    expected = {0: 2, 1: 1, -1: 1, -24: 1, FIRST: 1, LAST: 1}
    assert {FIRST + i: int(n) for i, n in enumerate(counts[:-2]) if n} == expected
    assert counts[-2:].tolist() == [2, 2]
    assert torch.equal(count_exponents(x[:5].half()), count_exponents(x[:5]))


@pytest.mark.parametrize(
    ("first", "counts", "fmt", "exponent", "headroom"),
    [
        (-24, [1] * 40, "float16", -1, 1),  # as wide as the format: headroom is bought with the smallest
        (-40, [5] * 11, "float16", 30, 15),  # -40 .. -30 half-way into -24 .. 15
        (0, [1], "1-6-9", -32, 35),
        (10, [0, 1, 0], "float16", -16, 20),
    ],
)
def test_a_constant_lies_half_way_between_underflow_and_overflow(first, counts, fmt, exponent, headroom):
    if headroom == 1:
        constant = recommend_constant(counts, first, fmt, headroom=1)
        assert constant.underflow == 1 / 40
    else:
        constant = recommend_constant(counts, first, fmt)
        assert constant.underflow == 0
    assert (constant.exponent, constant.headroom) == (exponent, headroom)


def test_a_few_small_numbers_do_not_move_a_constant():
    bulk = recommend_constant([1000, 1000], 0, "float16")
    with_dust = recommend_constant([1] + [0] * 49 + [1000, 1000], -50, "float16")
    assert with_dust.exponent == bulk.exponent
    assert with_dust.underflow == 1 / 2001
    with pytest.raises(ValueError, match="fmt: expected one of float16, 1-6-9, got 'fp8'"):
        recommend_constant([1], 0, "fp8")
    with pytest.raises(ValueError, match="counts: expected at least one number"):
        recommend_constant([0], 0, "float16")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_counted_once_at_each_resblock(checkpointing):
    torch.manual_seed(0)
    model = DALLE(TINY)
    model.set_checkpointing(checkpointing)
    text, image = torch.randint(300, (2, 10)), torch.randint(16, (2, 64))
    seen = {}
    model.blocks[-1].register_full_backward_pre_hook(lambda _, grads: seen.update(last=grads[0]))
    histograms = GradientHistograms(model)
    with histograms.watch():
        for _ in range(3):  # accumulated
            model.loss(text, image).loss.backward()
    assert all(block.on_gradient is None for block in model.blocks)
    line = histograms.take()["histograms"]
    activations, parameters = line["activations"], line["parameters"]
    totals = np.sum(activations["counts"], axis=1) + activations["zeros"] + activations["not_finite"]
    assert totals.tolist() == [3 * 2 * 74 * 32] * 6
    totals = np.sum(parameters["counts"], axis=1) + parameters["zeros"]
    assert totals.tolist() == [4 * 32 * 32, 8 * 32 * 32] * 3
    # the output of the last resblock is that of its block
    expected = count_exponents(seen["last"])[activations["first"] - FIRST :][: len(activations["counts"][-1])]
    assert activations["counts"][-1] == (3 * expected).tolist()


def test_a_run_writes_lines_and_a_picture(stages):
    lines = [json.loads(line) for line in (stages / "dalle" / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if "histograms" in line]
    assert [line["step"] for line in counted] == [2, 4]
    assert counted[0]["log2_scales"] == [13.001] * 6  # those that the update ran with
    assert counted[0]["histograms"]["activations"]["not_finite"] == [0] * 6
    logged = [line for line in lines if "log2_scale_max" in line]
    assert logged[-1]["log2_scale_max"] == pytest.approx(13.004)
    assert Image.open(stages / "dalle" / "gradients.png").size == (1500, 420)


def test_the_command_recommends_constants(stages, capsys):
    (stages / "dalle" / "gradients.png").unlink()
    main(["histograms", "--run", str(stages / "dalle")])
    out = capsys.readouterr().out
    assert "2 histograms, updates 2 to 4" in out
    for what in ("gradients of matrices  ", "one scale for all", "gradients of matrices times their scale"):
        assert what in out
    assert (stages / "dalle" / "gradients.png").exists()
    with pytest.raises(SystemExit):
        main(["histograms", "--run", str(stages / "dvae")])
    assert "no histograms; train with --log-histograms N" in capsys.readouterr().err


def test_the_flag_of_train(stages, tmp_path, capsys):
    config = stages / "dalle" / "config.toml"
    flags = ["--config", str(config), "--loop.precision", "fp32", "--loop.steps", "1", "--log-histograms", "1"]
    main(["train", "dalle", "--run", str(tmp_path / "dalle"), *flags])
    assert "dalle: 1 updates" in capsys.readouterr().out
    assert Image.open(tmp_path / "dalle" / "gradients.png").size == (1000, 420)  # no scales to draw


def test_stages_without_resblocks_say_so():
    with pytest.raises(ConfigError, match=r"loop.precision: fp16-resblock is for dalle"):
        dvae_config(precision="fp16-resblock")
    with pytest.raises(ConfigError, match=r"loop.log_histograms: counts gradients of dalle; expected 0 for dvae"):
        dvae_config(log_histograms=5)
