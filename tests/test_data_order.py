# SPDX-License-Identifier: MIT
"""The order of samples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.data import EmojiPairs, load_batch, sample_indices


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 500), st.integers(0, 90), st.integers(1, 40), st.integers(1, 30))
def test_any_cutting_gives_the_same_order(seed, start, count, num_items, part):
    whole = sample_indices(seed, start, count, num_items)
    cut = []
    for at in range(start, start + count, part):
        cut += sample_indices(seed, at, min(part, start + count - at), num_items)
    assert whole == cut
    assert len(whole) == count


def test_each_epoch_is_a_permutation_of_its_own():
    first, second = sample_indices(4, 0, 100, 100), sample_indices(4, 100, 100, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert sample_indices(5, 0, 100, 100) != first


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="num_items"):
        sample_indices(0, 0, 1, 0)
    with pytest.raises(ValueError, match="start"):
        sample_indices(0, -1, 1, 3)


def test_batches_carry_what_belongs_together():
    data = EmojiPairs("heldout")
    batch = load_batch(data, [5, 2], size=32)
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.captions == [data.captions[5], data.captions[2]]
    assert (batch.images[0].permute(1, 2, 0).numpy() == data[5].image).all()
    assert load_batch(data, [], size=32).images.shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match="counters: expected 2, got 1"):
        load_batch(data, [1, 2], size=32, counters=[0])
