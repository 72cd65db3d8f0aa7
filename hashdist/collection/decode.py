"""Encoded image bytes to pixels: RGB uint8, the same on every machine, and safe on anything a bucket may hold."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

MAX_PIXELS = 64_000_000
"""Default limit of width x height: a file of a few kB can claim to be larger than memory."""

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
"""File names that count as images, in lower case."""

# no format that runs a program (EPS) or that nests other files; imported here because Pillow knows a format
# only once its plugin is loaded
_FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        BmpImagePlugin.DibImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)
_TILE = (322, 323)  # TIFF tags: width and length
_PLAIN = "ppm_plain"  # numbers as text, which Pillow reads in Python
_MOST_PLAIN_BYTES = 2_000_000
_SIXTEEN_BIT = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N"))
_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """Bytes that are no usable image.

    Attributes:
        slug: `empty`, `not-an-image`, `too-large`, `truncated`, `unsupported` or `undecodable`.
        reason: the slug and what was found, for the row's `reason` column.
    """

    def __init__(self, slug: str, detail: str) -> None:
        self.slug, self.reason = slug, f"{slug}: {detail}"
        super().__init__(self.reason)

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.slug, self.reason.removeprefix(f"{self.slug}: "))


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3], RGB, of an encoded image.

    Grey, palette, CMYK and 16-bit images are converted (16 bits keep their upper 8), transparency is laid on white,
    of an animation the first frame is taken, and the EXIF orientation is applied. JPEGs are decoded in full size
    (no draft mode), so the result does not depend on what it is wanted for.

    Raises:
        BadImage: with a reason; never anything else, whatever the bytes.
    """
    if not data:
        raise BadImage("empty", "0 bytes")
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            _check_size(image, len(data), max_pixels)
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            colours = _rgb(image)
            return np.array(colours if upright is None else colours.transpose(upright), np.uint8)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image", f"{len(data)} bytes of no known image format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage("too-large", str(error)) from error
    except EOFError as error:
        raise BadImage("truncated", str(error)) from error
    except Exception as error:
        # a decoder fed with hostile bytes may raise anything (struct.error, KeyError, ...); one image ends no job
        slug = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadImage(slug, f"{type(error).__name__}: {error}") from error


def claimed_pixels(data: bytes) -> int:
    """Width x height of an encoded image by its header; 0 where it has none. `decode` needs up to 20 bytes for each."""
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            return image.width * image.height
    except Exception:  # as in `decode`, which says what is wrong
        return 0


def _check_size(image: Image.Image, size: int, max_pixels: int) -> None:
    """Raises BadImage for an image that would take too much memory or time to decode, by what the header claims."""
    tile_width, tile_length = (int(getattr(image, "tag_v2", {}).get(tag, 0)) for tag in _TILE)
    for what, width, height in (("", image.width, image.height), ("a tile of ", tile_width, tile_length)):
        if width * height > max_pixels:
            raise BadImage("too-large", f"{what}{width} x {height} pixels, at most {max_pixels} are read")
    if size > _MOST_PLAIN_BYTES and any(part[0] == _PLAIN for part in getattr(image, "tile", ())):
        raise BadImage("too-large", f"{size} bytes of pixels as text, at most {_MOST_PLAIN_BYTES} are read")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image)
        if grey.dtype.itemsize > 2:
            grey = grey.clip(0, 65_535)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    if image.mode == "F":
        raise BadImage("unsupported", "pixels are floating-point numbers without a known range")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # a broken EXIF block says nothing about the pixels, and its parser raises whatever it meets
        return 1
