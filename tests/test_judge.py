# SPDX-License-Identifier: MIT
"""The judge: originals, damaged originals, other emoji, averages, twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dalle_fast.data import EmojiPairs
from dalle_fast.evaluate import Judge, judge_for


def _pictures(dataset, indices=None) -> np.ndarray:
    return np.stack([dataset[i].image for i in (range(len(dataset)) if indices is None else indices)])


@pytest.fixture(scope="module")
def judge() -> Judge:
    return judge_for("emoji", 32)


@pytest.fixture(scope="module")
def heldout():
    dataset = EmojiPairs("heldout", 32)
    return _pictures(dataset), dataset.captions


def test_every_original_is_right(judge):
    dataset = EmojiPairs("all", 32)
    judged = judge.judge(_pictures(dataset), dataset.captions)
    assert judged.kind.all()
    assert judged.tone.all()
    assert judged.right["all"].all()


@pytest.mark.parametrize("size", [16, 48, 64])
def test_any_size_is_judged(size):
    dataset = EmojiPairs("heldout", size)
    judged = judge_for("emoji", size).judge(_pictures(dataset), dataset.captions)
    assert judged.right["all"].all()


def _shifted(pictures: np.ndarray) -> np.ndarray:
    moved = np.full_like(pictures, 255)
    moved[:, 1:, :-1] = pictures[:, :-1, 1:]
    return moved


def _blurred(pictures: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(1.2))) for p in pictures])


def _noisy(pictures: np.ndarray) -> np.ndarray:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).numpy()
    return (pictures + 25 * noise).clip(0, 255).astype(np.uint8)


def _faded(pictures: np.ndarray) -> np.ndarray:
    return (255 - 0.8 * (255.0 - pictures)).astype(np.uint8)


@pytest.mark.parametrize("damage", [_shifted, _blurred, _noisy, _faded])
def test_damaged_originals_keep_kind_and_tone(judge, heldout, damage):
    pictures, captions = heldout
    judged = judge.judge(damage(pictures), captions)
    assert judged.kind.mean() >= 0.97
    assert judged.tone.mean() >= 0.95


def test_a_faint_picture_keeps_its_kind_and_loses_its_tone(judge, heldout):
    pictures, captions = heldout
    faint = (255 - 0.5 * (255.0 - pictures)).astype(np.uint8)
    judged = judge.judge(faint, captions)
    assert judged.kind.mean() > 0.9
    assert judged.tone.mean() < 0.5


def test_other_emoji_are_right_by_chance_alone(judge, heldout):
    _, captions = heldout
    train = EmojiPairs("train", 32)
    indices = torch.randint(len(train), (len(captions),), generator=torch.Generator().manual_seed(1)).tolist()
    judged = judge.judge(_pictures(train, indices), captions)
    assert judged.kind.mean() <= 0.05
    assert judged.tone.mean() <= 0.4


def test_chance_is_what_the_others_captions_score(judge, heldout):
    pictures, captions = heldout
    nearest = judge.nearest(pictures)
    chance = judge.chance(nearest, captions)
    turned = [judge.compare(np.roll(nearest, k), captions)["tone"].mean() for k in range(1, len(captions))]
    assert chance["tone"] == pytest.approx(np.mean(turned))
    assert 0.1 < chance["tone"] < 0.35
    assert chance["kind"] < 0.02
    assert judge.chance(nearest[:1], captions[:1])["tone"] == 0


def test_an_average_of_tones_has_the_kind_and_an_average_of_kinds_has_neither(judge):
    dataset = EmojiPairs("all", 32)
    tones = {}
    for i, (kind, tone) in enumerate(zip(dataset.labels["kind"], dataset.labels["tone"], strict=True)):
        if len(tone) == 1:
            tones.setdefault(kind, []).append(i)
    five = [group for group in tones.values() if len(group) == 5][::8]
    mean = np.stack([_pictures(dataset, group).mean(0) for group in five]).round().astype(np.uint8)
    right = [judge.judge(mean, [dataset.captions[group[k]] for group in five]) for k in range(5)]
    assert np.mean([r.kind.mean() for r in right]) > 0.95
    assert np.mean([r.tone.mean() for r in right]) <= 0.2 + 1e-9  # one answer for five captions
    grey = np.repeat(mean.mean(0, keepdims=True).round().astype(np.uint8), len(five), 0)
    assert judge.judge(grey, [dataset.captions[group[0]] for group in five]).kind.mean() <= 1 / len(five)


def test_scrambled_pictures_are_not_recognised(judge, heldout):
    pictures, captions = heldout
    tiles = pictures.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 64, 4, 4, 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).numpy()
    mixed = tiles[:, order].reshape(-1, 8, 8, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(pictures.shape)
    assert judge.judge(np.ascontiguousarray(mixed), captions).kind.mean() < 0.05


def test_a_blank_picture_shows_nothing(judge, heldout):
    _, captions = heldout
    judged = judge.judge(np.full((2, 32, 32, 3), 255, np.uint8), captions[:2])
    assert judged.nearest.tolist() == [-1, -1]
    assert not judged.kind.any()
    assert not judged.tone.any()


def test_twins_stand_for_each_other(judge):
    dataset = EmojiPairs("all", 32)
    pictures = _pictures(dataset, [dataset.captions.index("norway"), dataset.captions.index("red apple")])
    assert judge.judge(pictures, ["svalbard & jan mayen", "svalbard & jan mayen"]).kind.tolist() == [True, False]


def test_tones_of_two_people_are_right_together_and_in_order(judge):
    dataset = EmojiPairs("all", 32)
    caption = "men holding hands light skin tone dark skin tone"
    picture = _pictures(dataset, [dataset.captions.index(caption)] * 2)
    judged = judge.judge(picture, [caption, "men holding hands dark skin tone light skin tone"])
    assert judged.tone.tolist() == [True, False]
    asked = judge.has([caption, "red apple"])
    assert asked["tone"].tolist() == [True, False]
    assert asked["kind"].all()


def test_a_catalogue_may_have_more_labels():
    dataset = EmojiPairs("heldout", 32)
    flat = _pictures(dataset)
    captions = [*dataset.captions, *(f"an inverted drawing of {c}" for c in dataset.captions)]
    labels = {name: [*values, *values] for name, values in dataset.labels.items()}
    labels["style"] = ["twemoji"] * len(flat) + ["inverted"] * len(flat)
    judge = Judge(np.concatenate([flat, flat[..., ::-1]]), captions, labels)
    judged = judge.judge(flat[..., ::-1].copy(), dataset.captions)
    assert judged.kind.mean() > 0.95
    assert not judged.right["style"].any()
    assert not judged.right["all"].any()


def test_other_sources_have_no_judge():
    assert judge_for("shapes", 32) is None


def test_bad_input_is_named(judge, heldout):
    pictures, captions = heldout
    with pytest.raises(ValueError, match="captions: no original is called 'a purple cow'"):
        judge.judge(pictures[:1], ["a purple cow"])
    with pytest.raises(ValueError, match=r"images: expected uint8 \[N, 32, 32, 3\], got float32"):
        judge.nearest(pictures.astype(np.float32))
    with pytest.raises(ValueError, match=r"images: expected uint8 \[N, 32, 32, 3\]"):
        judge.nearest(pictures[:, :16])
    with pytest.raises(ValueError, match="captions: expected 2, one for each picture, got 1"):
        judge.judge(pictures[:2], captions[:1])
    with pytest.raises(ValueError, match="kind: expected 2, one for each picture, got 1"):
        Judge(pictures[:2], captions[:2], {"kind": ["x"]})
    with pytest.raises(ValueError, match=r"pictures: expected uint8 \[M, H, H, 3\]"):
        Judge(pictures[:, :16], captions, {"kind": captions})
    assert judge.nearest(pictures[:0]).shape == (0,)
