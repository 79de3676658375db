# SPDX-License-Identifier: MIT
"""How files go wrong: bytes, JSON values, and what stands in a folder in place of a file."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .guard import WATCH, canary_pickle

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
           10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))  # fmt: skip
TEXTS = ("", " ", "\0", "a\0b", "é", "\ud800", "🙂", "a\nb", "x" * 5000, "..", "../x", "/etc/passwd", "/dev/zero", "~",
         "nan", "-1", "1e999", "__import__('os')", "{{}}", "%s%n", "\x1b[31m", "con", "a" * 300 + ".png")  # fmt: skip


def number(rng: Random) -> int | float:
    """One that programs trip over, or any."""
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randint(-(10 ** rng.randint(1, 25)), 10**18)


def odd_value(rng: Random) -> Any:
    """Any value of JSON."""
    kind = rng.randrange(8)
    if kind < 3:
        return number(rng)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return [odd_value(rng) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(TEXTS): odd_value(rng) for _ in range(rng.randrange(3))}
    return deep(rng.choice([5, 50, 150]))


def deep(levels: int) -> list:
    """Lists in lists."""
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def json_value(rng: Random, value: Any, times: int | None = None) -> Any:
    """A copy with some nodes changed, dropped, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(times or rng.choice([1, 1, 1, 2, 4])):
        value = _one_change(rng, value)
    return value


def _one_change(rng: Random, value: Any) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any, level: int) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(items)[:200]:
            places.append((node, key))
            if level < 20:
                walk(child, level + 1)

    walk(value, 0)
    if not places or rng.random() < 0.02:
        return odd_value(rng)
    node, key = rng.choice(places)
    action = rng.randrange(8)
    if action < 4:
        node[key] = odd_value(rng)
    elif action == 4:
        del node[key]
    elif action == 5 and isinstance(node, dict):
        node[rng.choice([key + "x", key[:-1], key.upper(), *TEXTS])] = node.pop(key)
    elif action == 6:
        _add(node, key)
    else:
        old = node[key]
        node[key] = -old if type(old) in (int, float) else [old] if rng.random() < 0.5 else str(old)
    return value


def _add(node: Any, key: Any) -> None:
    if isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[f"{key}_2"] = copy.deepcopy(node[key])


def json_bytes(rng: Random, value: Any) -> bytes:
    """A changed value as JSON, sometimes with a key twice, sometimes damaged as text."""
    text = json.dumps(json_value(rng, value))
    if rng.random() < 0.1:
        text = text.replace("{", '{"kind": 1, "kind": 2, ', 1)
    content = text.encode("utf-8", "surrogatepass")
    return damaged(rng, content) if rng.random() < 0.15 else content


def damaged(rng: Random, content: bytes) -> bytes:
    """Bytes after one to four accidents."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        data = rng.choice(_ACCIDENTS)(rng, data)
    return bytes(data)


def _flip(rng: Random, data: bytearray) -> bytearray:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _set(rng: Random, data: bytearray) -> bytearray:
    if data:
        data[rng.randrange(len(data))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x5B, 0x7B])
    return data


def _cut(rng: Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _near_start(rng: Random, data: bytearray) -> bytearray:
    """Headers are where lengths are."""
    at = rng.randrange(min(len(data), 64) or 1)
    word = rng.choice([2**60, 2**63, 2**64 - 1, 2**32, 2**31 - 1, 0, 1, 100_000_000]).to_bytes(8, "little")
    data[at : at + 8] = word if rng.random() < 0.5 else word[::-1]
    return data


def _at_start(rng: Random, data: bytearray) -> bytearray:
    data[:8] = (
        rng.choice([2**60, 2**63, 2**64 - 1, 2**32, len(data), len(data) - 8, 99_999_999]).to_bytes(
            8, "little", signed=False
        )
        if len(data) >= 8
        else b""
    )
    return data


def _insert(rng: Random, data: bytearray) -> bytearray:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))
    return data


def _remove(rng: Random, data: bytearray) -> bytearray:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice([1, 2, 8, 100, 1000])]
    return data


def _double(rng: Random, data: bytearray) -> bytearray:
    at = rng.randrange(len(data) + 1)
    part = data[at : at + rng.choice([1, 8, 512, 5000])]
    data[at:at] = part * rng.choice([1, 1, 3])
    return data


def _noise(rng: Random, data: bytearray) -> bytearray:
    at, count = rng.randrange(len(data) + 1), rng.choice([1, 4, 32, 256])
    data[at : at + count] = rng.randbytes(count)
    return data


def _digits(rng: Random, data: bytearray) -> bytearray:
    """Another number in place of one in a text."""
    places = [i for i, byte in enumerate(data[:20000]) if 48 <= byte < 58]
    if places:
        at = rng.choice(places)
        data[at : at + 1] = str(rng.choice(NUMBERS[:17]) if rng.random() < 0.7 else "9" * 5000).encode()
    return data


def _replace(rng: Random, data: bytearray) -> bytearray:
    choices: list[bytes] = [b"", b"\0" * 1000, b"[" * 100_000, b'{"a":' * 50_000, canary_pickle(rng.randrange(6)),
                            gzip.compress(bytes(data)), b"\xff\xfe" + bytes(data), b"\xef\xbb\xbf" + bytes(data),
                            b"PK\x03\x04" + bytes(data), b"\x93NUMPY\x01\0" + canary_pickle(), rng.randbytes(2000),
                            b"1" * 10_000, b"null", b"[]", b"{}", b'"x"', b"a" * 1_000_000]  # fmt: skip
    return bytearray(rng.choice(choices))


_ACCIDENTS: list[Callable[[Random, bytearray], bytearray]] = [
    _flip, _flip, _set, _cut, _near_start, _at_start, _insert, _remove, _double, _noise, _digits, _replace]  # fmt: skip


# ---- folders


def replace_entry(rng: Random, path: Path) -> str:
    """Puts something else where a file or folder is. Returns what."""
    with WATCH.off():
        return _replaced(rng, path)


def _replaced(rng: Random, path: Path) -> str:
    kind = rng.choice(["gone", "folder", "pipe", "loop", "zeros", "dangling", "sparse", "empty", "full folder", "other",
                       "socket"])  # fmt: skip
    other = next((p for p in sorted(path.parent.glob("*")) if p != path and p.is_file()), None)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        path.mkdir()
        (path / "x").write_bytes(b"x")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif kind == "empty":
        path.touch()
    elif kind == "other" and other is not None:
        path.symlink_to(other.name)
    elif kind == "socket":
        os.mknod(path, 0o140644)
    return kind
