# SPDX-License-Identifier: MIT
"""The emoji data set and what it holds out."""

from __future__ import annotations

import numpy as np
import pytest

from dalle_fast.data import EmojiPairs, open_dataset
from dalle_fast.errors import ConfigError, DataError

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@pytest.fixture(scope="module")
def splits():
    return {split: EmojiPairs(split) for split in ("train", "heldout", "seen", "all")}


def split_caption(caption):
    name, _, tone = caption.removesuffix(" skin tone").rpartition(", ")
    return name, tone


def test_most_emoji_are_there_with_unique_captions(splits):
    everything = splits["all"]
    assert len(everything) > 3900
    assert len(set(everything.captions)) == len(everything)
    assert len(set(everything.keys)) == len(everything)
    assert all(caption == caption.lower().strip() and "_" not in caption for caption in everything.captions)
    assert "red heart" in everything.captions


def test_held_out_combinations_never_appear_in_training(splits):
    train, heldout = splits["train"], splits["heldout"]
    assert not set(train.keys) & set(heldout.keys)
    assert not set(train.captions) & set(heldout.captions)
    pictures = {train[i].image.tobytes() for i in range(len(train))}
    assert not [c for i, c in enumerate(heldout.captions) if heldout[i].image.tobytes() in pictures]


def test_of_each_held_out_concept_four_tones_are_trained(splits):
    train, heldout = set(splits["train"].captions), splits["heldout"].captions
    assert len(heldout) >= 60
    for caption in heldout:
        name, tone = split_caption(caption)
        assert tone in TONES, caption
        others = [f"{name}, {other} skin tone" for other in TONES if other != tone]
        assert all(other in train for other in others), caption
    assert {split_caption(caption)[1] for caption in heldout} == set(TONES)
    names = [split_caption(caption)[0] for caption in heldout]
    assert len(set(names)) == len(names)


def test_a_fifth_of_the_complete_concepts_is_held_out(splits):
    tones = {}
    for caption in splits["all"].captions:
        name, tone = split_caption(caption)
        if tone in TONES:
            tones.setdefault(name, set()).add(tone)
    complete = [name for name, found in tones.items() if len(found) == 5]
    assert abs(len(splits["heldout"]) - len(complete) / 5) <= 2


def test_seen_is_a_part_of_train_of_the_same_size(splits):
    assert set(splits["seen"].keys) <= set(splits["train"].keys)
    assert len(splits["seen"]) == len(splits["heldout"])
    assert all(split_caption(caption)[1] in TONES for caption in splits["seen"].captions)


def test_pictures_are_on_white_in_any_size():
    data = EmojiPairs("heldout", size=48)
    sample = data[0]
    assert sample.image.shape == (48, 48, 3)
    assert sample.image.dtype == np.uint8
    assert (sample.image[0, 0] == 255).all()
    assert sample.image.std() > 10


def test_fingerprints_tell_data_apart_and_repeat():
    prints = [EmojiPairs(*a).fingerprint() for a in (("train", 32), ("heldout", 32), ("train", 16))]
    assert len(set(prints)) == 3
    assert EmojiPairs("train", 32).fingerprint() == prints[0]


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="split: expected one of train, heldout, seen, all, got 'test'"):
        EmojiPairs("test")
    with pytest.raises(DataError, match="no-such: expected emoji, emoji-styles, shapes, a folder"):
        open_dataset("no-such", "train", 32)
