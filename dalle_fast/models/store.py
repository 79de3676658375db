# SPDX-License-Identifier: MIT
"""Checkpoints: written aside, synced, listed with SHA-256, renamed; read only when every byte is right.

A checkpoint is a folder of files and `manifest.json`, which holds the size and hash of each. `checkpoints/latest` is a
text file with the name of the newest one; a damaged folder is passed over for the newest that verifies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ..data import Tokenizer
from ..errors import CheckpointError, ConfigError, shown
from ..files import open_regular, parse_json, read_bytes
from .clip import CLIP, TINY, CLIPConfig
from .dalle import DALLE, DALLEConfig
from .dvae import DVAE, DVAEConfig

MANIFEST = "manifest.json"
LATEST = "latest"
MODELS: dict[str, tuple[type, type]] = {
    "dvae": (DVAE, DVAEConfig),
    "dalle": (DALLE, DALLEConfig),
    "clip": (CLIP, CLIPConfig),
}


# ---- writing


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Whatever is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: the disk is full, the folder cannot be written, or a folder, pipe or device has this name; what was
            there is as it was.
    """
    if path.exists() and not path.is_file():  # a rename would put an ordinary file in the place of a device
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def serialize(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if value and all(isinstance(item, torch.Tensor) for item in value.values()):
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in value.items()})
    return json.dumps(value, indent=1).encode()


def save_snapshot(
    parent: Path, name: str, files: Mapping[str, Any], on_phase: Callable[[str], None] | None = None
) -> Path:
    """Writes `parent/name` as a whole or not at all, then points `parent/latest` at it.

    Args:
        parent: the run's `checkpoints` folder; made when missing.
        name: of the new folder; an existing one of that name is replaced.
        files: file name -> bytes, text, a dict of tensors (safetensors) or any JSON value.
        on_phase: called with each phase's name before it begins; for tests.

    Returns:
        The folder.

    Raises:
        CheckpointError: it could not be written (a full disk, say); what was there before is untouched.
    """
    phase = on_phase or (lambda _: None)
    with writing(parent, name, phase) as (aside, entries):
        for file_name, value in files.items():
            phase(f"write {file_name}")
            content = serialize(value)
            with open(aside / file_name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            entries[file_name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return parent / name


@contextlib.contextmanager
def writing(parent: Path, name: str, phase: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, dict]]]:
    """Gives a folder to write into, and the manifest's entries to fill; at the end it becomes `parent/name`.

    Raises:
        CheckpointError: an OSError came up; nothing of the folder is left.
    """
    final = parent / name
    aside = parent / f".{name}.tmp"
    entries: dict[str, dict] = {}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        aside.mkdir()
        yield aside, entries
        phase("manifest")
        write_atomic(aside / MANIFEST, json.dumps({"version": 1, "files": entries}, indent=1).encode())
        _sync_folder(aside)
        phase("rename")
        _remove(final)
        os.rename(aside, final)
        _sync_folder(parent)
        phase("latest")
        write_atomic(parent / LATEST, (name + "\n").encode())
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error.strerror or error}); "
            f"earlier ones are untouched{hint}"
        ) from error
    phase("done")


# ---- reading


def read_manifest(folder: Path) -> list[tuple[str, int, str]]:
    """(name, size, SHA-256) of each file that a checkpoint vouches for.

    Raises:
        CheckpointError: there is no manifest, or something else in its place.
    """
    manifest = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    try:
        entries = parse_json(read_bytes(manifest))["files"]
        pairs = [(name, entry["size"], str(entry["sha256"])) for name, entry in entries.items()]
    except FileNotFoundError:
        raise CheckpointError(f"{manifest}: missing; the checkpoint was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: not a manifest ({type(error).__name__}: {error})") from error
    if not pairs:
        raise CheckpointError(f"{manifest}: lists no files")
    for name, _, _ in pairs:
        if Path(name).name != name or name in ("..", MANIFEST) or "\0" in name:
            raise CheckpointError(f"{manifest}: {shown(name)} is not a plain file name")
    return pairs


