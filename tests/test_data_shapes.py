# SPDX-License-Identifier: MIT
"""The shapes data set and its checker."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle_fast.data import ShapesPairs, shapes
from dalle_fast.errors import DataError


@pytest.mark.parametrize("split", ["train", "heldout", "seen", "all"])
@pytest.mark.parametrize("size", [32, 45])
def test_the_checker_reads_every_clean_picture(split, size):
    data = ShapesPairs(split, size, num_samples=80)
    for i in range(len(data)):
        reading = shapes.check(data[i].image, data[i].caption)
        assert reading.ok, (data[i].caption, reading.found)


def test_the_checker_forgives_a_little_blur_and_noise():
    data = ShapesPairs("seen", 32, num_samples=100)
    rng = np.random.default_rng(0)
    right = 0
    for i in range(len(data)):
        blurred = np.asarray(Image.fromarray(data[i].image).filter(ImageFilter.GaussianBlur(0.5))).astype(float)
        noisy = (blurred + rng.normal(0, 12, blurred.shape)).clip(0, 255).astype(np.uint8)
        right += shapes.check(noisy, data[i].caption).ok
    assert right >= 95


def test_the_checker_refuses_what_is_wrong():
    thing = shapes.Thing
    a, b = thing("red", "circle", 3, 10, 10), thing("blue", "square", 18, 10, 10)
    picture = shapes.draw([a, b], 32)
    assert shapes.check(picture, "a red circle left of a blue square").ok
    assert shapes.check(picture, "a blue square right of a red circle").ok
    for wrong in (
        "a red circle right of a blue square",
        "a red circle above a blue square",
        "a blue circle left of a red square",
        "a red circle left of a green square",
        "a red triangle left of a blue square",
        "a large red circle",
        "two red circles",
    ):
        assert not shapes.check(picture, wrong).ok, wrong
    three = shapes.draw([thing("red", "cross", x, y, 9) for x, y in ((3, 3), (19, 3), (3, 19))], 32)
    assert shapes.check(three, "three red crosses").ok
    assert not shapes.check(three, "two red crosses").ok
    assert not shapes.check(np.full((32, 32, 3), 255, np.uint8), "a small red circle").ok


def test_held_out_combinations_never_appear_in_training():
    held = shapes.heldout_combinations()
    assert len(held) == 10
    train = ShapesPairs("train", 32, num_samples=4000)
    heldout = ShapesPairs("heldout", 32, num_samples=300)

    def triples(caption):
        match = shapes._PAIR_CAPTION.match(caption)
        if not match:
            return set()
        c1, s1, relation, c2, s2 = match.groups()
        return {(c1, s1, relation), (c2, s2, shapes.INVERSE[relation])}

    assert not [c for c in train.captions if triples(c) & held]
    assert all(triples(c) & held for c in heldout.captions)
    # but every part of them is trained: the colour and shape in other relations, the relation with other things
    seen = set().union(*map(triples, train.captions))
    for colour, shape, relation in held:
        assert any(t[:2] == (colour, shape) for t in seen)
        assert any(t[2] == relation and t[0] == colour for t in seen)
    assert not set(ShapesPairs("seen", 32).captions) & set(heldout.captions)


def test_samples_are_a_function_of_seed_and_index():
    a, b = ShapesPairs("train", 32, num_samples=30), ShapesPairs("train", 32, num_samples=50)
    for i in range(30):
        assert a.captions[i] == b.captions[i]
        assert (a[i].image == b[i].image).all()
    assert ShapesPairs("train", 32, num_samples=30, seed=1).captions != a.captions
    assert a.fingerprint() == ShapesPairs("train", 32, num_samples=30).fingerprint() != b.fingerprint()


def test_bad_input_is_named():
    with pytest.raises(DataError, match="size: shapes need at least 24 pixels, got 8"):
        ShapesPairs("train", 8)
    white = np.full((32, 32, 3), 255, np.uint8)
    with pytest.raises(DataError, match="caption: expected one that ShapesPairs writes, got 'a cat'"):
        shapes.check(white, "a cat")
    with pytest.raises(DataError, match="caption: 'pink' is not one of"):
        shapes.check(white, "a small pink circle")
    with pytest.raises(ValueError, match="image: expected uint8"):
        shapes.check(white.astype(float), "a small red circle")
