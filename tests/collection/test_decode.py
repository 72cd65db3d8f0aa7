"""Decoding: every kind of image to the pixels that one would see, every kind of garbage to a reason."""

import io
import pickle
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashdist.collection.decode import EXTENSIONS, BadImage, decode


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pattern(height: int = 6, width: int = 9, channels: int = 3) -> NDArray[np.uint8]:
    """Pixels that no flip, turn or swap of channels leaves as they are."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def png(width: int, height: int, bits: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG made by hand: header, one data chunk, end."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    pixels = pattern()
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode(encode(Image.fromarray(pixels), form, **options))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert np.array_equal(found, pixels)


def test_jpeg_is_decoded_in_full_size() -> None:
    pixels = np.full((300, 200, 3), (10, 200, 30), np.uint8)
    found = decode(encode(Image.fromarray(pixels), "JPEG", quality=95))
    assert found.shape == (300, 200, 3)
    assert np.abs(found.astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_grey_becomes_three_equal_channels(form: str) -> None:
    grey = np.full((5, 7), 77, np.uint8)
    found = decode(encode(Image.fromarray(grey), form))
    assert found.shape == (5, 7, 3)
    assert (found == 77).all()


def test_bilevel_becomes_black_and_white() -> None:
    image = Image.fromarray(pattern()[..., 0]).convert("1")
    assert np.array_equal(decode(encode(image, "PNG"))[..., 0], np.asarray(image) * np.uint8(255))


def test_transparency_is_laid_on_white() -> None:
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], np.uint8)
    found = decode(encode(Image.fromarray(pixels), "PNG"))
    assert found[0, 0].tolist() == [200, 100, 0]
    assert found[0, 1].tolist() == [255, 255, 255]
    assert np.abs(found[0, 2].astype(int) - [227, 177, 127]).max() <= 1


def test_grey_with_alpha() -> None:
    pixels = np.array([[[9, 255], [9, 0]]], np.uint8)
    assert decode(encode(Image.fromarray(pixels), "PNG"))[0, :, 0].tolist() == [9, 255]


def test_palette_with_and_without_transparent_entries() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert decode(encode(image, "PNG"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    found = decode(encode(image, "PNG", transparency=b"\xff\x00\xff"))
    assert found[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    assert decode(encode(image, "PNG", transparency=1))[0, 1].tolist() == [255, 255, 255]


def test_a_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert decode(encode(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form: str) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decode(encode(image, form))[4, 4].astype(int) - [255, 0, 0]).max() <= 3


def test_sixteen_bit_grey_keeps_the_upper_bits() -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    assert decode(encode(Image.fromarray(values), "PNG"))[0, :, 1].tolist() == expected
    assert decode(encode(Image.fromarray(values), "TIFF"))[0, :, 1].tolist() == expected
    assert decode(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())[0, :, 1].tolist() == expected


def test_sixteen_bit_colour() -> None:
    rows = b"\0" + struct.pack(">6H", 0xFF00, 0x8000, 0, 1, 0x0100, 0xFFFF)
    assert decode(png(2, 1, bits=16, rows=rows))[0].tolist() == [[255, 128, 0], [0, 1, 255]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.abs(decode(data)[2, 2].astype(int) - [255, 0, 0]).max() <= (3 if form == "MPO" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    upright = pattern()
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(turned)), form, exif=exif, **options)
    assert np.array_equal(decode(data), upright)


def test_a_broken_exif_block_does_not_matter() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encode(Image.new("RGB", (4, 8), (9, 9, 9)), "JPEG", exif=exif)
    assert decode(good).shape == (4, 8, 3)
    broken = good.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    assert broken != good
    assert decode(broken).shape == (8, 4, 3)


@pytest.mark.parametrize(
    ("data", "slug"),
    [
        (b"", "empty"),
        (b"GET / HTTP/1.1", "not-an-image"),
        (b"\0" * 1000, "not-an-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (encode(Image.fromarray(pattern(64, 64)), "JPEG")[:-600], "truncated"),
        (encode(Image.fromarray(pattern(64, 64)), "PNG")[:-600], "truncated"),
        (png(9000, 9000), "too-large"),
        (png(60_000, 60_000), "too-large"),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "unsupported"),
    ],
)
def test_bad_images_have_a_reason(data: bytes, slug: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.slug == slug
    assert caught.value.reason.startswith(f"{slug}: ")
    assert " at 0x" not in caught.value.reason  # reasons are compared between runs


def test_the_pixel_limit_is_inclusive_and_checked_before_decoding() -> None:
    data = encode(Image.fromarray(pattern(10, 10)), "PNG")
    assert decode(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(BadImage, match="too-large: 10 x 10 pixels, at most 99 are read"):
        decode(data, max_pixels=99)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damaged_files_never_raise_anything_else(form: str) -> None:
    whole = encode(Image.fromarray(pattern(24, 24)), form)
    dice = random.Random(form)
    bad = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd tags before it decides
        for _ in range(300):
            data = bytearray(whole[: dice.randrange(1, len(whole) + 1)] if dice.random() < 0.5 else whole)
            for _ in range(dice.randrange(1, 8)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            try:
                decode(bytes(data), max_pixels=1 << 20)
            except BadImage:
                bad += 1
    assert bad > 20


def test_a_bad_image_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "3 bytes: missing")))
    assert (error.slug, error.reason) == ("truncated", "truncated: 3 bytes: missing")


def test_extensions_are_lower_case_with_their_dot() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp"} <= EXTENSIONS
    assert all(extension == extension.lower() and extension.startswith(".") for extension in EXTENSIONS)
