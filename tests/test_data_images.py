# SPDX-License-Identifier: MIT
"""Pictures from strangers: every odd one is read right or refused by name."""

from __future__ import annotations

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data import augment_image, decode_image, read_image
from dalle_fast.errors import ConfigError, DataError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(size=(20, 16)) -> Image.Image:
    x = np.linspace(0, 255, size[0])[None].repeat(size[1], 0)
    return Image.fromarray(np.stack([x, x[:, ::-1], 255 - x / 2], axis=2).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_plain_pictures(kind):
    picture = gradient()
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    out = decode_image(encoded(picture, kind, **options), "x")
    assert out.shape == (16, 20, 3)
    assert out.dtype == np.uint8
    assert np.abs(out.astype(int) - np.asarray(picture)).max() < 40


def test_palette_grey_and_cmyk_become_rgb():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert (decode_image(encoded(red.quantize(4), "PNG"), "palette") == [255, 0, 0]).all()
    assert (decode_image(encoded(Image.new("L", (4, 4), 77), "PNG"), "grey") == 77).all()
    assert (decode_image(encoded(Image.new("1", (4, 4), 1), "PNG"), "bit") == 255).all()
    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "cmyk")
    assert cmyk.shape == (8, 8, 3)
    assert cmyk[..., 0].min() > 200
    assert cmyk[..., 1:].max() < 60


def test_sixteen_bits_keep_their_brightness():
    half = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert (decode_image(encoded(half, "PNG"), "x") == 128).all()


def test_transparency_is_put_on_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode_image(encoded(clear, "PNG"), "x") == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.abs(decode_image(encoded(half, "PNG"), "x").astype(int) - 127).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9] * 256)
    assert (decode_image(encoded(palette, "PNG", transparency=0), "x") == 255).all()
    grey = Image.new("LA", (4, 4), (0, 0))
    assert (decode_image(encoded(grey, "PNG"), "x") == 255).all()


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind in ("GIF", "WEBP"):
        extra = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **extra)
        assert (decode_image(content, kind) == [255, 0, 0]).all()


def test_the_cameras_rotation_is_applied():
    picture = Image.new("RGB", (6, 2), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(picture, "JPEG", exif=exif), "x").shape == (6, 2, 3)


def test_one_pixel_is_enough():
    out = decode_image(encoded(Image.new("RGB", (1, 1), (3, 4, 5)), "PNG"), "x")
    for augment in ("none", "jitter", "stage1", "stage2"):
        big = augment_image(out, 32, augment)
        assert big.shape == (32, 32, 3)
        assert (big == [3, 4, 5]).all()


def test_every_cut_and_flip_is_read_or_refused():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        content = encoded(gradient(), kind)
        for cut in range(0, len(content), max(1, len(content) // 40)):
            try:
                decode_image(content[:cut], "cut.bin")
            except DataError as error:
                assert "cut.bin" in str(error)
        for _ in range(60):
            broken = bytearray(content)
            for at in rng.integers(0, len(broken), 3):
                broken[at] ^= 1 << rng.integers(8)
            try:
                assert decode_image(bytes(broken), "flip.bin").dtype == np.uint8
            except DataError as error:
                assert "flip.bin" in str(error)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 1000)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_before_they_are_unpacked(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"bomb.png: .*pixels, expected at most 64000000"):
        decode_image(png_header(*size), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_other_files_are_refused_by_name(tmp_path):
    for content in (b"", b"hello", b"%!PS-Adobe-3.0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"SIMPLE  = T"):
        with pytest.raises(DataError, match=r"odd.jpg: not a picture \(expected PNG"):
            decode_image(content, "odd.jpg")
    with pytest.raises(DataError, match=r"tiff.jpg: not a picture"):
        decode_image(encoded(gradient(), "TIFF"), "tiff.jpg")
    with pytest.raises(DataError, match=r"gone.png: cannot be read"):
        read_image(tmp_path / "gone.png")


def test_augmentation_is_a_function_of_seed_and_counter():
    picture = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)
    for augment in ("jitter", "stage1", "stage2"):
        crops = [augment_image(picture, 32, augment, seed=1, counter=c) for c in range(20)]
        assert all(crop.shape == (32, 32, 3) for crop in crops)
        assert (crops[3] == augment_image(picture, 32, augment, seed=1, counter=3)).all()
        assert len({crop.tobytes() for crop in crops}) > 10
    with pytest.raises(ConfigError, match="augment: expected one of none, jitter, stage1, stage2, got 'flip'"):
        augment_image(picture, 32, "flip")


def test_stage2_never_flips_and_stage1_does():
    picture = np.asarray(gradient((64, 64)))  # red rises from left to right

    def rises(crop):
        return crop[:, -1, 0].mean() > crop[:, 0, 0].mean()

    assert all(rises(augment_image(picture, 32, "stage2", 0, c)) for c in range(40))
    flipped = sum(not rises(augment_image(picture, 32, "stage1", 0, c)) for c in range(100))
    assert 30 <= flipped <= 70
