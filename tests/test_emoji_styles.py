# SPDX-License-Identifier: MIT
"""The data set emoji-styles, on small packages made here; npm is a stand-in, the real packages only where cached."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data import emoji
from dalle_fast.data.emoji_styles import EmojiStylesPairs, catalogue, data_folder, names, packages, pairs, raster
from dalle_fast.errors import ConfigError, DataError

RED = '<rect width="{0}" height="{0}" fill="#ff0000"/>'
ICONS = {
    "red-apple": RED.format(8),
    "cook-dark": '<circle cx="4" cy="4" r="3" fill="#804020"/>',
    "cook": '<circle cx="4" cy="4" r="3" fill="#ffcc00"/>',
    "alarmclock": '<path d="M0 0h8v4H0z" fill="#00f"/>',
    "letter-q": '<path d="M0 0h4v8H0z" fill="#0f0"/>',
    "blob": RED.format(2),
}


def tgz(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def package_of(folder, style, members, name="@made/here"):
    path = tgz(folder / f"{style}-1.0.0.tgz", members)
    return packages.Package(name, "1.0.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), style)


def icons_json(icons=ICONS, **more):
    table = {"width": 8, "height": 8, "icons": {key: {"body": body} for key, body in icons.items()}}
    return json.dumps({**table, **more}).encode()


def webp(colour):
    buffer = io.BytesIO()
    Image.new("RGBA", (32, 32), colour).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(folder, packages): a flat set with names, a 3D set by code points, and two of Twemoji."""
    pytest.importorskip("resvg_py", reason="resvg-py draws the pictures")
    monkeypatch.setattr(catalogue, "_twemoji", lambda size: iter(list(TWEMOJI(size))[:2]))
    flat = package_of(tmp_path, "flat", {"package/icons.json": icons_json(), "package/info.json": b"not read"})
    threes = {
        "package/assets/1f34e.webp": webp((0, 0, 255, 255)),
        "package/assets/1F9D1-1f3fd-200d-1f373.webp": webp((9, 9, 9, 0)),
        "package/assets/nothing.webp": webp((1, 2, 3, 255)),
        "package/assets/../../1f34f.webp": b"passed over",
        "package/assets/deep/1f34f.webp": b"passed over",
    }
    return tmp_path, (flat, package_of(tmp_path, "3d", threes))


TWEMOJI = catalogue._twemoji


def test_drawings_get_one_name_a_thing_and_captions_with_their_style(made):
    folder, chosen = made
    found = catalogue.load_catalogue(16, chosen, folder)
    captions = {d.key: d.caption for d in found.drawings if d.style != "twemoji"}
    assert captions == {
        "flat/red-apple": "a flat drawing of a red apple",
        "flat/cook": "a flat drawing of a cook",
        "flat/cook-dark": "a flat drawing of a cook, dark skin tone",
        "flat/alarmclock": "a flat drawing of an alarm clock",
        "flat/letter-q": "a flat drawing of a letter q",
        "3d/1f34e": "a 3d picture of a red apple",
        "3d/1F9D1-1f3fd-200d-1f373": "a 3d picture of a cook, medium skin tone",
    }
    by_key = dict(zip([d.key for d in found.drawings], found.drawings, strict=True))
    assert by_key["flat/red-apple"].concept == by_key["3d/1f34e"].concept == "1f34e"
    assert by_key["flat/cook-dark"].tones == (0x1F3FF,)
    assert sum(d.style == "twemoji" for d in found.drawings) == 2


def test_pictures_are_drawn_on_white_in_a_square(made):
    folder, chosen = made
    found = catalogue.load_catalogue(16, chosen, folder)
    pictures = dict(zip([d.key for d in found.drawings], found.pictures, strict=True))
    assert found.pictures.shape[1:] == (16, 16, 3)
    assert found.pictures.dtype == np.uint8
    assert (pictures["flat/red-apple"] == [255, 0, 0]).all()
    assert (pictures["3d/1f34e"] == [0, 0, 255]).all()
    assert (pictures["3d/1F9D1-1f3fd-200d-1f373"] == 255).all()  # transparent
    assert (pictures["flat/alarmclock"][:8] == [0, 0, 255]).all()
    assert (pictures["flat/alarmclock"][8:] == 255).all()


