"""A change to an index, planned against the version it is to be committed upon, and planned again upon a winner."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.ground.errors import AlreadyExists, InvalidInput
from hashdist.ground.ids import image_id, image_ids
from hashdist.index.notes import SEEN, new_notes
from hashdist.index.view import Places, View

OnExisting = Literal["error", "replace", "skip"]

_SHOWN = 3


class Applied(NamedTuple):
    """Outcome of a change.

    Attributes:
        version: the one it committed, or the present one where there was nothing to do.
        added: rows with new keys.
        replaced: rows whose key was there.
        removed: rows removed.
        unknown: keys to remove that were not there.
    """

    version: int
    added: int
    replaced: int
    removed: int
    unknown: int


@dataclass(frozen=True)
class Change:
    """A change that a writer asks for, independent of the version it will be committed upon."""

    codes: NDArray[np.uint8]
    keys: list[str]
    columns: pa.Table
    removed: list[str]
    model: str | None
    on_existing: OnExisting
    fields: Mapping[str, Any]
    seen: pa.Table = field(default_factory=SEEN.empty_table)

    def check(self) -> None:
        """Raise InvalidInput for what is wrong whatever the version."""
        if len(self.codes) != len(self.keys):
            raise InvalidInput(f"every code needs a key, found {len(self.codes)} codes and {len(self.keys)} keys")
        if self.on_existing not in ("error", "replace", "skip"):
            raise InvalidInput(f"on_existing must be error, replace or skip, found {self.on_existing!r}")
        both = sorted(set(self.keys) & set(self.removed))
        if both:
            raise InvalidInput(f"a key can be added or removed, not both; {some(both)} are in both lists")

    def plan(self, view: "View", *, rebased: bool) -> "ChangePlan":
        """The rows to write and the ids to hide if committed upon `view`. Raises as `Index.append`."""
        model = self._model_upon(view)
        ids, salts, places = _assign_ids(self.keys, view)
        known = places.present
        keep = np.ones(len(self.keys), np.bool_)
        if rebased and self.on_existing != "skip":
            keep[known] = ~self._same_as(view, places)
        if self.on_existing == "error" and (known & keep).any():
            there = [self.keys[row] for row in np.flatnonzero(known & keep)]
            raise AlreadyExists(
                f"every key must be new, but {some(there)} are in {view.uri}, version {view.number}; "
                'pass on_existing="replace" or "skip"'
            )
        if self.on_existing == "skip":
            keep[known] = False
        rows = np.flatnonzero(keep)
        gone = view.find(self.removed)
        return ChangePlan(
            rows=rows,
            ids=ids[rows],
            replaced=np.sort(ids[known & keep]),
            removed=np.sort(gone.ids[gone.present]),
            unknown=int((~gone.present).sum()),
            salts={key: salts[key] for key in (self.keys[row] for row in rows) if key in salts},
            model=model,
            seen=new_notes(self.seen, view.notes(self.seen["id"].to_numpy())),
        )

    def _model_upon(self, view: "View") -> str | None:
        present: str | None = view.manifest["model"]
        if self.model is None or self.model == present:
            return present
        if present is None and not view.manifest["rows"]:
            return self.model
        raise InvalidInput(
            f"{view.uri} holds codes of model {present or '(not stated)'}, found codes of model {self.model}; "
            "encode with the former, or build another index"
        )

    def _same_as(self, view: "View", places: "Places") -> NDArray[np.bool_]:
        """Which of the rows whose key is there have the code and the content digest of the one that is there."""
        mine = np.flatnonzero(places.present)
        if not len(mine) or "digest" not in self.columns.column_names:
            return np.zeros(len(mine), np.bool_)
        there = places.take(mine)
        digests = self.columns["digest"].take(mine).to_pylist()
        equal = [a is not None and a == b for a, b in zip(digests, view.column(there, "digest"), strict=True)]
        same: NDArray[np.bool_] = np.array(equal) & (view.codes(there) == self.codes[mine]).all(1)
        return same


class ChangePlan(NamedTuple):
    """A change worked out against one version."""

    rows: NDArray[np.int64]  # of the change, to write
    ids: NDArray[np.int64]  # theirs
    replaced: NDArray[np.int64]  # ids, ascending, whose earlier rows are hidden because of new ones
    removed: NDArray[np.int64]  # ids, ascending, to hide
    unknown: int  # keys to remove that are not there
    salts: dict[str, int]
    model: str | None
    seen: pa.Table  # notes that the version does not have yet

    @property
    def hidden(self) -> NDArray[np.int64]:
        """Ids whose earlier rows are to be hidden, ascending."""
        return np.union1d(self.replaced, self.removed)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not len(self.rows) and not len(self.removed) and not len(self.seen)

    def applied(self, version: int) -> Applied:
        """The outcome, committed as `version`."""
        replaced = len(self.replaced)
        return Applied(version, len(self.rows) - replaced, replaced, len(self.removed), self.unknown)

    def same_files(self, other: "ChangePlan") -> bool:
        """Whether the files written for this plan serve the other."""
        return (
            np.array_equal(self.rows, other.rows)
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.hidden, other.hidden)
            and self.seen.equals(other.seen)
        )


def _assign_ids(keys: Sequence[str], view: View) -> tuple[NDArray[np.int64], dict[str, int], Places]:
    """Ids of keys that are in the index or are to join it, salts > 0 among them, and where the former are.

    A key keeps the salt that was recorded for it. A new key whose id another key has takes the next salt; of two new
    ones with one id, the later in string order does.
    """
    salts = {key: view.salts[key] for key in keys if key in view.salts}
    ids = image_ids(keys, salts)
    while True:
        places = view.locate(ids)
        clashes = set(np.flatnonzero(~view.key_matches(keys, places)).tolist())
        clashes |= _later_of_equal(keys, ids, clashes)
        if not clashes:
            return ids, salts, places
        for row in clashes:
            salts[keys[row]] = salts.get(keys[row], 0) + 1
            ids[row] = image_id(keys[row], salts[keys[row]])


def _later_of_equal(keys: Sequence[str], ids: NDArray[np.int64], leaving: set[int]) -> set[int]:
    """Rows that share an id with an earlier key, not counting the rows that leave that id anyway."""
    if len(np.unique(ids)) == len(ids):
        return set()
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for row, id_ in enumerate(ids.tolist()):
        if row not in leaving:
            holders[id_].append(row)
    return {row for rows in holders.values() for row in sorted(rows, key=lambda row: keys[row])[1:]}


def checked_keys(keys: Sequence[str], *, distinct: bool = True) -> list[str]:
    """The keys, as a list. Raises InvalidInput for what is no key, or for one that is given twice."""
    if isinstance(keys, str | bytes):
        raise InvalidInput(f"keys must be a sequence of texts, found one text {keys!r}")
    found = list(keys)
    wrong = next((key for key in found if not isinstance(key, str) or not key), None)
    if wrong is not None:
        raise InvalidInput(f"every key must be a text that is not empty, found {wrong!r}")
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"keys must be valid Unicode, found {error.object[error.start]!r} in one") from error
    if distinct and len(set(found)) != len(found):
        seen: set[str] = set()
        twice = sorted({key for key in found if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise InvalidInput(f"every key must be given once; {some(twice)} are given more often")
    return found


def checked_columns(columns: Mapping[str, Any] | pa.Table | None, rows: int) -> pa.Table:
    """The columns as a table of `rows` rows, or of none at all. Raises InvalidInput."""
    if columns is None:
        return pa.table({})
    try:
        table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise InvalidInput(f"columns must be row-aligned arrays of plain values: {error}") from error
    taken = {"id", "key", "code"} & set(table.column_names)
    if taken:
        raise InvalidInput(f"the columns id, key and code are the index's own, found {sorted(taken)} among `columns`")
    if table.num_columns and len(table) != rows:
        raise InvalidInput(f"columns must have {rows} rows like the codes, found {len(table)}")
    if "digest" in table.column_names and not pa.types.is_string(table.schema.field("digest").type):
        at = table.column_names.index("digest")
        table = table.set_column(at, "digest", table["digest"].cast(pa.string()))
    return table


def some(keys: Sequence[str]) -> str:
    """The number of keys, and the first of them."""
    more = ", ..." if len(keys) > _SHOWN else ""
    return f"{len(keys)} keys ({', '.join(map(repr, keys[:_SHOWN]))}{more})"
