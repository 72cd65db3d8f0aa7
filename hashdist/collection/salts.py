"""Rows of scanned units by id: salts of keys whose ids collide (docs/decisions.md, S2), partitions by id prefix."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.readers.reader import SCANNED
from hashdist.ground.ids import ID_BITS, image_id, salts_of
from hashdist.store.commit import Artefact, read_table

PARTITION_ROWS = 262_144
"""Rows per file of the listing, about: the number of files is a power of two."""

_PARTITIONS_AT_ONCE = 8


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


def prefix_bits(rows: int) -> int:
    """Leading bits of an id that tell the file of its row, in a listing of this many rows."""
    return ((max(rows, 1) - 1) // PARTITION_ROWS).bit_length()


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
                table = apply_salts(read_table(target.store, unit["file"]), salts)
                prefixes = table["id"].to_numpy() >> (ID_BITS - bits)
                for prefix, tables in picked.items():
                    tables.append(table.filter(pa.array(prefixes == prefix)))
        for tables in picked.values():
            yield pa.concat_tables([SCANNED.empty_table(), *tables])


def apply_salts(table: pa.Table, salts: Mapping[str, int]) -> pa.Table:
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
