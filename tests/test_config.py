# SPDX-License-Identifier: MIT
"""Configs: TOML in and out, every mistake named."""

from __future__ import annotations

import pytest
from tiny import clip_config, dalle_config, dvae_config

from dalle_fast.errors import ConfigError
from dalle_fast.models import DALLEConfig
from dalle_fast.presets import PRESETS, paper_dalle, preset
from dalle_fast.train import RECIPES, DALLETrainConfig, DVAETrainConfig, load_config, save_config, with_steps


@pytest.mark.parametrize("config", [dvae_config(), dalle_config(), clip_config()], ids=lambda c: type(c).__name__)
def test_toml_round_trip(tmp_path, config):
    save_config(config, tmp_path / "config.toml", "x")
    assert load_config(type(config), tmp_path / "config.toml") == config


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in PRESETS.items() for name in names])
def test_every_preset_builds_and_round_trips(tmp_path, kind, name):
    config = preset(kind, name)
    assert isinstance(config, RECIPES[kind][0])
    save_config(config, tmp_path / "config.toml", kind)
    assert load_config(RECIPES[kind][0], tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1e-3", r"learning_rat: no such key; did you mean learning_rate\?"),
        ("[loop]\nstepz = 3", r"loop.stepz: no such key; did you mean steps\?"),
        ("[model]\nqqqqqq = 3", "model.qqqqqq: no such key; expected one of image_size"),
        ("learning_rate = 'fast'", "learning_rate: expected float, got 'fast'"),
        ("[loop]\nsteps = 1.5", "loop.steps: expected int, got 1.5"),
        ("[loop]\nsteps = true", "loop.steps: expected int, got True"),
        ("[loop]\nsteps = 0", "loop.steps: expected at least 1, got 0"),
        ("loop = 3", "loop: expected a table, got 3"),
        ("betas = [0.9]", "betas: expected 2 values"),
        ("this is not toml", "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(DVAETrainConfig, path)
    assert "mine.toml" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.toml: cannot be read"):
        load_config(DVAETrainConfig, tmp_path / "gone.toml")


def test_stretching_a_run_stretches_its_schedule():
    config = with_steps(preset("dvae", "paper"), 600_000)
    assert config.loop.steps == 600_000
    assert (config.beta_steps, config.tau_steps, config.learning_rate_steps) == (1_000, 30_000, 240_000)
    assert with_steps(preset("dvae", "emoji"), 600).tau_steps == 200


def test_the_papers_recipe():
    dvae = preset("dvae", "paper")
    assert (dvae.loop.steps, dvae.loop.batch_size, dvae.loop.ema_decay) == (3_000_000, 512, 0.999)
    assert (dvae.learning_rate, dvae.final_learning_rate, dvae.learning_rate_steps) == (1e-4, 1.25e-6, 1_200_000)
    assert (dvae.beta, dvae.beta_steps, dvae.final_tau, dvae.tau_steps) == (6.6, 5_000, 1 / 16, 150_000)
    assert (dvae.weight_decay, dvae.betas, dvae.data.augment) == (1e-4, (0.9, 0.999), "stage1")
    dalle = preset("dalle", "paper-12b")
    assert (dalle.loop.steps, dalle.loop.batch_size, dalle.loop.clip_norm) == (430_000, 1024, 4.0)
    assert (dalle.loop.ema_decay, dalle.loop.ema_every, dalle.loop.checkpointing) == (0.99, 25, True)
    assert dalle.loop.precision == "fp16-resblock"
    assert (dalle.learning_rate, dalle.warmup_steps, dalle.schedule) == (4.5e-4, 5_000, "plateau")
    assert (dalle.betas, dalle.weight_decay, dalle.bpe_dropout) == ((0.9, 0.96), 4.5e-2, 0.1)
    assert (dalle.optimizer, dalle.data.augment, dalle.model.dropout) == ("adamw16", "stage2", 0.0)
    assert dalle.model == DALLEConfig()
    # what only the small presets change
    assert (dvae.teacher_weight, dvae.initial_tau, dvae.data.emphasis) == (0.0, 1.0, "")


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="preset: dalle has emoji, shapes, paper-2.8b"):
        preset("dalle", "tiny")
    with pytest.raises(ConfigError, match="size: expected one of 2.8b, 5.6b, 12b"):
        paper_dalle("1b")
    for change in ({"schedule": "step"}, {"optimizer": "sgd"}, {"bpe_dropout": 1.0}, {"caption_dropout": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            DALLETrainConfig(**change)