def verify(folder: Path) -> None:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the file that is missing, of the wrong size or changed.
    """
    for name, size, digest in read_manifest(folder):
        path = folder / name
        try:
            with open_regular(path) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise CheckpointError(
                        f"{path}: expected {shown(size)} bytes, found {found}; the checkpoint is damaged"
                    )
                actual = hash_of(file)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if actual != digest:
            raise CheckpointError(f"{path}: its SHA-256 is not the manifest's; the checkpoint is damaged")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hash_of(file)


def hash_of(file: BinaryIO) -> str:
    """SHA-256 of an open file, in hex."""
    sha = hashlib.sha256()
    while part := file.read(1 << 24):
        sha.update(part)
    return sha.hexdigest()


def find_latest(run_dir: Path, on_damaged: Callable[[CheckpointError], None] | None = None) -> Path | None:
    """The newest checkpoint of a run whose manifest verifies, or None when there is none.

    Args:
        run_dir: folder with `checkpoints/`.
        on_damaged: told about each checkpoint that is passed over.
    """
    folder = Path(run_dir) / "checkpoints"
    names = sorted((path.name for path in folder.glob("step-*") if path.is_dir()), reverse=True)
    for name in names:
        try:
            verify(folder / name)
        except CheckpointError as error:
            if on_damaged:
                on_damaged(error)
            continue
        return folder / name
    return None


def prune(run_dir: Path, keep: int, known: set[str] | None = None) -> None:
    """Deletes all but the newest `keep` (at least 2) checkpoints that are whole, and damaged ones among them.

    What is newer than the newest whole one stays: it is not a run's to count or to delete.

    Args:
        run_dir: folder with `checkpoints/`.
        keep: how many.
        known: names that need no look any more because they were written or verified here; grows.
    """
    known = set() if known is None else known
    folder = Path(run_dir) / "checkpoints"
    names = [path.name for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    whole = 0
    for name in sorted(names, reverse=True):
        if whole >= max(keep, 2):
            shutil.rmtree(folder / name, ignore_errors=True)
            continue
        if name not in known:
            try:
                verify(folder / name)
            except CheckpointError:
                continue
            known.add(name)
        whole += 1


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file.

    Raises:
        CheckpointError: it is missing or not safetensors.
    """
    try:
        open_regular(path).close()
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # as torch puts it
        raise CheckpointError(f"{path}: cannot be read as safetensors ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error


# ---- models


def model_files(model: nn.Module, ema: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The files that describe a model: weights, averaged weights, kind and config, tokenizer."""
    kind = next(name for name, (cls, _) in MODELS.items() if isinstance(model, cls))
    files: dict[str, Any] = {
        "model.safetensors": model.state_dict(),
        "model.json": {"kind": kind, "config": dataclasses.asdict(model.config)},
    }
    if ema is not None:
        files["ema.safetensors"] = dict(ema)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.to_json()
    return files


def load_model(path: Path | str, weights: str = "ema", expect: str | None = None) -> nn.Module:
    """A model from a checkpoint folder or a run folder (its newest good checkpoint), in eval mode.

    Args:
        path: folder.
        weights: "ema" (averaged; falls back to the plain ones when a run keeps none) or "model".
        expect: "dvae", "dalle" or "clip" when only that will do.

    Raises:
        CheckpointError: nothing there, damaged, or of another kind.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f'weights: expected "ema" or "model", got {weights!r}')
    folder = Path(path)
    if not (folder / MANIFEST).exists():
        damaged: list[CheckpointError] = []
        latest = find_latest(folder, damaged.append)
        if latest is None:
            if damaged:
                raise damaged[0]
            raise CheckpointError(f"{folder}: no checkpoint here (expected a run folder or a checkpoint folder)")
        folder = latest
    else:
        verify(folder)
    listed = {name for name, _, _ in read_manifest(folder)}
    description = read_json(_listed(folder, "model.json", listed))
    kind = description.get("kind") if isinstance(description, dict) else None
    if not isinstance(kind, str) or kind not in MODELS or (expect and kind != expect):
        expected = expect or " or ".join(MODELS)
        raise CheckpointError(f"{folder / 'model.json'}: expected kind {expected}, got {shown(kind)}")
    cls, config_cls = MODELS[kind]
    try:
        config = config_cls(**description["config"])
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder / 'model.json'}: not a {kind} config ({_one_line(error)})") from error
    tokenizer = Tokenizer.load(folder / "tokenizer.json") if "tokenizer.json" in listed else None
    name = "ema.safetensors" if weights == "ema" and "ema.safetensors" in listed else "model.safetensors"
    path = _listed(folder, name, listed)
    tensors = read_tensors(path)

    def make() -> nn.Module:
        try:
            return cls(config, tokenizer) if cls is CLIP else cls(config)
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'model.json'}: not a {kind} config ({_one_line(error)})") from error

    if kind != "clip" or config.architecture == TINY:
        with torch.device("meta"):  # a config that does not fit the file must not take its memory
            _check_shapes(make().state_dict(), tensors, path)
    model = make()
    if tokenizer is not None:
        model.tokenizer = tokenizer
    load_weights(model, tensors, path)
    return model.eval()


def _listed(folder: Path, name: str, listed: set[str]) -> Path:
    """A file that the manifest vouches for."""
    if name not in listed:
        raise CheckpointError(f"{folder / name}: is not in the manifest")
    return folder / name


def _check_shapes(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], path: Path) -> None:
    if odd := sorted(expected.keys() ^ found.keys()):
        side = "is missing" if odd[0] in expected else "is not the model's"
        raise CheckpointError(f"{path}: does not fit the model ({shown(odd[0])} {side})")
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or tensor.is_floating_point() != other.is_floating_point():
            raise CheckpointError(
                f"{path}: does not fit the model ({name}: expected {tensor.dtype} {list(tensor.shape)}, "
                f"got {other.dtype} {list(other.shape)})"
            )


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """load_state_dict that names the file.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the model ({str(error).splitlines()[-1].strip()})") from error
