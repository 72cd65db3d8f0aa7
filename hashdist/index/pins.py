"""Pins: a reader says which version it reads, so that a clean-up spares that version's files.

A pin is an object `pins/<uuid>.json` with a version and how long it holds, counted from the store's own stamp of that
object: no reader's or writer's clock plays a part. A reader first writes its pin and then looks whether its version is
expired; a clean-up first commits what it expires and then looks for pins. Whichever comes second sees the other. A pin
that is not renewed ends by itself, so a killed reader holds nothing for long.

A purge ignores pins.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from uuid import uuid4

from hashdist.ground.errors import Corrupt, HashdistError, InvalidInput, NotFound
from hashdist.ground.progress import say
from hashdist.index.index import Index
from hashdist.index.manifest import resolve
from hashdist.store import Store
from hashdist.store.base import Entry

FOLDER = "pins/"
HELD_S = 3600
"""A pin holds this long after its last renewal."""

_COARSE_S = 2.0  # S3 stamps objects to the second


class Pin:
    """A pin that is held. Made by `pinned`.

    Attributes:
        version: the pinned one.
        written: whether it could be written.
    """

    def __init__(self, index: Index, held_s: float) -> None:
        self.version, self.written = index.version, True
        self._index, self._held_s = index, held_s
        self._name = ""
        self._since = time.monotonic()
        self._one_at_a_time = threading.Lock()

    def renew(self) -> None:
        """Let the pin hold from now on; every third of its time is often enough.

        Raises:
            NotFound: the version has expired, while the pin had lapsed or before there was one. Unavailable.
        """
        with self._one_at_a_time:
            started, before = time.monotonic(), self._name
            name = f"{FOLDER}{uuid4().hex}.json"
            body = json.dumps({"version": self.version, "seconds": self._held_s}).encode()
            self._index.store.put(name, body)
            self._name = name
            if not before or started - self._since > self._held_s - _COARSE_S:
                self.check()
            self._since = started
            if before:
                self._index.store.delete(before)

    def check(self) -> None:
        """Raise NotFound if the version has expired."""
        newest = self._index.versions.latest()
        if newest is not None:
            resolve(newest.manifest, self.version)

    def release(self) -> None:
        """Take the pin away; what cannot be deleted ends by itself."""
        with self._one_at_a_time, suppress(HashdistError):
            if self._name:
                self._index.store.delete(self._name)


@contextmanager
def pinned(index: Index, held_s: float = HELD_S, every_s: float | None = None) -> Iterator[Pin]:
    """Keep the files of the version that `index` is at now from clean-ups, for as long as the block runs.

    Without permission to write there is no pin: one line says so, and the reader relies on clean-ups leaving alone what
    was superseded only lately (hashdist/index/upkeep/retention.py).

    Args:
        index: the index that is read; the version that it is at now is pinned.
        held_s: how long the pin outlives its last renewal.
        every_s: renewed by a thread that often; None = a third of held_s, 0 = only by `Pin.renew`.

    Raises:
        NotFound: the version has expired already.
    """
    pin = Pin(index, held_s)
    try:
        pin.renew()
    except InvalidInput:
        pin.written = False
        pin.check()
        say(
            f"{index.uri}: version {pin.version} cannot be pinned (no permission to write there); it relies on "
            "clean-ups leaving alone what was superseded less than an hour ago"
        )
    except HashdistError:
        pin.release()
        raise
    ended = threading.Event()
    every_s = held_s / 3 if every_s is None else every_s
    keeper = threading.Thread(target=_keep, args=(pin, every_s, ended), name="hashdist-pin", daemon=True)
    if pin.written and every_s:
        keeper.start()
    try:
        yield pin
    finally:
        ended.set()
        if keeper.is_alive():
            keeper.join()
        pin.release()


def _keep(pin: Pin, every_s: float, ended: threading.Event) -> None:
    while not ended.wait(every_s):
        try:
            pin.renew()
        except NotFound as error:
            say(f"a pin had lapsed: {error}; files that are not open yet may be gone")
            return
        except HashdistError as error:
            say(f"a pin could not be renewed, which is tried again: {error}")


@dataclass
class Pins:
    """The pins of an index.

    Attributes:
        versions: pinned ones.
        over: pins whose time is over.
    """

    versions: set[int] = field(default_factory=set)
    over: list[Entry] = field(default_factory=list)


def read_pins(store: Store, now_s: float) -> Pins:
    """The pins as they are now. Raises Corrupt for one that cannot be read."""
    pins = Pins()
    for entry in store.list(FOLDER):
        try:
            seconds, version = _read(store, entry.name)
        except NotFound:
            continue  # released since the listing
        if now_s <= entry.modified + seconds + _COARSE_S:
            pins.versions |= {version} if version else set()
        else:
            pins.over.append(entry)
    return pins


def _read(store: Store, name: str) -> tuple[float, int]:
    if name.endswith(_CLOCK):
        return HELD_S, 0
    try:
        pin = json.loads(store.get(name))
        return float(pin["seconds"]), int(pin["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            f"{store.uri}/{name} must be a pin, found something else; if no reader made it, delete it"
        ) from error


# The store's own clock

_CLOCK = ".clock"

Clock = Callable[[Store], float]
"""Gives the present time of a store, unix seconds."""


def store_time(store: Store) -> float:
    """The store's present time, from an object that it stamps now: its stamps are compared with no other clock.

    Without permission to write: the newest stamp there is, which is not later than the present.
    """
    name = f"{FOLDER}{uuid4().hex}{_CLOCK}"
    try:
        store.put(name, b"")
    except InvalidInput:
        return max((entry.modified for entry in store.list()), default=0.0)
    try:
        return store.stat(name).modified
    finally:
        store.delete(name)
