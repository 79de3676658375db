# SPDX-License-Identifier: MIT
"""The command line as users meet it: right, wrong and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny import small_system

from dalle_fast.cli import COMMANDS, main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_system(tmp_path_factory.mktemp("system"))


def fails(capsys, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in args])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code in (0, None)
    assert "--" in capsys.readouterr().out


def test_train_help_lists_the_fields_of_the_stage(capsys):
    with pytest.raises(SystemExit):
        main(["train", "dalle", "--preset", "paper-12b", "--help"])
    out = capsys.readouterr().out
    assert "--model.width" in out
    assert "3968" in out
    assert "--loop.batch-size" in out


def test_a_dry_run_counts_the_papers_model(capsys):
    main(["train", "dvae", "--preset", "paper", "--dry-run"])
    assert "97,616,006" in capsys.readouterr().out
    main(["train", "dalle", "--preset", "emoji", "--dry-run", "--model.width", "128"])
    assert "parameters" in capsys.readouterr().out


def test_train_sample_complete_evaluate_tokenize(run_dir, tmp_path, capsys):
    flags = ["--loop.steps", "2", "--model.image-size", "16", "--model.width", "8", "--loop.batch-size", "4"]
    main(["train", "dvae", "--run", str(tmp_path / "dvae"), "--loop.precision", "fp32", *flags])
    assert "dvae: 2 updates" in capsys.readouterr().out
    config = tmp_path / "dvae" / "config.toml"
    main(["train", "dvae", "--run", str(tmp_path / "copy"), "--config", str(config), "--data", "shapes"] + [
        "--model.image-size", "32"])  # fmt: skip
    assert "dvae: 2 updates" in capsys.readouterr().out

    out = tmp_path / "out"
    main(["sample", "--run", str(run_dir), "--caption", "red heart", "--num-samples", "3", "--output", str(out)])
    assert "red heart: 3 pictures, best score" in capsys.readouterr().out
    assert len(json.loads((out / "red-heart.json").read_text())["samples"]) == 3

    picture = tmp_path / "mine.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(picture)
    main(["complete", "--run", str(run_dir), "--caption", "red heart", "--image", str(picture), "--keep-rows", "4",
          "--num-samples", "2", "--output", str(out)])  # fmt: skip
    assert "2 pictures" in capsys.readouterr().out

    main(["evaluate", "--run", str(run_dir), "--num-losses", "8", "--num-captions", "1", "--num-samples", "2"])
    assert (run_dir / "report.html").exists()
    tokens = tmp_path / "tokens.safetensors"
    main(["tokenize", "--run", str(run_dir / "dvae"), "--split", "heldout", "--output", str(tokens)])
    assert tokens.exists()


def test_mistakes_are_one_message(run_dir, tmp_path, capsys):
    assert "fly: no such command; expected one of demo, train" in fails(capsys, "fly")
    assert "expected a stage, dvae, clip or dalle, got vqgan" in fails(capsys, "train", "vqgan", "--run", "x")
    assert "--run: name a folder" in fails(capsys, "train", "dvae")
    assert "preset: dvae has emoji, shapes, paper" in fails(capsys, "train", "dvae", "--preset", "huge")
    bad = tmp_path / "bad.toml"
    bad.write_text("[loop]\nstep = 3\n")
    error = fails(capsys, "train", "dvae", "--config", bad, "--run", tmp_path / "r")
    assert "bad.toml: loop.step: no such key; did you mean steps?" in error
    assert "no such run folder" in fails(capsys, "sample", "--run", tmp_path / "none", "--caption", "x")
    assert "num_samples: expected" in fails(capsys, "sample", "--run", run_dir, "--caption", "x", "--num-samples", "0")
    assert "gone.png: cannot be read" in fails(
        capsys, "complete", "--run", run_dir, "--caption", "x", "--image", tmp_path / "gone.png", "--keep-rows", "2"
    )
    assert "minutes: expected a positive number" in fails(capsys, "demo", "--minutes", "-1", "--run", tmp_path / "d")
    assert "data: expected emoji or shapes" in fails(capsys, "demo", "--data", "cats", "--run", tmp_path / "d")
    error = fails(capsys, "train", "dvae", "--data", tmp_path, "--run", tmp_path / "r", "--loop.steps", "1")
    assert "no picture with a caption" in error
    error = fails(capsys, "train", "dvae", "--run", tmp_path / "r", "--loop.stepz", "1")
    assert "stepz" in error
    error = fails(capsys, "train", "dvae", "--run", tmp_path / "r", "--loop.steps", "many")
    assert "many" in error
    empty = fails(capsys)
    assert empty == "" or "usage" in empty


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, number, code):
    run = tmp_path / "dvae"
    flags = ["--loop.steps", "100000", "--loop.log-every", "1", "--model.width", "8", "--loop.batch-size", "4"]
    command = [sys.executable, "-m", "dalle_fast", "train", "dvae", "--run", str(run), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    log = run / "metrics.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    child.send_signal(number)
    _, error = child.communicate(timeout=30)
    assert child.returncode == code
    assert "The same command goes on from there." in error
    assert "Traceback" not in error
    assert list((run / "checkpoints").glob("step-*"))


def test_an_old_checkpoint_that_is_damaged_is_one_message(tmp_path, capsys):
    folder = tmp_path / "dvae" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"junk")
    error = fails(capsys, "tokenize", "--run", tmp_path / "dvae")
    assert "manifest.json: missing; the checkpoint was not finished" in error
