# SPDX-License-Identifier: MIT
"""Pair counts and offsets of the paper's patterns."""

from __future__ import annotations

import pytest
import torch

from dalle_fast.ops import AttentionPattern


@pytest.mark.parametrize(
    ("kind", "wraparound", "pairs"),
    [
        ("row", True, 328_304),
        ("column", True, 311_936),
        ("conv", True, 352_209),
        ("conv", False, 32_896 + 262_144 + 52_354),
        ("dense", True, 819_840),
    ],
)
def test_pair_counts_of_the_paper(kind, wraparound, pairs):
    assert AttentionPattern(kind, 256, (32, 32), wraparound=wraparound).num_pairs() == pairs


def test_the_papers_four_by_four_row_sees_five():
    mask = AttentionPattern("row", 0, (4, 4)).mask()
    assert mask.sum(1).tolist() == [1, 2, 3, 4] + [5] * 12


def test_conv_three_by_three_offsets():
    mask = AttentionPattern("conv", 0, (32, 32), kernel=3).mask()
    assert [500 - k for k in mask[500].nonzero().flatten().tolist()] == [33, 32, 31, 1, 0]


@pytest.mark.parametrize("kind", ["row", "column", "conv", "dense"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (6, 2)])
def test_causal_and_never_blind(kind, grid):
    pattern = AttentionPattern(kind, 4, grid, kernel=3)
    mask = pattern.mask()
    assert not mask.triu(1).any()
    assert mask.diagonal().all()
    assert mask[4:, :4].all()
    reach = max(q - k for q, k in mask[4:, 4:].nonzero().tolist())
    assert reach < pattern.image_cache_len


def test_a_prefix_is_the_corner():
    pattern = AttentionPattern("conv", 3, (4, 4), kernel=5)
    assert pattern.mask(9).equal(pattern.mask()[:9, :9])
    with pytest.raises(ValueError, match=r"^length: expected 0 to 19, got 20"):
        pattern.mask(20)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "rows"}, ValueError, "kind: expected one of"),
        ({"text_len": -1}, ValueError, "text_len: expected at least 0"),
        ({"text_len": 1.0}, TypeError, "text_len: expected an int"),
        ({"grid": 4}, TypeError, "grid: expected"),
        ({"grid": (0, 4)}, ValueError, "grid: expected at least 1"),
        ({"kind": "conv", "extent": 4}, ValueError, "extent: only kind"),
        ({"kernel": 4}, ValueError, "kernel: expected an odd size"),
    ],
)
def test_wrong_fields_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        AttentionPattern(**{"kind": "row", "text_len": 2, "grid": (4, 4), **arguments})


def test_a_mask_made_under_a_mode_is_not_what_others_get():
    pattern = AttentionPattern("row", text_len=3, grid=(2, 5))
    with torch._subclasses.FakeTensorMode():
        assert isinstance(pattern.mask(), torch._subclasses.FakeTensor)
    with torch.device("meta"):
        pattern.mask()
    assert type(pattern.mask()) is torch.Tensor
    assert pattern.mask().device.type == "cpu"


def test_numbers_beyond_the_image_see_the_same():
    small = AttentionPattern("conv", text_len=1, grid=(3, 4), kernel=25)
    assert torch.equal(AttentionPattern("conv", text_len=1, grid=(3, 4), kernel=2**31 - 1).mask(), small.mask())
    with pytest.raises(ValueError, match=r"^grid: expected at most 2\^31 - 1 positions"):
        AttentionPattern("row", text_len=0, grid=(2**20, 2**20))
