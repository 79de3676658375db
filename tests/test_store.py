# SPDX-License-Identifier: MIT
"""Checkpoints: whole or not there, verified byte by byte, nothing lost when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from tiny import DVAE as TINY

from dalle_fast.errors import CheckpointError
from dalle_fast.models import DVAE, store


def save(run_dir, step, value=None):
    torch.manual_seed(step)
    model = DVAE(TINY)
    files = {**store.model_files(model, model.state_dict()), "state.json": {"step": step}}
    store.save_snapshot(run_dir / "checkpoints", f"step-{step:08d}", files)
    return model


def test_a_model_comes_back_as_it_was(tmp_path):
    model = save(tmp_path, 7)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-00000007"):
        loaded = store.load_model(path, expect="dvae")
        assert loaded.config == model.config
        assert not loaded.training
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000007\n"


def test_averaged_weights_are_preferred(tmp_path):
    model = DVAE(TINY)
    ema = {name: p * 0 for name, p in model.state_dict().items()}
    store.save_snapshot(tmp_path / "checkpoints", "step-00000001", store.model_files(model, ema))
    assert all(not p.any() for p in store.load_model(tmp_path).parameters())
    assert any(p.any() for p in store.load_model(tmp_path, weights="model").parameters())


def files_of(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "model.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "grow"])
def test_any_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / name
    content = path.read_bytes()
    if damage == "flip":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "grow":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    messages = []
    found = store.find_latest(tmp_path, messages.append)
    assert found.name == "step-00000001", (name, damage)
    # a manifest with one letter changed may name another file or hash
    shown = "step-00000002" if (name, damage) == ("manifest.json", "flip") else name
    assert shown in str(messages[0])
    with pytest.raises(CheckpointError, match=shown):
        store.verify(tmp_path / "checkpoints" / "step-00000002")
    store.load_model(tmp_path)  # uses step 1


def test_nothing_whole_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        store.load_model(tmp_path)
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ema.safetensors: cannot be read"):
        store.load_model(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step-00000001"
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "manifest.json").write_text(
        json.dumps({"version": 1, "files": {"../../secret": {"size": 1, "sha256": "0"}}})
    )
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        store.verify(folder)


@pytest.mark.parametrize("phase", ["write model.safetensors", "write state.json", "manifest", "rename", "latest"])
def test_a_crash_in_any_phase_leaves_a_good_checkpoint(tmp_path, phase):
    save(tmp_path, 1)

    class Crash(BaseException):
        pass

    def on_phase(name):
        if name == phase:
            raise Crash

    model = DVAE(TINY)
    files = {**store.model_files(model), "state.json": {"step": 2}}
    with pytest.raises(Crash):
        store.save_snapshot(tmp_path / "checkpoints", "step-00000002", files, on_phase)
    found = store.find_latest(tmp_path)
    assert found.name == ("step-00000002" if phase == "latest" else "step-00000001")
    store.save_snapshot(tmp_path / "checkpoints", "step-00000002", files)  # and the next save works
    assert store.find_latest(tmp_path).name == "step-00000002"


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    real = os.fsync
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    model = DVAE(TINY)
    with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\).*free some space"):
        store.save_snapshot(tmp_path / "checkpoints", "step-00000002", store.model_files(model, model.state_dict()))
    after = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert after == before


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        save(disk, 1)
        with pytest.raises(CheckpointError, match="No space left on device"):
            for step in range(2, 30):
                save(disk, step)
        store.load_model(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 1)


def test_pruning_keeps_at_least_two(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    store.prune(tmp_path, 0)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000004", "step-00000005"]


def test_another_kind_or_config_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"model.json: expected kind dalle, got 'dvae'"):
        store.load_model(tmp_path, expect="dalle")
    model = DVAE(TINY)
    for description, message in (
        ({"kind": "gan", "config": {}}, "expected kind dvae or dalle or clip, got 'gan'"),
        ({"kind": "dvae", "config": {"wide": 3}}, "not a dvae config"),
        ({"kind": "dvae", "config": {"width": 12}}, "does not fit the model"),
    ):
        files = {**store.model_files(model), "model.json": description}
        store.save_snapshot(tmp_path / "checkpoints", "step-00000002", files)
        with pytest.raises(CheckpointError, match=message):
            store.load_model(tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    model = DVAE(TINY)
    files = {**store.model_files(model), "model.safetensors": b"\x80\x04canary"}
    files.pop("ema.safetensors", None)
    store.save_snapshot(tmp_path / "checkpoints", "step-00000001", files)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
        store.load_model(tmp_path)
