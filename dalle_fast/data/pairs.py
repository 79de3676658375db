# SPDX-License-Identifier: MIT
"""Users' own data: a folder of pictures with .txt captions, or WebDataset tar files. Read in place, never executed."""

from __future__ import annotations

import codecs
import glob
import os
import tarfile
import warnings
from pathlib import Path

from ..errors import DataError
from ..files import open_regular, parse_json
from .images import MAX_BYTES, SUFFIXES, decode_image, read_image
from .order import sample_indices
from .sample import Sample, check_split, digest

MAX_CAPTION_BYTES = 1 << 16
_SPLIT_SEED = 0x7061697273  # "pairs"


def decode_caption(content: bytes, name: str) -> str:
    """UTF-8 bytes -> one line of text; only the first 64 KiB are read.

    Raises:
        DataError: not UTF-8; names the file and the byte.
    """
    cut = len(content) > MAX_CAPTION_BYTES
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content[:MAX_CAPTION_BYTES], final=not cut)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: the caption is not UTF-8 (byte {error.start})") from None
    return " ".join(text.replace("\0", " ").split())


class _Pairs:
    """What both kinds share: the split by key, and the list of what was left out."""

    name: str

    def _finish(self, found: dict[str, str], source: str, split: str, problems: list[str]) -> None:
        check_split(split)
        self.problems = problems
        if not found:
            why = f" ({problems[0]})" if problems else ""
            raise DataError(f"{source}: no picture with a caption{why}; expected name.jpg|png|webp beside name.txt")
        if problems:
            shown = "; ".join(problems[:3])
            warnings.warn(f"{source}: {len(problems)} entries are left out: {shown}", stacklevel=3)
        keys = sorted(found)
        # a twentieth is held out, at least one
        order = sample_indices(_SPLIT_SEED, 0, len(keys), len(keys))
        count = max(1, len(keys) // 20) if len(keys) > 1 else 0
        heldout, train = order[:count], order[count:]
        picked = {"heldout": heldout, "train": train, "seen": train[:count], "all": order}[split]
        self.keys = [keys[i] for i in sorted(picked)]
        self.captions = [found[key] for key in self.keys]
        self.name = f"{source}/{split}"

    def __len__(self) -> int:
        return len(self.keys)


class FolderPairs(_Pairs):
    """Pictures of a folder and its subfolders, each beside a caption `name.txt`.

    Pictures without a caption, captions without a picture and captions that are not UTF-8 are left out, warned of and
    listed in `problems`.

    Args:
        path: the folder.
        split: "train", "heldout" (a seeded twentieth), "seen" or "all".

    Raises:
        DataError: no such folder, or no pair in it.
    """

    def __init__(self, path: Path | str, split: str = "train") -> None:
        root = Path(path)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        captions, pictures, problems = {}, {}, []
        for folder, folders, files in os.walk(root):
            folders.sort()
            for file in sorted(files):
                full = Path(folder) / file
                stem = full.relative_to(root).with_suffix("").as_posix()
                if full.suffix.lower() in SUFFIXES:
                    if stem in pictures:
                        problems.append(f"{full}: {pictures[stem].name} has the same name already")
                    else:
                        pictures[stem] = full
                elif full.suffix.lower() == ".txt":
                    captions[stem] = full
        problems += [f"{full}: has no caption {full.with_suffix('.txt').name}"
                     for stem, full in pictures.items() if stem not in captions]  # fmt: skip
        problems += [f"{full}: has no picture" for stem, full in captions.items() if stem not in pictures]
        found = {}
        for stem in pictures:
            if stem not in captions:
                continue
            try:
                with open_regular(captions[stem]) as file:
                    found[stem] = decode_caption(file.read(MAX_CAPTION_BYTES + 1), str(captions[stem]))
            except OSError as error:
                problems.append(f"{captions[stem]}: cannot be read ({error.strerror})")
            except DataError as error:
                problems.append(str(error))
        self._finish(found, str(root), split, problems)
        self._paths = [pictures[key] for key in self.keys]

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_image(self._paths[index]), self.captions[index], self.keys[index])

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and captions."""
        sizes = [str(path.stat().st_size) for path in self._paths]
        return digest(["folder", *self.keys, *self.captions, *sizes])


class TarPairs(_Pairs):
    """WebDataset tar files: `key.jpg|jpeg|png|webp|gif|bmp` with `key.txt` or `key.json` ({"caption": ...}).

    Members are read in place; everything else in the archive is passed over: nothing is extracted, unpickled or run.

    Args:
        pattern: a .tar file or a glob of several.
        split: "train", "heldout" (a seeded twentieth), "seen" or "all".

    Raises:
        DataError: no file, not a tar, cut off, or no pair in it.
    """

    def __init__(self, pattern: Path | str, split: str = "train") -> None:
        paths = sorted(glob.glob(str(pattern)))
        if not paths:
            raise DataError(f"{pattern}: no such file")
        members: dict[str, dict[str, tuple[str, int, int, str]]] = {}
        problems: list[str] = []
        for path in paths:
            for member in self._members(path):
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                suffix = "." + suffix.lower()
                kind = "image" if suffix in SUFFIXES else {".txt": "text", ".json": "json"}.get(suffix)
                where = f"{path}:{member.name}"
                if kind is None or not member.isreg():
                    continue
                if member.size > MAX_BYTES:
                    problems.append(f"{where}: {member.size} bytes, expected at most {MAX_BYTES}")
                    continue
                key = f"{Path(path).name}:{folder}/{stem}" if folder else f"{Path(path).name}:{stem}"
                entry = members.setdefault(key, {})
                if kind in entry:
                    problems.append(f"{where}: its key has a second {kind}")
                    continue
                entry[kind] = (path, member.offset_data, member.size, where)
        found = {}
        for key, entry in members.items():
            first = next(iter(entry.values()))[3]
            if "image" not in entry:
                problems.append(f"{first}: has no picture")
            elif "text" not in entry and "json" not in entry:
                problems.append(f"{first}: has no caption")
            else:
                try:
                    found[key] = self._caption(entry)
                except DataError as error:
                    problems.append(str(error))
        self._finish(found, str(pattern), split, problems)
        self._images = [members[key]["image"] for key in self.keys]

    @staticmethod
    def _members(path: str):
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                size, end = os.fstat(file.fileno()).st_size, 0
                for member in archive:
                    if member.size < 0 or member.offset < end:  # a header that leads back would be read for ever
                        raise DataError(f"{path}:{member.name}: not a whole, uncompressed tar file")
                    end = member.offset + tarfile.BLOCKSIZE
                    if member.offset_data + member.size > size:
                        raise DataError(f"{path}:{member.name}: the archive is cut off")
                    yield member
        except DataError:
            raise
        except (tarfile.TarError, ValueError, ArithmeticError, IndexError, EOFError, RecursionError) as error:
            raise DataError(f"{path}: not a whole, uncompressed tar file ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error

    @classmethod
    def _caption(cls, entry: dict[str, tuple[str, int, int, str]]) -> str:
        if "text" in entry:
            return decode_caption(cls._read(entry["text"]), entry["text"][3])
        where = entry["json"][3]
        try:
            value = parse_json(cls._read(entry["json"]))
            caption = value["caption"]
        except DataError:
            raise
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where}: expected JSON with a key caption") from None
        if not isinstance(caption, str):
            raise DataError(f"{where}: expected a string under caption, got {type(caption).__name__}")
        return decode_caption(caption.encode("utf-8", "replace"), where)

    @staticmethod
    def _read(place: tuple[str, int, int, str]) -> bytes:
        path, offset, size, where = place
        try:
            with open_regular(path) as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise DataError(f"{where}: the archive is cut off")
        return content

    def __getitem__(self, index: int) -> Sample:
        place = self._images[index]
        return Sample(decode_image(self._read(place), place[3]), self.captions[index], self.keys[index])

    def fingerprint(self) -> str:
        """SHA-256 of keys, sizes and captions."""
        return digest(["tar", *self.keys, *self.captions, *(str(place[2]) for place in self._images)])
