# SPDX-License-Identifier: MIT
"""Metrics and the report."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from tiny import small_system

from dalle_fast.data import open_dataset
from dalle_fast.errors import ConfigError
from dalle_fast.evaluate import (
    EvaluationOptions,
    frechet_distance,
    judge_lines,
    judge_table,
    run_evaluation,
    write_report,
)
from dalle_fast.evaluate.metrics import _best_of, _powers
from dalle_fast.evaluate.report import verdict_of
from dalle_fast.sample import SampleResult, System


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(6 * 4, rel=1e-9)
    # scaled by s: tr(S + s^2 S - 2 s S) = (1 - s)^2 tr(S)
    centred = x - x.mean(0)
    trace = float(centred.square().sum() / 399)
    assert frechet_distance(centred, centred * 3) == pytest.approx(4 * trace, rel=1e-9)


def test_frechet_distance_equals_the_textbook_formula():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 1
    cov_a, cov_b = torch.cov(a.t()), torch.cov(b.t())
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b)
    root = eigenvalues.real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    expected = float(mean + cov_a.trace() + cov_b.trace() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a[:4], b[:3]) >= 0  # fewer samples than features


def test_frechet_distance_names_bad_input():
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"a: expected \[n, d\] with n >= 2"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="b: expected 3 features, got 2"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="b: expected finite features"):
        frechet_distance(x, x / 0)


def test_best_of_n_counts_the_first_candidates():
    order = torch.tensor([5, 0, 3, 1, 2, 4])  # candidate at each rank
    assert [_best_of(order, n) for n in (1, 2, 4, 6)] == [1, 1, 1, 0]
    assert _powers(8) == [1, 2, 4, 8]
    assert _powers(6) == [1, 2, 4]
    assert _powers(1) == [1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_system(tmp_path_factory.mktemp("system"))


def test_an_evaluation_has_its_numbers_and_a_self_contained_report(run_dir):
    options = EvaluationOptions(num_losses=20, num_captions=3, num_samples=4)
    told = []
    evaluation = run_evaluation(System.load(run_dir), "emoji", options, progress=lambda *a: told.append(a))
    for split in ("seen", "heldout"):
        numbers = evaluation.numbers[split]
        assert 0 < numbers["mse"] < 1
        assert 1 <= numbers["codes_used"] <= 16
        assert numbers["image_loss"] == pytest.approx(np.log(16), rel=0.3)
        best = list(numbers["clip_best_of"].values())
        assert list(numbers["clip_best_of"]) == ["1", "2", "4"]
        assert best == sorted(best)
        assert numbers["frechet_clip"] >= 0
        assert "fid" not in numbers
        assert len(evaluation.samples[split]) == 3
        assert set(evaluation.verdicts[split]) == {"kind", "tone", "all"}
        for label, right in evaluation.verdicts[split].items():
            assert right.shape == (3, 4)
            assert list(numbers[f"{label}_best_of"]) == ["1", "2", "4"]
            assert numbers[f"{label}_best_of"]["4"] == right[:, 0].mean()
            assert numbers[f"{label}_any_of"]["4"] == right.any(1).mean()
            assert numbers[f"{label}_of_originals"] == 1
            assert 0 <= numbers[f"{label}_by_chance"] <= 1
            assert 0 <= numbers[f"{label}_of_reconstructions"] <= 1
    assert told[-1] == ("heldout captions", 3, 3)
    paths = write_report(evaluation, run_dir)
    page = paths["report"].read_text()
    assert json.loads(paths["json"].read_text()) == evaluation.numbers
    assert "Held-out combinations" in page
    assert "Right or wrong" in page
    assert page.count("✓") + page.count("✗") == 2 * 3 * 4 * 2
    assert page.count("data:image/png;base64,") >= 2 * 3 * 5
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for name in ("heldout", "seen", "reconstructions"):
        assert paths[name].stat().st_size > 1000


def test_samples_that_are_originals_are_right_and_say_so(run_dir, monkeypatch):
    dataset = open_dataset("emoji", "all", 16)
    system = System.load(run_dir)

    def sample(caption, options):
        right = dataset[dataset.captions.index(caption)].image
        wrong = np.full_like(right, 255)
        order = torch.tensor([1, 0])  # what CLIP puts first was drawn second
        return SampleResult(caption, np.stack([right, wrong]), torch.tensor([0.9, 0.1]), order, order[:, None], options)

    monkeypatch.setattr(system, "sample", sample)
    options = EvaluationOptions(num_losses=4, num_captions=3, num_samples=2)
    evaluation = run_evaluation(system, "emoji", options, splits=("heldout",))
    assert list(evaluation.numbers) == ["source", "options", "heldout"]
    numbers = evaluation.numbers["heldout"]
    for label in ("kind", "tone", "all"):
        assert numbers[f"{label}_best_of"] == {"1": 0.0, "2": 1.0}
        assert numbers[f"{label}_any_of"] == {"2": 1.0}
    assert numbers["kind_by_chance"] == 0
    rows = judge_table(evaluation.numbers)
    assert rows[0][2:] == ["best of 1", "best of 2", "chance", "dVAE's ceiling", "originals"]
    assert rows[1][2:4] == ["0.00", "1.00"]
    assert verdict_of(evaluation.verdicts["heldout"], 0, 0) == {"kind": True, "tone": True}
    assert len(judge_lines(evaluation.numbers)) == 4
    page = write_report(evaluation, run_dir / "right", beside=("another <system>", evaluation))["report"].read_text()
    assert page.count("✓") == page.count("✗") == 2 * 2 * 3
    assert "For comparison: another &lt;system&gt;" in page


def test_captions_are_escaped_in_the_report(run_dir):
    options = EvaluationOptions(num_losses=4, num_captions=1, num_samples=1)
    evaluation = run_evaluation(System.load(run_dir), "emoji", options)
    _, original, images, scores = evaluation.samples["seen"][0]
    evaluation.samples["seen"][0] = ("<script>alert(1)</script>", original, images, scores)
    page = write_report(evaluation, run_dir)["report"].read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_shapes_are_judged_by_the_checker(run_dir, monkeypatch):
    options = EvaluationOptions(num_losses=6, num_captions=2, num_samples=2)
    system = System.load(run_dir)
    from dalle_fast.data import ShapesPairs
    from dalle_fast.evaluate import metrics

    def small(source, split, size):
        return ShapesPairs(split, 32, num_samples=8)

    monkeypatch.setattr(metrics, "open_dataset", small)
    numbers = run_evaluation(system, "shapes", options).numbers
    for split in ("seen", "heldout"):
        assert set(numbers[split]["accuracy_best_of"]) == {"1", "2"}
        assert 0 <= numbers[split]["accuracy_of_reconstructions"] <= 1


def test_bad_options_are_named(run_dir):
    with pytest.raises(ConfigError, match="num_captions: expected at least 1, got 0"):
        EvaluationOptions(num_captions=0)
    options = EvaluationOptions(num_losses=4, num_captions=2, num_samples=1, inception="no-such-file.pth")
    with pytest.raises(ConfigError, match="inception: "):
        run_evaluation(System.load(run_dir), "emoji", options)
