"""Small files that claim, or unpack to, far more; run, it says what decoding each of them costs."""

import json
import resource
import struct
import time
import zlib

from hashdist.collection.decode import BadImage, decode


def png(width: int, height: int, rows: int) -> bytes:
    """A PNG that claims a size, with so many rows of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes((1 + 3 * width) * rows), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _tiff(tags: dict[int, int], data: bytes) -> bytes:
    at = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return (
        b"II*\0" + struct.pack("<I", at) + data.ljust(at - 8, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


_RGB_TIFF = {256: 16, 257: 16, 258: 8, 259: 8, 262: 2, 277: 3, 284: 1}


def bombs() -> dict[str, bytes]:
    """Small files that claim, or unpack to, far more."""
    packed = zlib.compress(bytes(3 << 20), 9)
    tile = {**_RGB_TIFF, 322: 20_000, 323: 20_000, 324: 8, 325: len(packed)}
    strip = {**_RGB_TIFF, 256: 60_000, 257: 60_000, 278: 60_000, 273: 8, 279: len(packed)}
    gif = b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\x08" + b"\x05\x11\x11\x11\x11\x11\0;"
    webp = b"\x2f" + ((16_383) | (16_383 << 14)).to_bytes(4, "little") + bytes(100)
    return {
        "png claim": png(60_000, 60_000, 1),
        "tiff tile": _tiff(tile, packed),
        "tiff strip": _tiff(strip, packed),
        "gif": gif,
        "webp": b"RIFF" + (len(webp) + 12).to_bytes(4, "little") + b"WEBPVP8L" + len(webp).to_bytes(4, "little") + webp,
        "bmp": b"BM"
        + bytes(8)
        + (54).to_bytes(4, "little")
        + (40).to_bytes(4, "little")
        + (60_000).to_bytes(4, "little") * 2
        + b"\1\0\x18\0"
        + bytes(24),
        "ppm": b"P6 60000 60000 255\n" + bytes(100),
        "ppm as text": b"P3 3000 3000 255\n" + b"1 " * 1_100_000,
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }


def decode_bombs() -> None:
    """Prints what became of each, the growth of the peak of memory in MB, and processor seconds."""
    found = {}
    for name, data in bombs().items():
        before, started = _peak_mb(), time.process_time()
        try:
            decode(data)
            reason = "decoded"
        except BadImage as error:
            reason = error.reason
        found[name] = reason, len(data), _peak_mb() - before, time.process_time() - started
    print(json.dumps(found))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    decode_bombs()
