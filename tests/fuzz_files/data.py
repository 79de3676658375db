# SPDX-License-Identifier: MIT
"""Folders and WebDataset tars with odd pictures, captions, names and members."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from dalle_fast.data import augment_image, load_batch, open_dataset, read_image
from dalle_fast.data.augment import AUGMENTATIONS

from .base import CAPTIONS, FileTarget
from .guard import WATCH
from .mutate import TEXTS, canary_pickle, damaged, json_bytes, number, replace_entry

SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I")


def picture_bytes(rng: Random, suffix: str) -> bytes:
    """A picture in one of many modes, sometimes with odd metadata, sometimes animated."""
    height, width = rng.choice([(1, 1), (1, 40), (40, 1), (16, 16), (33, 17)])
    pixels = np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
    picture = Image.fromarray(pixels)
    mode = rng.choice(MODES)
    stored = io.BytesIO()
    options: dict = {}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 77])
        options["exif"] = exif
    if rng.random() < 0.2:
        options["icc_profile"] = rng.randbytes(50)
    if rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [picture] * rng.choice([1, 5])}
    if rng.random() < 0.1:
        options["transparency"] = rng.choice([0, 3, (1, 2, 3)])
    try:
        picture.convert("L" if mode.startswith("I") else mode).convert(mode).save(stored, FORMATS[suffix], **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SystemError):  # the format lacks it
        stored = io.BytesIO()
        picture.save(stored, FORMATS[suffix])
    return stored.getvalue()


def _claims_many_pixels(rng: Random, content: bytes) -> bytes:
    """A PNG or BMP header with other sizes."""
    side = rng.choice([0, 1, 8000, 8001, 30_000, 2**31 - 1, 2**32 - 1])
    at = 16 if content[:4] == b"\x89PNG" else 18
    order = "big" if at == 16 else "little"
    return content[:at] + side.to_bytes(4, order) + content[at + 4 :]


def odd_picture(rng: Random) -> tuple[str, bytes]:
    """A suffix and content: right, damaged, of another format, a bomb or no picture at all."""
    suffix = rng.choice(SUFFIXES)
    content = picture_bytes(rng, suffix if rng.random() < 0.9 else rng.choice(SUFFIXES))
    way = rng.randrange(10)
    if way < 5:
        return suffix, damaged(rng, content)
    if way == 5:
        return suffix, _claims_many_pixels(rng, content)
    if way == 6:
        other = [b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%"
                 b"BoundingBox: 0 0 9 9\n", b"SIMPLE  =                    T", b"II*\0" + b"\0" * 100, b"8BPS\0\1",
                 b"\0\0\1\0", b"GIF89a\xff\xff\xff\xff\xf7\0\0", canary_pickle()]  # fmt: skip
        return suffix, rng.choice(other)
    return suffix, content


class PictureTarget(FileTarget):
    """Files given as a picture (`complete --image`), up to what the model gets."""

    name = "picture"

    def case(self, rng: Random, folder: Path) -> str | None:
        suffix, content = odd_picture(rng)
        file = folder / f"mine.{suffix}"
        file.write_bytes(content)
        if rng.random() < 0.05:
            replace_entry(rng, file)
        size = rng.choice([1, 8, 32])
        image = read_image(file)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            return f"{image.dtype} {image.shape}"
        square = augment_image(image, size, rng.choice(AUGMENTATIONS), 1, rng.randrange(2**40))
        return None if square.shape == (size, size, 3) else f"augmented to {square.shape}"


class DataTarget(FileTarget):
    """A data set is refused, or gives batches in which what cannot be read is replaced and named."""

    name = "data"

    def case(self, rng: Random, folder: Path) -> str | None:
        source = self._folder(rng, folder) if rng.random() < 0.4 else self._tar(rng, folder)
        found = [open_dataset(source, split, 8) for split in ("train", "all")]
        for dataset in found:
            if len({*dataset.keys}) != len(dataset) or len(dataset.captions) != len(dataset):
                return f"{len(dataset)} samples, {len({*dataset.keys})} keys, {len(dataset.captions)} captions"
            if any("\n" in caption or "\0" in caption for caption in dataset.captions):
                return f"captions of several lines: {dataset.captions}"
            dataset.fingerprint()
            if len(dataset):
                batch = load_batch(dataset, range(len(dataset)), size=8, augment=rng.choice(AUGMENTATIONS))
                if batch.images.shape != (len(dataset), 3, 8, 8):
                    return f"images {batch.images.shape}"
        again = open_dataset(source, "all", 8)
        same = again.keys == found[1].keys and again.fingerprint() == found[1].fingerprint()
        return None if same else "another order the second time"

    def _folder(self, rng: Random, folder: Path) -> str:
        root = folder / "pictures"
        root.mkdir()
        for i in range(rng.randrange(6)):
            suffix, content = odd_picture(rng) if rng.random() < 0.4 else ("png", picture_bytes(rng, "png"))
            stem = _file_name(rng, i)
            where = root / rng.choice([".", ".", "sub", "sub/sub"])
            where.mkdir(parents=True, exist_ok=True)
            for name, text in ((f"{stem}.{suffix}", content), (f"{stem}.txt", _caption(rng))):
                if rng.random() < 0.95:
                    (where / os.fsdecode(name.encode("utf-8", "surrogateescape"))).write_bytes(text)
        entries = [path for path in root.rglob("*")]
        if entries and rng.random() < 0.2:
            replace_entry(rng, rng.choice([root, *entries]))
        if root.is_dir() and rng.random() < 0.05:
            with WATCH.off():
                (root / "around").symlink_to(root)
        return str(root)

    def _tar(self, rng: Random, folder: Path) -> str:
        for shard in range(rng.choice([1, 1, 2])):
            content = _archive(rng)
            file = folder / f"{shard}.tar"
            file.write_bytes(damaged(rng, content) if rng.random() < 0.4 else content)
            if rng.random() < 0.03:
                replace_entry(rng, file)
        return str(folder / rng.choice(["0.tar", "*.tar", "[0-9].tar", "**.tar"]))


def _file_name(rng: Random, i: int) -> str:
    if rng.random() < 0.7:
        return str(i)
    return rng.choice(["a.b", "a b", "\udcff", "é", "x" * 200, "-rf", "%s", ".hidden", "name.tar", "0", "A", "a"])


def _caption(rng: Random) -> bytes:
    way = rng.randrange(6)
    if way < 3:
        return rng.choice(CAPTIONS).encode()
    if way == 3:
        return rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return damaged(rng, rng.choice(CAPTIONS).encode() * rng.choice([1, 1000]))


def _archive(rng: Random) -> bytes:
    """A tar with right pairs, and members that nobody should touch."""
    stored = io.BytesIO()
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=stored, mode="w", format=form, errors="surrogateescape") as archive:
        for i in range(rng.randrange(6)):
            stem = rng.choice([str(i), str(i), f"sub/{i}", "../up", "/abs", "dup", "\udcff", "x" * 150, "a.b", ""])
            suffix, content = odd_picture(rng) if rng.random() < 0.4 else ("png", picture_bytes(rng, "png"))
            text = ("txt", _caption(rng)) if rng.random() < 0.5 else ("json", json_bytes(rng, {"caption": "a dog"}))
            for ending, data in ((suffix, content), text):
                if rng.random() < 0.93:
                    _add(archive, f"{stem}.{ending}", data)
            if rng.random() < 0.3:
                _add(archive, f"{stem}.{rng.choice(['pyd', 'pkl', 'pickle', 'pth', 'cls', 'txt', 'json', 'npy'])}",
                     canary_pickle(rng.randrange(6)))  # fmt: skip
            if rng.random() < 0.2:
                _add_odd(rng, archive, stem)
    return stored.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    with contextlib.suppress(ValueError):  # a name that the format cannot hold
        archive.addfile(member, io.BytesIO(data))


def _add_odd(rng: Random, archive: tarfile.TarFile, stem: str) -> None:
    member = tarfile.TarInfo(f"{stem}.{rng.choice(['png', 'txt', 'json'])}")
    member.type = rng.choice([tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
                              tarfile.FIFOTYPE, tarfile.CONTTYPE, b"S", b"Z"])  # fmt: skip
    member.linkname = rng.choice(["/etc/passwd", "../../x", "/dev/zero", "0.txt"])
    if archive.format == tarfile.PAX_FORMAT and rng.random() < 0.5:
        key = rng.choice(["GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "size", "mtime", "path", "linkpath"])
        member.pax_headers = {key: str(rng.choice([number(rng), "1,2,3", "x", "../x", 10**30]))}
    with contextlib.suppress(ValueError):
        archive.addfile(member)
