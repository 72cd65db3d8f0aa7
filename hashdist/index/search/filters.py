"""Filters: which rows a search may answer with.

A filter is a conjunction of conditions: ids or keys to keep or to leave out, and predicates on a column. A row whose
value is null, or whose shard has no such column, matches no predicate, `!=` and `not in` included. On a column of
lists (`labels`) `in` asks for any of the values and `all` for all of them.

    where = keys(["a.png"], keep=False) & column("labels", "in", [3, 5]) & column("taken", ">=", 2020)
    where = parse("key not in a.png and label in 3,5 and taken >= 2020")

A version is immutable, so a filter is evaluated against it once: per shard into the bitmap of rows to leave out, which
holds the tombstones too. Where few rows of a shard match, their codes are copied out instead: scanning everything for
the sake of a few would cost more than it did without a filter.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.index.view import View

Operator = Literal["==", "!=", "<", "<=", ">", ">=", "between", "in", "not in", "all"]
Flags = NDArray[np.bool_]

COMPARE: dict[str, Callable[..., pa.Array]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
LIST_OPERATORS = ("in", "not in", "all")
_COPIED_BELOW = 1 / 16  # of a shard's rows: a masked scan then costs more than a copy of these rows
MOST_CONDITIONS = 32
"""Of a filter that is given as text: each is looked at for every row."""

_KEPT = 8  # evaluated filters per version


class Condition(Protocol):
    """One condition of a filter; hashable."""

    def matches(self, view: View) -> Callable[[int], Flags]:
        """For a version, what tells which rows of a shard match."""


@dataclass(frozen=True)
class Filter:
    """Rows that meet every condition. Made by `ids`, `keys`, `column`, `parse`; combined by `&`; hashable."""

    conditions: tuple[Condition, ...]

    def __and__(self, other: "Filter") -> "Filter":
        return Filter(self.conditions + other.conditions)


def ids(values: Iterable[int] | NDArray[np.int64], *, keep: bool = True) -> Filter:
    """Only these ids, or, with keep=False, all others."""
    try:
        found = np.unique(np.asarray(values if isinstance(values, np.ndarray) else list(values), np.int64))
    except OverflowError as error:
        raise InvalidInput("an id is a whole number below 2**63, found a larger one") from error
    return Filter((_Ids(_digest(found.tobytes()), keep, found),))


def keys(values: Iterable[str], *, keep: bool = True) -> Filter:
    """Only these keys, or, with keep=False, all others; keys that are not in the index do no harm."""
    if isinstance(values, str):
        raise InvalidInput(f"keys must be a sequence of texts, found one text {values!r}")
    found = tuple(sorted(set(values)))
    if any(not isinstance(key, str) or not key for key in found):
        raise InvalidInput("every key of a filter must be a text that is not empty")
    return Filter((_Keys(_digest("\0".join(found).encode()), keep, found),))


def column(name: str, operator: Operator, value: Any) -> Filter:
    """Rows by a column.

    Args:
        name: a column of the index; `label` stands for `labels`.
        operator: `==`, `!=`, `<`, `<=`, `>`, `>=`, `between` (both ends included), `in`, `not in`, `all` (lists only).
        value: a number, text, truth value or date; a sequence of them for `in`, `not in` and `all`, two for `between`.

    Raises InvalidInput for another operator. Whether the column exists is known when the filter is used.
    """
    if operator not in (*COMPARE, "between", *LIST_OPERATORS):
        raise InvalidInput(f"no operator {operator!r}; there are {', '.join([*COMPARE, 'between', *LIST_OPERATORS])}")
    several = operator in ("between", *LIST_OPERATORS)
    if several and (isinstance(value, str) or not isinstance(value, Iterable)):
        value = [value]
    values = tuple(value) if several else (value,)
    if operator == "between" and len(values) != 2:
        raise InvalidInput(f"`between` needs two values, found {len(values)}")
    if not values and operator == "all":
        raise InvalidInput("`all` needs at least one value, found none")
    return Filter((_Predicate(name, operator, values),))


# Conditions


@dataclass(frozen=True)
class _Ids:
    digest: bytes
    keep: bool
    values: NDArray[np.int64] = field(compare=False, repr=False)

    def matches(self, view: View) -> Callable[[int], Flags]:
        return lambda number: _flags(view.shards[number].rows, view.shards[number].find(self.values)[1], self.keep)


@dataclass(frozen=True)
class _Keys:
    digest: bytes
    keep: bool
    values: tuple[str, ...] = field(compare=False, repr=False)

    def matches(self, view: View) -> Callable[[int], Flags]:
        places = view.find(self.values)
        return lambda number: _flags(view.shards[number].rows, places.rows[places.shards == number], self.keep)


@dataclass(frozen=True)
class _Predicate:
    name: str
    operator: Operator
    values: tuple[Any, ...]

    def matches(self, view: View) -> Callable[[int], Flags]:
        known = sorted({name for shard in view.shards for name in shard.column_names})
        name = "labels" if self.name == "label" and "label" not in known else self.name
        if view.shards and name not in known:
            raise InvalidInput(f"no column `{self.name}` to filter by; the columns are: {', '.join(known) or '(none)'}")
        return lambda number: self._of(view.shards[number].columns([name])[name].combine_chunks())

    def _of(self, stored: pa.Array | pa.ChunkedArray) -> Flags:
        if isinstance(stored, pa.ChunkedArray):
            stored = pa.concat_arrays(stored.chunks)
        if pa.types.is_null(stored.type):
            return np.zeros(len(stored), np.bool_)
        lists = pa.types.is_list(stored.type) or pa.types.is_large_list(stored.type)
        if lists != (self.operator in LIST_OPERATORS) and (lists or self.operator == "all"):
            allowed = LIST_OPERATORS if lists else (*COMPARE, "between", "in", "not in")
            raise InvalidInput(
                f"column `{self.name}` holds {stored.type}, so `{self.operator}` cannot be asked of it; "
                f"use one of: {', '.join(allowed)}"
            )
        return self._of_lists(stored) if lists else _true(self._of_values(stored))

    def _of_values(self, stored: pa.Array) -> pa.Array:
        values = self._cast(stored.type)
        if self.operator == "between":
            return pc.and_(pc.greater_equal(stored, values[0]), pc.less_equal(stored, values[1]))
        if self.operator in COMPARE:
            return COMPARE[self.operator](stored, values[0])
        found = _among(stored, values)
        return pa.array((~found if self.operator == "not in" else found) & _true(pc.is_valid(stored)))

    def _of_lists(self, stored: pa.Array) -> Flags:
        """Whether each list holds any of the values, none of them, or all."""
        items, owner = stored.flatten(), np.asarray(pc.list_parent_indices(stored), np.int64)
        values, found = self._cast(stored.type.value_type), _true(pc.is_valid(stored))

        def holders(wanted: list[pa.Scalar]) -> Flags:
            flags = np.zeros(len(stored), np.bool_)
            flags[owner[_among(items, wanted)]] = True
            return flags

        if self.operator != "all":
            return found & (~holders(values) if self.operator == "not in" else holders(values))
        for value in dict.fromkeys(values):
            if not found.any():
                break
            found &= holders([value])
        return found

    def _cast(self, kind: pa.DataType) -> list[pa.Scalar]:
        """The values as what the column can be compared with. Raises InvalidInput where it cannot."""
        return [self._scalar(value, kind) for value in self.values]

    def _scalar(self, value: Any, kind: pa.DataType) -> pa.Scalar:
        try:
            made = pa.scalar(value)
            if pa.types.is_temporal(kind):
                return made.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OverflowError):
            made = None
        if made is None or _family(made.type) != _family(kind):
            raise InvalidInput(
                f"column `{self.name}` holds {kind}, which cannot be compared with {value!r}"
                + ("; put the number in quotes" if _family(kind) == "text" else "")
            )
        return made.cast(kind) if _family(kind) == "text" else made


def _among(stored: pa.Array, values: Sequence[pa.Scalar]) -> Flags:
    """Which values are equal to one of others, in one pass however many these are; null is equal to none."""
    if not values:
        return np.zeros(len(stored), np.bool_)
    if _family(stored.type) != "number":
        return _true(pc.is_in(stored, pa.array([value.as_py() for value in values], stored.type)))
    wanted = np.unique(np.array([value.as_py() for value in values]))
    numbers = pc.fill_null(stored, 0).to_numpy(zero_copy_only=False)
    at = np.searchsorted(wanted, numbers).clip(max=len(wanted) - 1)
    return np.asarray(wanted[at] == numbers, np.bool_) & _true(pc.is_valid(stored))


def _family(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "truth value"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return str(kind)


def _true(flags: pa.Array | pa.ChunkedArray) -> Flags:
    """As numpy; null is False."""
    return np.asarray(pc.fill_null(flags, False).to_numpy(zero_copy_only=False), np.bool_)


def _flags(rows: int, among: NDArray[np.int64], keep: bool) -> Flags:
    flags = np.full(rows, not keep)
    flags[among] = keep
    return flags


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


# Evaluated against a version


class Searchable(NamedTuple):
    """Rows of a shard to be scanned: codes and ids, row-aligned, and a bitmap of rows that are left out."""

    codes_NW: NDArray[np.uint8]
    ids_N: NDArray[np.int64]
    dead: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Selection:
    """A filter evaluated against a version: the live rows that match.

    Attributes:
        rows: live rows that match.
        counts: of them in each shard.
        shards: per shard the bitmap of rows to leave out, None if there are none.
        copies: of shards with few matches: the matching codes and ids.
    """

    rows: int
    counts: list[int]
    shards: list[NDArray[np.uint8] | None]
    copies: dict[int, Searchable]


def matching(view: View, where: Filter | None) -> int:
    """Number of live rows that match a filter; of all live rows without one. Raises InvalidInput as `select`."""
    return int(view.manifest["rows"]) if where is None else selection(view, where).rows


def searchable(view: View, number: int, where: Filter | None) -> Searchable:
    """The rows of a shard to be scanned: all of them, or copies of those that match where they are few."""
    shard = view.shards[number]
    if where is None:
        return Searchable(shard.codes, shard.ids, view.dead(number))
    chosen = selection(view, where)
    return chosen.copies.get(number) or Searchable(shard.codes, shard.ids, chosen.shards[number])


def selection(view: View, where: Filter) -> Selection:
    """A filter, evaluated at the first call; the last few of a version are kept as long as it is open."""
    with _lock:
        kept = _selections.setdefault(view, OrderedDict())
        if where in kept:
            kept.move_to_end(where)
            return kept[where]
    made = select(view, where)
    with _lock:
        kept[where] = made
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return made


_lock = threading.Lock()
_selections: WeakKeyDictionary[View, OrderedDict[Filter, Selection]] = WeakKeyDictionary()


def select(view: View, where: Filter) -> Selection:
    """Evaluate a filter. Raises InvalidInput for a column that no shard has, or values of another type."""
    tests = [condition.matches(view) for condition in where.conditions]
    counts, left_out, copies = [], [], {}
    for number, shard in enumerate(view.shards):
        matching = reduce(np.logical_and, (test(number) for test in tests), np.ones(shard.rows, np.bool_))
        matching[view.dead_rows(number)] = False
        rows = np.flatnonzero(matching)
        counts.append(len(rows))
        left_out.append(np.packbits(~matching, bitorder="little") if len(rows) < shard.rows else None)
        if len(rows) < shard.rows * _COPIED_BELOW:
            copies[number] = Searchable(shard.codes[rows], shard.ids[rows], None)
    return Selection(sum(counts), counts, left_out, copies)
