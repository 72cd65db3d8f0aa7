"""Pictures of the collection, by key: decoded and encoded again, small, so that no stored byte reaches a browser."""

import io
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashdist.collection.decode import BadImage, decode
from hashdist.ground.errors import NotFound
from hashdist.service.serving import Served

SIDES = (16, 1024)
"""Least and most pixels of a thumbnail's longer side."""

_KEPT_BYTES = 64 << 20


def code_of(served: Served, key: str) -> NDArray[np.uint8]:
    """The code uint8 [L/8] of a live image. Raises NotFound, without saying where the index lies."""
    try:
        code: NDArray[np.uint8] = served.index.codes_of([key])[0]
        return code
    except NotFound:
        raise NotFound("this version of the index has no image of that key") from None


class Thumbnails:
    """JPEGs of images of a version; the latest stay in memory.

    Args:
        max_pixels: of a stored picture.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._kept: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def kept(self, served: Served, key: str, side: int) -> bytes | None:
        """A thumbnail that is in memory."""
        with self._lock:
            return self._kept.get(self._name(served, key, side))

    def make(self, served: Served, key: str, side: int) -> bytes:
        """A thumbnail of a live image. Raises NotFound, and what the collection raises."""
        if served.pictures is None:
            raise NotFound("this index has no collection to show pictures of")
        code_of(served, key)
        data = served.pictures.fetch([key]).get(key)
        if data is None:
            raise NotFound("the picture of that key is gone from the collection, or has changed since it was indexed")
        try:
            image = Image.fromarray(decode(data, self._max_pixels))
        except BadImage as error:
            raise NotFound(f"the picture of that key cannot be shown: {error.reason}") from error
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        self._keep(self._name(served, key, side), buffer.getvalue())
        return buffer.getvalue()

    @staticmethod
    def _name(served: Served, key: str, side: int) -> tuple[str, str, int]:
        return f"{served.index.collection_uri} {served.version}", key, side

    def _keep(self, name: tuple[str, str, int], data: bytes) -> None:
        with self._lock:
            self._bytes += len(data) - len(self._kept.pop(name, b""))
            self._kept[name] = data
            while self._bytes > _KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
