# SPDX-License-Identifier: MIT
"""k-means on pixels, and the codes it teaches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import DVAE as TINY

from dalle_fast.errors import ConfigError
from dalle_fast.models import DVAE
from dalle_fast.train.codes import CodeTeacher, kmeans
from dalle_fast.train.config import DataConfig
from dalle_fast.train.recipe import emphasized


def generator():
    return torch.Generator().manual_seed(0)


def test_kmeans_finds_what_lies_apart():
    torch.manual_seed(0)
    middles = torch.randn(12, 5) * 10
    points = middles.repeat_interleave(40, 0) + torch.randn(480, 5) * 0.01
    centres = kmeans(points, 12, 3, generator())
    distance = torch.cdist(middles, centres)
    assert float(distance.amin(1).max()) < 0.02
    assert sorted(distance.argmin(1).tolist()) == list(range(12))
    assert torch.equal(centres, kmeans(points, 12, 3, generator()))


def test_kmeans_takes_fewer_different_points_than_centres():
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(8, 1)
    centres = kmeans(points, 5, 2, generator())
    assert centres.isfinite().all()
    assert float(torch.cdist(points, centres).amin(1).max()) == 0
    with pytest.raises(ValueError, match="num_centres: expected 1 to 16, the number of points, got 17"):
        kmeans(points, 17, 1, generator())


def test_a_teacher_gives_each_cell_its_nearest_patch():
    torch.manual_seed(1)
    images = torch.rand(6, 3, 16, 16)
    teacher = CodeTeacher(images, 16, 2)
    tokens = teacher.tokens(images)
    assert tokens.shape == (6, 8, 8)
    assert tokens.unique().numel() == 16  # all alive
    patch = images[3, :, 4:6, 10:12].reshape(1, -1)  # channel, row, column: the order of a patch
    assert int(tokens[3, 2, 5]) == int(torch.cdist(patch, teacher.centres).argmin())
    # moving the picture by a cell moves its tokens
    moved = teacher.tokens(images.roll(2, dims=3))
    assert torch.equal(moved, tokens.roll(1, dims=2))


def test_an_encoder_learns_what_it_is_taught():
    torch.manual_seed(2)
    images = F.interpolate(torch.rand(8, 3, 8, 8), scale_factor=2)  # cells of one colour
    model = DVAE(TINY)
    teacher = CodeTeacher(images, TINY.vocab_size, TINY.downsampling)
    teacher.set_codebook(model)
    assert float(model.decoder.blocks.input.w.detach().std()) == pytest.approx(1, rel=0.3)
    targets = teacher.tokens(images)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before = float((model.encode(images) == targets).float().mean())
    for step in range(60):
        optimizer.zero_grad()
        out = model(images, tau=0.5, beta=0.1, offset=step, targets=targets)
        (out.loss + out.taught).backward()
        optimizer.step()
    after = float((model.encode(images) == targets).float().mean())
    assert before < 0.3
    assert after > before + 0.3
    assert model(images, tau=0.5, beta=0.1).taught is None


def test_emphasis_repeats_what_it_is_found_in():
    captions = ["a cat", "a hand, dark skin tone", "two people dark skin tone", "a foot, light skin tone"]
    data = DataConfig(emphasis=", [a-z-]+ skin tone$", emphasis_repeats=3)
    assert sorted(emphasized(captions, data)) == [0, 1, 1, 1, 2, 3, 3, 3]
    assert emphasized(captions, DataConfig(emphasis="dog")) == [0, 1, 2, 3]


def test_an_emphasis_that_is_no_expression_is_refused():
    with pytest.raises(ConfigError, match=r"emphasis: expected a regular expression, got '\('"):
        DataConfig(emphasis="(")
    with pytest.raises(ConfigError, match="emphasis_repeats: expected at least 1, got 0"):
        DataConfig(emphasis="a", emphasis_repeats=0)
