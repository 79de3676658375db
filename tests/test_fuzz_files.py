# SPDX-License-Identifier: MIT
"""Some cases of every target of fuzz_files, planted bugs that it has to see, and what it once found."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from fuzz.runner import fuzz
from fuzz_files.__main__ import TARGETS
from fuzz_files.base import FileTarget
from fuzz_files.guard import canary_pickle, judged
from tiny import DVAE as TINY

from dalle_fast import bench
from dalle_fast.data import FolderPairs, Tokenizer, read_image
from dalle_fast.errors import CheckpointError, ConfigError, DataError, UserError
from dalle_fast.models import DVAE, store
from dalle_fast.train import DVAETrainConfig, load_config
from dalle_fast.train.report import read_lines

CASES = {"config": 20, "checkpoint": 20, "tokenizer": 150, "data": 60, "picture": 150, "leftovers": 10, "bench": 200,
         "command": 20}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_no_file_and_no_command_line_ends_in_a_traceback(name, tmp_path):
    torch.set_num_threads(1)  # cases run in forked processes
    target = TARGETS[name](tmp_path)
    report = fuzz(target, 1, range(CASES[name]), limit=target.seconds)
    assert not report.failures, "\n".join(f"case {f.number} of seed 1: {f.kind}: {f.text}" for f in report.failures)
    assert report.num_cases == CASES[name]
    assert report.counts["refused"] > CASES[name] / 10


# ---- controls


PLANTED = ("right", "refused", "canary", "raw", "words", "breach", "death", "hang", "wrong", "breach")


class Planted(FileTarget):
    """What comes of each case is known."""

    name = "planted"
    seconds = 1.0

    def make(self, seed, number, without=frozenset()):
        case = super().make(seed, number)
        case.run = lambda: judged(lambda folder: self.planted(number, folder), self.names)
        return case

    def planted(self, number, folder):
        file = folder / "file"
        file.write_bytes(canary_pickle())
        if number == 1:
            raise UserError(f"{file}: refused")
        if number == 2:
            pickle.loads(file.read_bytes())
        elif number == 3:
            raise KeyError("raw")
        elif number == 4:
            raise UserError("something is wrong")
        elif number == 5:
            (self.root / "outside").write_text("x")
        elif number == 6:
            os.abort()
        elif number == 7:
            while True:
                pass
        elif number == 8:
            return "two and two is five"
        elif number == 9:
            os.system("true")
        return None


def test_the_fuzzer_sees_planted_bugs(tmp_path):
    target = Planted(tmp_path)
    report = fuzz(target, 0, range(len(PLANTED)), limit=target.seconds)
    found = {failure.number: failure.kind for failure in report.failures}
    assert found == {i: kind for i, kind in enumerate(PLANTED) if kind not in ("right", "refused")}
    assert report.counts["right"] == report.counts["refused"] == 1


# ---- what it found


def saved(run_dir: Path, step: int) -> Path:
    torch.manual_seed(step)
    model = DVAE(TINY)
    files = {**store.model_files(model, model.state_dict()), "state.json": {"step": step}}
    return store.save_snapshot(run_dir / "checkpoints", f"step-{step:08d}", files)


def test_damaged_checkpoints_do_not_take_the_place_of_whole_ones(tmp_path):
    for step in (1, 2, 8, 9):
        saved(tmp_path, step)
    for step in (8, 9):  # the run went on from 2 and has not reached them yet
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "step-best").mkdir()
    saved(tmp_path, 3)
    store.prune(tmp_path, 2)
    names = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert names == {"step-00000002", "step-00000003", "step-00000008", "step-00000009", "step-best"}
    assert store.find_latest(tmp_path).name == "step-00000003"


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path):
    folder = saved(tmp_path, 1)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"version": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="lists no files"):
        store.load_model(folder)
    entry = {"size": (folder / "state.json").stat().st_size, "sha256": store.file_hash(folder / "state.json")}
    manifest.write_text(json.dumps({"version": 1, "files": {"state.json": entry}}))
    with pytest.raises(CheckpointError, match=r"model.json: is not in the manifest"):
        store.load_model(folder)


def test_a_config_that_does_not_fit_the_file_takes_no_memory(tmp_path):
    model = DVAE(TINY)
    description = {"kind": "dvae", "config": {"width": 1 << 14, "vocab_size": 1 << 20}}
    files = {**store.model_files(model), "model.json": description}
    store.save_snapshot(tmp_path / "checkpoints", "step-00000001", files)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        store.load_model(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "0.png"
    os.mkfifo(pipe)
    (tmp_path / "0.txt").write_text("a pipe")
    with pytest.raises(DataError, match="not an ordinary file"):
        read_image(pipe)
    with pytest.raises(DataError, match="not an ordinary file"):
        FolderPairs(tmp_path, "all")[0]
    for read, error in ((Tokenizer.load, DataError), (bench.load, UserError), (read_lines, DataError)):
        with pytest.raises(error, match="not an ordinary file"):
            read(pipe)
    with pytest.raises(ConfigError, match="not an ordinary file"):
        load_config(DVAETrainConfig, pipe)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("padding", {"strategy": {"Fixed": 1 << 30}, "direction": "Right", "pad_id": 0, "pad_type_id": 0}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        ("normalizer", None),
    ],
)  # fmt: skip
def test_a_tokenizer_holds_a_vocabulary_and_nothing_else(key, value):
    description = json.loads(Tokenizer.train(["a red house"], 260).to_json())
    with pytest.raises(DataError, match=f"mine.json: not a tokenizer.*{key}"):
        Tokenizer.from_json(json.dumps({**description, key: value}), "mine.json")
    description["model"]["vocab"]["a"] = 10**9
    with pytest.raises(DataError, match="expected each id"):
        Tokenizer.from_json(json.dumps(description))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nnum_groups = 1000000000", "model.num_groups: expected a positive int of at most 12"),
        ("[loop]\nseed = 99999999999999999999", "loop.seed: expected a number of at most"),
        ("[loop]\nclip_norm = nan", "loop.clip_norm: expected 0 or more, got nan"),
        ("learning_rate = inf", "learning_rate: expected a number of at most"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "9" * 5000, "cannot be read as TOML"),
    ],
)
def test_numbers_of_a_config_have_ends(tmp_path, text, message):
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(DVAETrainConfig, file)


def test_a_broken_line_in_a_log_does_not_cost_the_rest(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n\xff\x00\n' + b"[" * 100_000 + b'\n[1]\n{"loss": 2}\n{"step": 2}\n{"step": 3, "lo')
    assert read_lines(log) == [{"step": 1}, {"step": 2}]