def test_a_second_call_reads_the_cache_and_a_damaged_one_is_drawn_again(made, monkeypatch):
    folder, chosen = made
    first = catalogue.load_catalogue(16, chosen, folder)
    drawn = []
    draw_all = catalogue._draw_all
    monkeypatch.setattr(catalogue, "_draw_all", lambda *a: drawn.append(a) or draw_all(*a))
    again = catalogue.load_catalogue(16, chosen, folder)
    assert not drawn
    assert again.drawings == first.drawings
    assert (again.pictures == first.pictures).all()
    (array,) = folder.glob("pictures-16-*.u8")
    content = bytearray(array.read_bytes())
    content[7] ^= 1
    array.write_bytes(content)
    again = catalogue.load_catalogue(16, chosen, folder)
    assert len(drawn) == 1
    assert (again.pictures == first.pictures).all()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ('<image href="/etc/passwd"/>', "<image"),
        ("<script>1</script>", "<script"),
        ("<text>a</text>", "<text"),
        ('<!DOCTYPE x [<!ENTITY a "b">]>', "<!"),
        ('<use xlink:href="file:///etc/passwd#a"/>', "refers to something outside"),
        ('<use href = "http://x/y#a"/>', "refers to something outside"),
        (7, "expected an icon"),
    ],
)
def test_a_drawing_that_reaches_outside_is_refused(body, what):
    with pytest.raises(DataError, match=f"set:key: .*{what}"):
        raster.svg_of({"body": body}, {}, 16, "set:key")


def test_references_within_a_drawing_are_drawn():
    pytest.importorskip("resvg_py", reason="resvg-py draws the pictures")
    body = '<defs><rect id="a" width="16" height="16" fill="#0f0"/></defs><use xlink:href="#a"/>'
    picture = raster.draw_svg(raster.svg_of({"body": body}, {}, 16, "x"), 16, "x")
    assert (picture == [0, 255, 0]).all()
    with pytest.raises(DataError, match="x: cannot be drawn"):
        raster.draw_svg("<svg", 16, "x")


def test_damaged_packages_are_named(tmp_path):
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8b\x08broken")
    with pytest.raises(DataError, match="cut.tgz: not a whole .tgz file"):
        list(packages.members(tmp_path / "cut.tgz", "assets", ".webp"))
    path = tgz(tmp_path / "a.tgz", {"package/icons.json": b"{", "package/chars.json": b"[]"})
    with pytest.raises(DataError, match="icons.json: not JSON"):
        packages.read_json_members(path, ("icons.json",))
    with pytest.raises(DataError, match="chars.json: expected a JSON object, got list"):
        packages.read_json_members(path, ("chars.json",))


