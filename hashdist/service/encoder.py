"""The deployment that encodes pictures, apart from the search."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve as ray_serve

from hashdist.collection.decode import BadImage, claimed_pixels, decode
from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput
from hashdist.stages.cluster import metrics
from hashdist.stages.cluster.internals import listen_on_own_address

_MODELS_HELD = 2
_DECODING_THREADS = 4


class Encoder:
    """Pictures to codes, in batches; the last two models stay loaded.

    Args:
        max_pixels: of a picture.
        batch: pictures at once.
        device: where models run.
    """

    def __init__(self, max_pixels: int, batch: int, device: str) -> None:
        listen_on_own_address()
        telemetry.set_sink(metrics.RaySink())
        self._max_pixels, self._device = max_pixels, device
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._loading = threading.Lock()
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="hashdist-decode")
        self._encode.set_max_batch_size(batch)  # type: ignore[attr-defined]

    async def prepare(self, uri: str) -> dict[str, Any]:
        """Load a model. Raises what `load_model` raises."""
        return await asyncio.to_thread(self._try_model, uri)

    async def encode(self, uri: str, data: bytes) -> tuple[bytes, int, int] | str:
        """A picture's code, width and height; or why it cannot be read."""
        found: tuple[bytes, int, int] | str = await self._encode((uri, data))
        return found

    @ray_serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def _encode(self, asked: list[tuple[str, bytes]]) -> list[Any]:
        return await asyncio.to_thread(self._encode_batch, asked)

    def _try_model(self, uri: str) -> dict[str, Any]:
        model = self._model(uri)
        try:
            encoded = model.encode_readable([np.zeros((8, 8, 3), np.uint8)])
        except InvalidInput as error:
            return {"reads_images": False, "reason": str(error)}
        return {"reads_images": encoded.reasons[0] is None, "reason": encoded.reasons[0] or ""}

    def _encode_batch(self, asked: list[tuple[str, bytes]]) -> list[Any]:
        return [answer for some in within(asked, self._max_pixels) for answer in self._encode_together(some)]

    def _encode_together(self, asked: list[tuple[str, bytes]]) -> list[Any]:
        answers: list[Any] = [None] * len(asked)
        pixels = list(self._threads.map(self._decode, [data for _, data in asked]))
        for uri in dict.fromkeys(uri for uri, _ in asked):
            which = [number for number, one in enumerate(asked) if one[0] == uri]
            encoded = self._model(uri).encode_readable([pixels[number] for number in which])
            for number, code, reason in zip(which, encoded.codes, encoded.reasons, strict=True):
                height, width = (0, 0) if reason else pixels[number].shape[:2]
                answers[number] = reason or (code.tobytes(), width, height)
        return answers

    def _decode(self, data: bytes) -> Any:
        try:
            return decode(data, self._max_pixels)
        except BadImage as error:
            return error

    def _model(self, uri: str) -> Any:
        with self._loading:
            if uri not in self._models:
                # brings torch with it, which a process that only names this class does without
                from hashdist.models.model import load_model

                self._models[uri] = load_model(uri, device=self._device)
            self._models.move_to_end(uri)
            while len(self._models) > _MODELS_HELD:
                self._models.popitem(last=False)
            return self._models[uri]


def within(asked: Iterable[tuple[str, bytes]], most: int) -> Iterator[list[tuple[str, bytes]]]:
    """Runs of pictures that are decoded at the same time: of at most `most` pixels together, or one alone."""
    some: list[tuple[str, bytes]] = []
    pixels = 0
    for one in asked:
        claimed = claimed_pixels(one[1])
        if some and pixels + claimed > most:
            yield some
            some, pixels = [], 0
        some, pixels = [*some, one], pixels + claimed
    if some:
        yield some
