# SPDX-License-Identifier: MIT
"""Users' folders and tar files, with everything that goes wrong in them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data import FolderPairs, TarPairs, load_batch, open_dataset
from dalle_fast.data.pairs import MAX_CAPTION_BYTES
from dalle_fast.errors import DataError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(40):
        (tmp_path / f"{i:03d}.png").write_bytes(png(i))
        (tmp_path / f"{i:03d}.txt").write_text(f"picture number {i}\n")
    return tmp_path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_is_split_and_read(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").write_bytes(png(200))
    (folder / "sub" / "x.txt").write_text("in a subfolder")
    splits = {name: FolderPairs(folder, name) for name in ("train", "heldout", "seen", "all")}
    assert len(splits["all"]) == 41
    assert len(splits["heldout"]) == len(splits["seen"]) == 2
    assert not set(splits["train"].keys) & set(splits["heldout"].keys)
    assert set(splits["seen"].keys) <= set(splits["train"].keys)
    data = splits["all"]
    at = data.keys.index("sub/x")
    assert data[at].caption == "in a subfolder"
    assert (data[at].image[..., 0] == 200).all()
    assert data.captions[data.keys.index("007")] == "picture number 7"
    assert data.fingerprint() == FolderPairs(folder, "all").fingerprint()
    (folder / "007.txt").write_text("changed")
    assert data.fingerprint() != FolderPairs(folder, "all").fingerprint()


def test_missing_partners_are_named_and_left_out(folder):
    (folder / "lonely.png").write_bytes(png(1))
    (folder / "silent.txt").write_text("no picture")
    with pytest.warns(UserWarning, match="2 entries are left out"):
        data = FolderPairs(folder, "all")
    assert len(data) == 40
    text = "\n".join(data.problems)
    assert "lonely.png: has no caption lonely.txt" in text
    assert "silent.txt: has no picture" in text


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(DataError, match="no picture with a caption; expected name.jpg"):
        FolderPairs(tmp_path)
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"no picture with a caption \(.*a.png: has no caption a.txt\)"):
        FolderPairs(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        FolderPairs(tmp_path / "nowhere")


def test_odd_captions(folder):
    (folder / "000.txt").write_bytes(b"")
    (folder / "001.txt").write_bytes(b"caf\xe9")  # Latin-1
    (folder / "002.txt").write_text("x" * 5_000_000)
    (folder / "003.txt").write_text("שלום עולם", encoding="utf-8")
    (folder / "004.txt").write_bytes("\ufeffwith a mark\0 and a\n\nline".encode())
    with pytest.warns(UserWarning, match=r"001.txt: the caption is not UTF-8 \(byte 3\)"):
        data = FolderPairs(folder, "all")
    captions = dict(zip(data.keys, data.captions, strict=True))
    assert captions["000"] == ""
    assert "001" not in captions
    assert len(captions["002"]) == MAX_CAPTION_BYTES
    assert captions["003"] == "שלום עולם"
    assert captions["004"] == "with a mark and a line"


def test_a_caption_cut_inside_a_character_is_still_utf8(folder):
    (folder / "000.txt").write_text("é" * MAX_CAPTION_BYTES, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = FolderPairs(folder, "all")
    assert set(data.captions[data.keys.index("000")]) == {"é"}


def test_bad_pictures_are_replaced_the_same_way_each_time(folder):
    (folder / "005.png").write_bytes(b"not a picture")
    (folder / "006.png").write_bytes(png(6)[:46])
    data = FolderPairs(folder, "all")
    at = [data.keys.index(key) for key in ("004", "005", "006", "007")]
    first, second = (load_batch(data, at, size=8, seed=3, counters=range(4)) for _ in range(2))
    assert first.keys == second.keys
    assert (first.images == second.images).all()
    assert first.keys[0] == "004"
    assert first.keys[3] == "007"
    assert len(first.replaced) == 2
    assert "005.png: not a picture" in first.replaced[0]
    assert "006.png: the picture is damaged" in first.replaced[1]
    assert all(c == f"picture number {int(k)}" for c, k in zip(first.captions, first.keys, strict=True))


def test_only_bad_pictures_stop_with_a_message(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"junk")
        (tmp_path / f"{i}.txt").write_text("junk")
    with pytest.raises(DataError, match=r"16 samples in a row cannot be read; the last: .*png: not a picture"):
        load_batch(FolderPairs(tmp_path, "all"), [0], size=8)


def test_a_tar_is_read_in_place(tmp_path):
    members = {}
    for i in range(30):
        members[f"{i:03d}.png"] = png(i)
        if i % 2:
            members[f"{i:03d}.txt"] = f"number {i}".encode()
        else:
            members[f"{i:03d}.json"] = json.dumps({"caption": f"number {i}"}).encode()
    path = tar_of(tmp_path / "a.tar", members)
    data = open_dataset(str(path), "all", 8)
    assert isinstance(data, TarPairs)
    assert len(data) == 30
    for i in range(30):
        sample = data[i]
        number = int(sample.key.split(":")[1])
        assert sample.caption == f"number {number}"
        assert (sample.image[..., 0] == number).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_several_tars_by_a_glob(tmp_path):
    for name in ("s-0.tar", "s-1.tar"):
        tar_of(tmp_path / name, {"x.png": png(1), "x.txt": b"same key, other file"})
    assert TarPairs(str(tmp_path / "s-*.tar"), "all").keys == ["s-0.tar:x", "s-1.tar:x"]


class Canary:
    def __reduce__(self):
        return (Path("canary").touch, ())


def test_nothing_in_a_tar_is_executed_or_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    poison = pickle.dumps(Canary())
    members = {
        "a.png": png(1),
        "a.txt": b"good",
        "a.pkl": poison,
        "a.pyd": poison,
        "b.pickle": poison,
        "../escape.png": png(2),
        "../escape.txt": b"up",
        "/absolute.png": png(3),
        "/absolute.txt": b"root",
    }
    data = TarPairs(tar_of(tmp_path / "p.tar", members), "all")
    for i in range(len(data)):
        assert data[i].image.shape == (6, 8, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.tar"]
    assert not (tmp_path.parent / "escape.png").exists()


def test_links_in_a_tar_are_passed_over(tmp_path):
    path = tmp_path / "l.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.png", png(1)), ("a.txt", b"good")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert TarPairs(path, "all").captions == ["good"]


def test_broken_tars_are_named(tmp_path):
    good = tar_of(tmp_path / "a.tar", {"x.png": png(1), "x.txt": b"text", "y.png": png(2), "y.txt": b"text"})
    content = good.read_bytes()
    for cut in (100, 700, 1400):
        bad = tmp_path / "cut.tar"
        bad.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"cut.tar"):
            TarPairs(bad)
    (tmp_path / "no.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match=r"no.tar: not a whole, uncompressed tar file"):
        TarPairs(tmp_path / "no.tar")
    with pytest.raises(DataError, match=r"gone.tar: no such file"):
        TarPairs(tmp_path / "gone.tar")


def test_odd_members_are_named(tmp_path):
    path = tar_of(
        tmp_path / "odd.tar",
        {
            "a.png": png(1),
            "a.txt": b"good",
            "b.png": png(2),
            "c.txt": b"no picture",
            "d.png": png(3),
            "d.json": b"{not json",
            "e.png": png(4),
            "e.json": b'{"caption": 7}',
            "f.png": png(5),
            "f.txt": b"\xff\xfe",
        },
    )
    with pytest.warns(UserWarning, match="5 entries are left out"):
        data = TarPairs(path, "all")
    text = "\n".join(data.problems)
    for part in (
        "odd.tar:b.png: has no caption",
        "odd.tar:c.txt: has no picture",
        "odd.tar:d.json: expected JSON with a key caption",
        "odd.tar:e.json: expected a string under caption, got int",
        "odd.tar:f.txt: the caption is not UTF-8 (byte 0)",
    ):
        assert part in text
    assert data.captions == ["good"]


def test_a_bad_picture_in_a_tar_is_named_by_member(tmp_path):
    path = tar_of(tmp_path / "t.tar", {"x.png": b"broken", "x.txt": b"text"})
    with pytest.raises(DataError, match=r"t.tar:x.png: not a picture"):
        TarPairs(path, "all")[0]


def test_pictures_of_any_shape_come_in_one_size(folder):
    batch = load_batch(FolderPairs(folder, "all"), range(3), size=16)
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.images.numpy().dtype == np.uint8
