"""Proof that a store is fit for commits: each requirement of hashdist/store/base.py is tried out, one line for each."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple
from uuid import uuid4

from hashdist.ground.errors import HashdistError, InvalidInput, NotFound
from hashdist.store.base import Exists, Store
from hashdist.store.commit import create_until_answered, prove_conditional_create

_WRITERS = 8
_SKEW_S = 60.0


class Check(NamedTuple):
    """One property.

    Attributes:
        name: of it.
        passed: None where it could not be tried.
        required: whether commits rest upon it.
        text: what was found.
    """

    name: str
    passed: bool | None
    required: bool
    text: str


def check(store: Store) -> list[Check]:
    """Try everything that commits rest upon, under names of its own that are deleted again."""
    prefix = f"hashdist-check-{uuid4().hex}-"
    checks: list[Check] = []
    try:
        for name, required, proof in _PROOFS:
            broken = next((c.name for c in checks if c.required and not c.passed), "")
            checks.append(_try(name, required, lambda proof=proof: proof(store, prefix), broken))  # type: ignore[misc]
    finally:
        with suppress(HashdistError):
            for entry in list(store.list(prefix)):
                store.delete(entry.name)
    return checks


def _try(name: str, required: bool, proof: Callable[[], str], broken: str) -> Check:
    if broken:
        return Check(name, None, required, f"not tried, because of: {broken}")
    try:
        return Check(name, True, required, proof())
    except (HashdistError, _Otherwise) as error:
        return Check(name, False, required, str(error))


class _Otherwise(Exception):
    """The store does otherwise than it must."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Otherwise(otherwise)


def _writes(store: Store, prefix: str) -> str:
    store.put(f"{prefix}write", b"12345")
    return "an object can be written"


def _conditional(store: Store, prefix: str) -> str:
    prove_conditional_create(store)
    name = f"{prefix}create"
    create_until_answered(store, name, time.sleep)
    before = store.get(name)
    with suppress(Exists):
        store.create(name, b"another", "another")
    _require(store.get(name) == before, "a refused create has changed the object that stood there")
    return "a second create of one name is refused, and changes nothing"


def _one_winner(store: Store, prefix: str) -> str:
    def create(number: int) -> bool:
        try:
            return create_until_answered(store, f"{prefix}race", time.sleep, str(number).encode())
        except InvalidInput:
            return False

    with ThreadPoolExecutor(_WRITERS) as pool:
        winners = sum(pool.map(create, range(_WRITERS)))
    # none: the winner's answer was lost, and its repeat refused
    _require(winners <= 1, f"{winners} of {_WRITERS} creates of one name at once succeeded, at most one may")
    return f"of {_WRITERS} creates of one name at once one succeeds"


def _read_after_write(store: Store, prefix: str) -> str:
    for number in range(5):
        name, data = f"{prefix}read-{number}", uuid4().bytes
        store.put(name, data)
        _require(store.get(name) == data, "what was written was not read back at once")
        _require(store.stat(name).size == len(data), "the size of an object is not that of its bytes")
    return "what was written is read back at once"


def _ranges(store: Store, prefix: str) -> str:
    name, data = f"{prefix}range", bytes(range(256))
    store.put(name, data)
    _require(store.get(name, 10, 20) == data[10:30], "a range of an object was not read as such")
    _require(store.get(name, 250) + store.get(name, 250, 99) == 2 * data[250:], "a range is not cut at the end")
    return "ranges of an object are read"


def _list_after_write(store: Store, prefix: str) -> str:
    names = [f"{prefix}list-{suffix}" for suffix in ("9", "A", "a", "é")]
    for name in reversed(names):
        store.put(name, b"1")
        _require(name in {e.name for e in store.list(f"{prefix}list")}, "what was written is not listed at once")
    _require([e.name for e in store.list(f"{prefix}list")] == names, "a listing is not in the order of UTF-8 bytes")
    after = [entry.name for entry in store.list(f"{prefix}list", names[1])]
    _require(after == names[2:], "a listing does not begin behind the name that is asked for")
    return "what was written is listed at once, in the order of its names"


def _delete(store: Store, prefix: str) -> str:
    name = f"{prefix}delete"
    store.put(name, b"1")
    store.delete(name)
    store.delete(name)
    _require(name not in {entry.name for entry in store.list(prefix)}, "what was deleted is still listed")
    with suppress(NotFound):
        store.get(name)
        raise _Otherwise("what was deleted can still be read (are versions or a lock kept in this bucket?)")
    return "objects can be deleted"


def _stamps(store: Store, prefix: str) -> str:
    name = f"{prefix}stamp"
    store.put(name, b"1")
    ahead = store.stat(name).modified - time.time()
    far = abs(ahead) > _SKEW_S
    _require(
        not far,
        f"the store's clock is {ahead:+.0f} s from this machine's; ages count by the store's, so this is harmless",
    )
    return f"the store's clock is {ahead:+.1f} s from this machine's"


_PROOFS: list[tuple[str, bool, Callable[[Store, str], str]]] = [
    ("write", True, _writes),
    ("conditional create", True, _conditional),
    ("one winner", True, _one_winner),
    ("read after write", True, _read_after_write),
    ("ranged reads", True, _ranges),
    ("list after write", True, _list_after_write),
    ("delete", False, _delete),
    ("clock", False, _stamps),
]