# ---- npm


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A stand-in for npm that copies a file, or fails with the text of `say`."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    script = bin_dir / "npm"
    script.write_text(
        '#!/bin/sh\nif [ -f "$NPM_SAY" ]; then cat "$NPM_SAY" >&2; exit 1; fi\n'
        'for last; do :; done\necho "$last" > "$NPM_LOG"\n'
        'while [ "$1" != --pack-destination ]; do shift; done\ncp "$NPM_GIVES" "$2"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NPM_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("NPM_SAY", str(tmp_path / "say"))
    return tmp_path


def test_npm_fetches_what_is_missing_by_name_and_version(npm, monkeypatch):
    (npm / "there").mkdir()
    chosen = package_of(npm / "there", "flat", {"package/icons.json": icons_json()})
    monkeypatch.setenv("NPM_GIVES", str(npm / "there" / chosen.file))
    path = packages.fetch(chosen, npm / "cache")
    assert path.read_bytes() == (npm / "there" / chosen.file).read_bytes()
    assert (npm / "log").read_text() == "@made/here@1.0.0\n"
    (npm / "log").unlink()
    packages.fetch(chosen, npm / "cache")
    assert not (npm / "log").exists()  # it was there
    path.write_bytes(b"other")
    with pytest.raises(DataError, match="its SHA-256 is not that of @made/here 1.0.0"):
        packages.fetch(chosen, npm / "cache")


def test_failures_of_npm_say_what_to_do(npm, monkeypatch):
    chosen = packages.Package("@made/here", "1.0.0", "x.tgz", "0" * 64, "flat")
    (npm / "say").write_text("npm error network\nnpm error offline\n")
    with pytest.raises(DataError, match=r"`npm pack @made/here@1.0.0` failed \(npm error offline\)"):
        packages.fetch(chosen, npm / "cache")
    assert list((npm / "cache").iterdir()) == []
    monkeypatch.setenv("PATH", str(npm / "nowhere"))
    with pytest.raises(DataError, match=r"npm .* not installed \(Debian: apt install npm\)"):
        packages.fetch(chosen, npm / "cache")


def test_a_missing_renderer_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(DataError, match=r"pip install 'dalle_fast\[styles\]'"):
        raster.resvg()


def test_the_data_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("DALLE_FAST_DATA", str(tmp_path))
    assert data_folder() == tmp_path / "emoji-styles"
    monkeypatch.delenv("DALLE_FAST_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert data_folder() == tmp_path / "c" / "dalle_fast" / "emoji-styles"


# ---- names and splits


@pytest.mark.parametrize(
    ("key", "caption"),
    [
        ("man-firefighter-dark-skin-tone", "man firefighter, dark skin tone"),
        ("cook-medium-light", "cook, medium-light skin tone"),
        ("leftrightarrow", "left-right arrow"),
        ("digit-four", "keycap 4"),
        ("grinning-cat-thing", "grinning cat thing"),
        ("man-dark-skin-tone-red-hair", "man red hair, dark skin tone"),
    ],
)
def test_keys_become_names(key, caption):
    assert names.name_of_key(key).caption == caption


def test_keys_that_say_nothing_have_no_name():
    assert names.name_of_key("xqzzt") is None
    assert names.name_of_key("cook-tone-3") is None
    assert names.name_of_points("1f468-1f3ff-200d-1f692").caption == "man firefighter, dark skin tone"
    assert names.name_of_points("ffff") is None


@pytest.mark.parametrize(
    ("thing", "with_article"),
    [
        ("red apple", "a red apple"),
        ("alarm clock", "an alarm clock"),
        ("cherries", "cherries"),
        ("unicorn", "a unicorn"),
        ("compass", "a compass"),
        ("2nd place medal", "2nd place medal"),
        ("octopus", "an octopus"),
    ],
)
def test_articles(thing, with_article):
    assert names.with_article(thing) == with_article


def drawing(style, concept, tones=(), art=None, caption=None):
    key = f"{style}/{concept}/{'-'.join(map(str, tones))}"
    return catalogue.Drawing(key, style, caption or f"{key} caption", concept, tones, art or key)


def test_every_style_thing_and_tone_of_what_is_held_out_is_trained_on():
    styles, tones = list(names.STYLES), sorted(emoji.TONES)
    everything = [drawing(s, f"person{p}", (t,)) for s in styles for p in range(6) for t in tones]
    everything += [drawing(s, f"thing{n:02d}") for s in styles[:5] for n in range(36)]
    everything += [drawing(styles[0], f"rare{n}") for n in range(20)]
    # a twin of something that will be held out, by its art, and one by its caption
    everything += [
        drawing("fx", "twin", art=f"flat/person0/{tones[0]}"),
        drawing("fx", "other", caption=f"flat/person0/{tones[0]} caption"),
    ]
    toned = frozenset((f"person{p}", tones[p % len(tones)]) for p in range(2))
    splits = pairs.split_drawings(everything, toned)
    train, heldout = ([everything[i] for i in splits[name]] for name in ("train", "heldout"))
    assert not set(splits["train"]) & set(splits["heldout"])
    assert Counter(len(d.tones) for d in heldout) == {1: 2 * len(styles), 0: 3}
    assert {d.style for d in heldout} <= {d.style for d in train}
    assert {d.concept for d in heldout} <= {d.concept for d in train}
    assert {d.tones for d in heldout} <= {d.tones for d in train}
    assert not {(d.concept, d.tones[0]) for d in train if d.tones} & toned
    assert {"twin", "other"}.isdisjoint(d.concept for d in train)
    assert len(splits["all"]) == len(everything)
    assert len(splits["seen"]) == len(heldout)
    assert set(splits["seen"]) <= set(splits["train"])
    assert splits == pairs.split_drawings(everything, toned)


def test_unknown_splits_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="split: expected one of train, heldout"):
        EmojiStylesPairs("test")
    with pytest.raises(DataError, match="size: expected 1 to 512 pixels, got 0"):
        EmojiStylesPairs("train", 0)


def test_the_real_packages_where_they_are_cached():
    if not any(data_folder().glob("pictures-64-*.json")):
        pytest.skip("the packages of emoji-styles have not been fetched here: make pretrained does")
    splits = {name: EmojiStylesPairs(name, 64) for name in ("train", "heldout", "seen", "all")}
    everything = splits["all"]
    assert len(everything) > 19_500
    assert set(Counter(d.style for d in everything.drawings)) == set(names.STYLES)
    assert len(set(everything.keys)) == len(everything)
    assert len(set(everything.captions)) > 0.99 * len(everything)
    train = splits["train"]
    heldout = {(d.concept, d.tones[0]) for d in splits["heldout"].drawings if d.tones}
    assert heldout >= emoji.heldout_tones()
    assert not heldout & {(d.concept, d.tones[0]) for d in train.drawings if len(d.tones) == 1}
    assert not set(train.captions) & set(splits["heldout"].captions)
    assert "a flat drawing of a red apple" in everything.captions
    assert everything[3].image.shape == (64, 64, 3)
    assert train.fingerprint() == EmojiStylesPairs("train", 64).fingerprint()
