"""Distinct ids: keys whose ids collide get salts (docs/decisions.md, S2)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.readers.reader import SCANNED
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import assign_salts, image_id
from hashdist.store.commit import Artefact, read_table

PARTITION_ROWS = 262_144
"""Rows per file of the listing, about: the number of files is a power of two."""
ID_BITS = 63
_PARTITIONS_AT_ONCE = 8
EXAMPLES = 3


def salts_of(ids: NDArray[np.int64], keys_at: Any, all_keys: Any) -> dict[str, int]:
    """Salts that make the ids of all keys distinct (S2: on a collision the later key takes the next salt).

    Args:
        ids: of all rows, without salts.
        keys_at: keys of the given rows.
        all_keys: keys of all rows; asked for only when a salted id collides in its turn.

    Raises InvalidInput if two rows have one key.
    """
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(np.diff(ids[order]) == 0)
    if not len(same):
        return {}
    keys = keys_at(np.unique(order[np.concatenate([same, same + 1])]))
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise InvalidInput(
            f"every image must have its own key, found {len(twice)} keys more than once, among them "
            f"{', '.join(map(repr, sorted(twice)[:EXAMPLES]))}; rename them, or choose another id column"
        )
    salts = assign_salts(keys)
    salted = np.array([image_id(key, salt) for key, salt in salts.items()], np.int64)
    return assign_salts(all_keys()) if np.isin(salted, ids).any() else salts


def salts_of_units(
    target: Artefact, units: Sequence[Mapping[str, Any]], ids: Sequence[NDArray[np.int64]]
) -> dict[str, int]:
    """Salts of the keys of scanned units, whose ids `ids` holds unit by unit."""
    bounds = np.cumsum([0, *[len(part) for part in ids]])

    def keys_at(rows: NDArray[np.int64]) -> list[str]:
        keys: list[str] = []
        for number in np.unique(np.searchsorted(bounds, rows, side="right") - 1):
            here = rows[(rows >= bounds[number]) & (rows < bounds[number + 1])] - bounds[number]
            keys += list(column_of(target, units[number], "key")[here])
        return keys

    def all_keys() -> Iterator[str]:
        for unit in units:
            yield from column_of(target, unit, "key")

    return salts_of(np.concatenate([*ids, np.empty(0, np.int64)]), keys_at, all_keys)


def partitions(
    target: Artefact,
    units: Sequence[Mapping[str, Any]],
    ids: Sequence[NDArray[np.int64]],
    bits: int,
    salts: Mapping[str, int],
) -> Iterator[pa.Table]:
    """Rows of each id prefix in turn. The units are read once for every few prefixes."""
    for first in range(0, 1 << bits, _PARTITIONS_AT_ONCE):
        last = min(first + _PARTITIONS_AT_ONCE, 1 << bits)
        picked: dict[int, list[pa.Table]] = {prefix: [] for prefix in range(first, last)}
        for unit, unit_ids in zip(units, ids, strict=True):
            prefixes = unit_ids >> (ID_BITS - bits)
            # a salted id may lie elsewhere, so units are looked into whenever there are salts
            if salts or ((prefixes >= first) & (prefixes < last)).any():
                table = salted(read_table(target.store, unit["file"]), salts)
                prefixes = table["id"].to_numpy() >> (ID_BITS - bits)
                for prefix, tables in picked.items():
                    tables.append(table.filter(pa.array(prefixes == prefix)))
        for tables in picked.values():
            yield pa.concat_tables([SCANNED.empty_table(), *tables])


def salted(table: pa.Table, salts: Mapping[str, int]) -> pa.Table:
    """Scanned rows with the ids of the salted keys put right."""
    if not salts:
        return table
    at = np.flatnonzero(pc.is_in(table["key"], pa.array(list(salts), pa.string())).to_numpy())
    if not len(at):
        return table
    ids = table["id"].to_numpy().copy()
    keys = table["key"].take(at).to_pylist()
    ids[at] = [image_id(key, salts[key]) for key in keys]
    return table.set_column(0, SCANNED.field("id"), pa.array(ids))


def column_of(target: Artefact, unit: Mapping[str, Any], name: str) -> Any:
    """A column of a scanned unit, as an array."""
    return read_table(target.store, unit["file"], [name])[name].to_numpy()
