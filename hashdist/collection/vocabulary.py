"""Labels given as text, numbered."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.collection.readers.reader import Reader
from hashdist.ground.schema import LISTING


class Labels(NamedTuple):
    """The number of each label that the source gives as text, and the names of the numbers."""

    vocabulary: dict[str, int]
    classes: list[str]


def label_numbers(reader: Reader, units: Sequence[Mapping[str, Any]]) -> Labels:
    """Numbers for the labels that a scan has found: in the order of their names, over the whole collection.

    Names that the source's own metadata numbers keep those numbers; texts that are all digits are those numbers where
    the format has no other way to give any.
    """
    names = sorted({name for unit in units for name in unit["names"]})
    classes = reader.classes()
    if reader.digits_are_numbers and all(name.isdecimal() for name in names):
        return Labels({name: int(name) for name in names}, classes)
    if set(names) <= set(classes):
        return Labels({name: classes.index(name) for name in names}, classes)
    return Labels({name: number for number, name in enumerate(names)}, names)


def extend_vocabulary(vocabulary: Mapping[str, int], names: Iterable[str], reader: Reader) -> dict[str, int]:
    """The numbers of labels given as text, with numbers for those that have none yet; numbers once given stay.

    The first numbers of all are those that `label_numbers` gives; later names follow the largest number, in order.
    """
    if not vocabulary:
        return label_numbers(reader, [{"names": list(names)}]).vocabulary
    new = sorted(set(names) - vocabulary.keys())
    if reader.digits_are_numbers and all(name.isdecimal() for name in [*vocabulary, *new]):
        return {**vocabulary, **{name: int(name) for name in new}}
    return {**vocabulary, **{name: number for number, name in enumerate(new, max(vocabulary.values()) + 1)}}


def number_labels(table: pa.Table, vocabulary: Mapping[str, int]) -> pa.ChunkedArray:
    """Column `labels` of scanned rows, with labels given as text by their numbers."""
    if not vocabulary:
        return table["labels"].cast(LISTING.field("labels").type)
    names = table["names"].combine_chunks()
    if isinstance(names, pa.ChunkedArray):
        names = pa.concat_arrays(names.chunks) if names.num_chunks else pa.array([], names.type)
    at = pc.index_in(names.flatten(), pa.array(list(vocabulary), pa.string()))
    numbers = pa.array(list(vocabulary.values()), pa.int32()).take(at)
    lengths = pc.fill_null(pc.list_value_length(names), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = names.is_null() if names.null_count else None
    given = pa.ListArray.from_arrays(pa.array(offsets), numbers, mask=mask)
    return pc.coalesce(given, table["labels"].cast(given.type))
