# SPDX-License-Identifier: MIT
"""The system that ships: its size, its hashes, that it draws; and how it is made, on a tiny one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DALLE, DVAE, clip_config, dalle_config, dvae_config, small_system

from dalle_fast import pretrain
from dalle_fast.cli import main
from dalle_fast.data import open_dataset
from dalle_fast.errors import CheckpointError, ConfigError
from dalle_fast.model_card import model_card
from dalle_fast.models.store import load_model, read_tensors, verify
from dalle_fast.sample import SampleOptions, System, pretrained
from dalle_fast.train.config import tomllib
from dalle_fast.train.patches import PatchCodes, fit_codes, nearest, patches_of
from dalle_fast.train.report import read_lines

FEW = SampleOptions(num_samples=2, temperature=0.7)


@pytest.fixture(scope="module")
def shipped():
    path = pretrained.find()
    assert path is not None, "the package has no dalle_fast/pretrained/emoji"
    return path


@pytest.fixture(scope="module")
def system():
    return System.load("emoji")


# ---- what ships


def test_the_shipped_system_is_whole_and_small(shipped):
    assert pretrain.size_of(shipped) <= pretrain.MAX_BYTES
    for stage in ("dvae", "clip", "dalle"):
        verify(shipped / stage)
        tensors = read_tensors(shipped / stage / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    card = (shipped / "README.md").read_text()
    for word in ("CC BY 4.0", "Apache-2.0", "MIT", "Twemoji", "make pretrained", "seed"):
        assert word in card


def test_wheels_take_every_file_along(shipped):
    root = Path(pretrain.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["dalle_fast"]
    taken = {path for pattern in patterns for path in root.glob(pattern)}
    assert {path for path in shipped.rglob("*") if path.is_file()} <= taken


def test_its_card_tells_what_its_record_says(shipped):
    record = json.loads((shipped / "training.json").read_text())
    assert model_card(record) == (shipped / "README.md").read_text()
    numbers = record["numbers"]["emoji-styles"]
    for split in ("seen", "heldout"):
        assert numbers[split]["kind"] > numbers[split]["chance_kind"]
        assert numbers[split]["tone"] > numbers[split]["chance_tone"]


def test_weights_are_read_as_float32(system):
    for model in (system.dvae, system.clip, system.dalle):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not model.training
    assert system.name == "pretrained emoji"


def test_a_seed_draws_the_same_tokens_again(system):
    first, again = (system.sample("red heart", FEW) for _ in range(2))
    assert (first.tokens == again.tokens).all()
    assert (first.images == again.images).all()
    other = system.sample("red heart", dataclasses.replace(FEW, seed=1))
    assert (first.tokens != other.tokens).any()
    assert first.system == "pretrained emoji"
    assert first.images.shape[1:] == (64, 64, 3)


def test_a_red_heart_is_red_and_a_green_one_is_green(system):
    greedy = dataclasses.replace(FEW, num_samples=4)
    for caption, channel in (("red heart", 0), ("green heart", 1), ("blue heart", 2)):
        picture = system.sample(caption, greedy).images[0].reshape(-1, 3).astype(float)
        ink = picture[(picture < 200).any(axis=1)]
        assert len(ink) > 300
        assert ink.mean(axis=0).argmax() == channel


def test_sample_without_a_run_says_that_it_is_pretrained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["sample", "--caption", "red heart", "--num-samples", "2"])
    out = capsys.readouterr().out
    assert out.startswith("pretrained emoji: weights that come with the package")
    record = json.loads((tmp_path / "samples" / "red-heart.json").read_text())
    assert record["system"] == "pretrained emoji"
    assert Image.open(tmp_path / "samples" / "red-heart.png").height > 96


def test_names_that_are_no_system(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"moji: no such run folder, nor a pretrained system \(there is: emoji\)"):
        System.load("moji")
    for odd in ("..", "emoji/dvae", "", "/"):
        assert pretrained.find(odd) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()  # a folder of that name comes first
    with pytest.raises(CheckpointError, match="dvae: no checkpoint here"):
        System.load("emoji")


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damaged_weights_are_named(shipped, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(shipped, folder)
    path = folder / "dalle" / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-5])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"dalle/model.safetensors: (its SHA-256|expected \d+ bytes|cannot be)"):
        System.load(folder)


def test_a_run_of_ones_own_is_not_called_pretrained(tmp_path):
    system = System.load(small_system(tmp_path))
    assert system.name == ""
    assert system.sample("red heart", dataclasses.replace(FEW, num_samples=1)).system == ""


# ---- how it is made


def test_patches_are_the_squares_of_a_picture():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.uint8).view(2, 3, 4, 6)
    patches = patches_of(images, 2)
    assert patches.shape == (2, 2, 3, 12)
    assert torch.equal(patches[1, 1, 2] * 255, images[1, :, 2:4, 4:6].flatten().float())


def test_nearest_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    points, centres = torch.rand(500, 7, generator=generator), torch.rand(40, 7, generator=generator)
    assert torch.equal(nearest(points, centres), torch.cdist(points, centres).argmin(dim=1))


def test_codes_are_clusters_and_white_is_one(tmp_path):
    dataset = open_dataset("shapes", "train", 32)
    model = dataclasses.replace(DVAE, image_size=32, vocab_size=32)
    centres = fit_codes(dataset, model, seed=3, num_patches=2000, rounds=6)
    assert torch.equal(centres, fit_codes(dataset, model, seed=3, num_patches=2000, rounds=6))
    assert torch.equal(centres[0], torch.ones(12))
    images = torch.stack([torch.from_numpy(np.array(dataset[i].image)) for i in range(64)]).permute(0, 3, 1, 2)
    points = patches_of(images, 2).flatten(0, 2)
    error = (centres[nearest(points, centres)] - points).square().mean()
    assert error < 0.1 * points.var(dim=0).mean()  # the pictures are noisy
    codes = PatchCodes(centres, 2)
    codes.save(tmp_path / "codes.safetensors")
    again = PatchCodes.load(tmp_path / "codes.safetensors", 2)
    assert again.hash == codes.hash
    assert torch.equal(again.encode(images), nearest(points, centres).view(64, 16, 16))


@pytest.fixture
def tiny_presets(monkeypatch):
    """The stages of the shipped system, made of tiny configs."""
    made = {"dvae": dvae_config(30), "clip": clip_config(4), "dalle": dalle_config(12, schedule="cosine")}
    assert made["dalle"].model == DALLE
    monkeypatch.setattr(pretrain, "preset", lambda kind, name: made[kind])
    monkeypatch.setattr(pretrain, "SOURCE", "emoji")


def test_training_resumes_and_what_it_gives_is_exported(tiny_presets, tmp_path):
    for stage in pretrain.STAGES:
        pretrain.train_stage(stage, tmp_path / "run", quiet=True)
    lines = [line for line in read_lines(tmp_path / "run" / "dvae" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["named"] < lines[0]["named"]
    assert lines[-1]["nll"] < lines[0]["nll"]
    for stage in pretrain.STAGES[1:]:
        pretrain.train_stage(stage, tmp_path / "parts", steps=3, quiet=True)
        pretrain.train_stage(stage, tmp_path / "parts", quiet=True)
    whole, parts = (load_model(tmp_path / name / "dvae").state_dict() for name in ("run", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())

    folder = pretrain.export(tmp_path / "run", tmp_path / "ships")
    assert sorted(path.name for path in folder.iterdir()) == ["clip", "dalle", "dvae"]
    loaded = System.load(folder)
    before = load_model(tmp_path / "run" / "dalle").state_dict()
    for name, tensor in loaded.dalle.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=2**-11, atol=2**-24)
    assert loaded.sample("red heart", FEW).images.shape == (2, 16, 16, 3)
    with pytest.raises(ConfigError, match="stage: expected one of codes, dvae, clip, dalle, got 'gan'"):
        pretrain.train_stage("gan", tmp_path / "run")


def test_a_run_goes_on_with_its_codes_alone(tiny_presets, tmp_path):
    pretrain.train_stage("dvae", tmp_path, steps=2, quiet=True)
    codes = PatchCodes.load(tmp_path / "codes.safetensors", 2)
    PatchCodes(codes.centres.flip(0), 2).save(tmp_path / "codes.safetensors")
    with pytest.raises(CheckpointError, match="other codes"):
        pretrain.train_stage("dvae", tmp_path, steps=4, quiet=True)


def test_the_command_makes_a_stage(tiny_presets, tmp_path):
    main(["pretrain", "--run", str(tmp_path), "--stage", "codes"])
    assert (tmp_path / "codes.safetensors").exists()


def test_a_system_that_is_too_large_does_not_ship(tiny_presets, tmp_path, monkeypatch):
    run = small_system(tmp_path / "run")
    monkeypatch.setattr(pretrain, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"\d+ bytes, expected at most 1000"):
        pretrain.export(run, tmp_path / "ships")
