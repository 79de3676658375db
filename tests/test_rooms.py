# SPDX-License-Identifier: MIT
"""The law of the house: one word per op in every layer, and nobody includes what is not theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
OPS = ROOT / "dalle_fast" / "ops"
NOT_ROOMS = {"core", "scalar", "simt"}

CSRC_ROOMS = sorted(path.parent.name for path in CSRC.glob("*/bind.cpp") if path.parent.name not in NOT_ROOMS)
OPS_ROOMS = sorted(path.parent.name for path in OPS.glob("*/op.py"))
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
LAYERS = ["ops", "nn", "optim", "parallel", "data", "models", "sample", "train", "evaluate"]
MAY_IMPORT = {
    "ops": set(),
    "nn": {"ops"},
    "optim": {"ops"},
    "parallel": {"ops", "nn", "optim"},
    "data": {"ops"},
    "models": {"ops", "nn", "optim", "data"},
    "sample": {"ops", "nn", "data", "models"},
    "train": {"ops", "nn", "optim", "parallel", "data", "models", "sample"},
    "evaluate": {"ops", "nn", "data", "models", "sample", "train"},
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def test_the_same_rooms_in_every_layer():
    assert CSRC_ROOMS == OPS_ROOMS
    module = (CSRC / "module.cpp").read_text()
    public = (OPS / "__init__.py").read_text()
    for room in CSRC_ROOMS:
        assert f"bind_{room}(m);" in module
        assert f"from .{room} import" in public or room == "adamw16", f"ops/__init__.py does not offer {room}"


@pytest.mark.parametrize("room", CSRC_ROOMS)
def test_a_room_is_complete(room):
    for name in (f"{room}.h", "cpu.cpp", "bind.cpp"):
        assert (CSRC / room / name).exists()
    for name in ("__init__.py", "op.py", "reference.py", "cases.py"):
        assert (OPS / room / name).exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_stay_in_their_layer(path):
    found = includes(path)
    relative = path.relative_to(CSRC)
    assert not [name for name in found if name.startswith(("torch/", "ATen/", "c10/"))], "csrc knows no torch"
    may_know_python = path.name in {"bind.cpp", "bind.h", "caster.h", "module.cpp"}
    if not may_know_python:
        assert not [name for name in found if "pybind11" in name or name == "Python.h"]
    if path.name == "cpu.cpp" or relative.parts[0] == "scalar":
        assert not [name for name in found if "cuda" in name], "the CPU and scalar code knows no CUDA"
    room = relative.parts[0]
    for name in found:
        parts = name.split("/")
        if parts[0] == "..":
            assert parts[1] in NOT_ROOMS, f"{relative} looks into another room: {name}"
        assert room in NOT_ROOMS or parts[0] != "csrc"


@pytest.mark.parametrize("path", sorted(OPS.glob("*/*.py")), ids=lambda p: str(p.relative_to(OPS)))
def test_only_op_py_knows_the_extension(path):
    if path.name != "op.py":
        assert not re.search(r"\b_C\b", path.read_text()), "only op.py calls _C; the reference is independent of it"


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if (ROOT / "dalle_fast" / layer).is_dir()])
def test_imports_point_downwards(layer):
    for path in (ROOT / "dalle_fast" / layer).rglob("*.py"):
        text = path.read_text()
        depth = len(path.relative_to(ROOT / "dalle_fast" / layer).parts)
        upward = re.findall(r"from " + r"\." * (depth + 1) + r"(\w+)", text)
        absolute = re.findall(r"(?:from|import) dalle_fast\.(\w+)", text)
        for name in {*upward, *absolute} - {layer}:
            assert name not in LAYERS or name in MAY_IMPORT[layer], f"{path.relative_to(ROOT)} imports {name}"
