"""Which images are queries, training set and database: the papers' splits as pure functions of (ids, labels, seed).

Images are drawn in the order of a keyed hash of their ids, so a split depends neither on the order of rows nor on
numpy's generators, and another seed draws other images. Counts are the papers'; queries are never in the database,
nor trained on. A protocol is taken by name, or from a file: `file:PATH` or `file:s3://bucket/NAME` (docs/protocols.md).

| name | queries | training | database |
|---|---|---|---|
| cifar-dsah, cifar-ddh-release | 100 a class | 1000 a class | all but queries |
| cifar-sadh, cifar-csdh | 100 a class | 500 a class | all but queries |
| cifar-ddh-paper | the data set's test part | its training part | its training part |
| digits | 20 a class | all but queries | all but queries |
| flickr-dsah | 1000 | 10000 | all but queries |
| flickr-sadh | 1000 | 4000 | all but queries |
| flickr-sadh-20000 | 1000 | 4000 | all but queries and training |
| flowers17 | 20 a class | 40 a class | all but queries and validation (20 a class) |
| nus-dsah | 2100 | 10500 | all but queries |
| nus-ddh | 1000 | 4000 | all but queries |
| nus-21 | 100 a class | 500 a class | all but queries |
| uniform:Q:T | Q | T | all but queries |
| uniform | 1000 | all but queries | all but queries |

cifar-ddh-paper takes the parts that keys name (`test/...`); flowers17 takes them where there are any, else it draws.
nus-21 fills places as the released code of SADH's lineage does: an image takes a training place, else a query place, of
the first of its labels that has one left. The release of DDH states 10000 training images in all, its sibling BGAN 1000
queries; a class's share is inferred.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashdist.ground.errors import AlreadyExists, InvalidInput
from hashdist.ground.ids import assign_salts, image_ids
from hashdist.ground.permutation import mix64
from hashdist.store import Store, of_file

Labels = Sequence[Sequence[int] | None] | NDArray[np.integer]
"""Labels of every row, as the column `labels` of a table gives them, or one class number a row."""

SETS = ("query", "train", "database", "validation")
"""The sets of a split, in the order in which digests take them."""

FILE = "file:"
"""The name of a protocol in a file begins with this."""

_APART = (
    ("query", "database", "queries must not be in the database"),
    ("query", "train", "queries must not be trained on"),
    ("query", "validation", "queries must not be in the validation set"),
    ("validation", "train", "validation images must not be trained on"),
)
_PART = re.compile(r"(train|test|val)(?:id(?:ation)?)?[/_-]", re.IGNORECASE)
_METADATA = b"hashdist protocol"
_FORMAT_VERSION = 1


def _none() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Split:
    """Rows of the sets, int64, ascending.

    Args:
        query: rows asked for.
        train: rows learned from.
        database: rows searched.
        ids: int64 [N], ids of all rows.
        validation: rows that choose what is not learned (DDH's SVM); most protocols have none.

    Raises:
        InvalidInput: a query is in another set too, or a validation row in the training set.
    """

    query: NDArray[np.int64]
    train: NDArray[np.int64]
    database: NDArray[np.int64]
    ids: NDArray[np.int64] = field(repr=False)
    validation: NDArray[np.int64] = field(default_factory=_none)

    def __post_init__(self) -> None:
        for one, other, rule in _APART:
            shared = np.intersect1d(self.ids[getattr(self, one)], self.ids[getattr(self, other)])
            _check_apart(rule, "id", shared.tolist())

    def digest(self) -> str:
        """32 hex digits that name the sets of ids, whatever the order of rows."""
        state = hashlib.blake2b(digest_size=16)
        for name in SETS if len(self.validation) else SETS[:3]:
            state.update(self._bytes(name))
        return state.hexdigest()

    def digests(self) -> dict[str, str]:
        """As `digest`, of each set by itself."""
        return {name: hashlib.blake2b(self._bytes(name), digest_size=16).hexdigest() for name in SETS}

    def counts(self) -> dict[str, int]:
        """How many images each set has."""
        return {name: len(getattr(self, name)) for name in SETS}

    def _bytes(self, name: str) -> bytes:
        rows = getattr(self, name)
        return len(rows).to_bytes(8, "little") + np.sort(self.ids[rows]).astype("<i8").tobytes()


def _check_apart(rule: str, what: str, shared: Sequence[int | str]) -> None:
    if shared:
        raise InvalidInput(
            f"{rule}, found {len(shared)} that are (the first {what}: {shared[0]}); leave them out of one of the two"
        )


@dataclass(frozen=True)
class _Counts:
    """How many images are drawn, per class or in all; train None = the whole database.

    `own`: whether the data set's own parts are taken instead, always or where there are any. `train_found`: whether
    the training set is in the database.
    """

    query: int
    train: int | None
    per_class: bool
    validation: int = 0
    several_labels: bool = False
    own: Literal["no", "always", "if given"] = "no"
    train_found: bool = True


_PROTOCOLS = {
    "cifar-dsah": _Counts(100, 1000, True),
    "cifar-ddh-release": _Counts(100, 1000, True),
    "cifar-ddh-paper": _Counts(0, None, False, own="always"),
    "cifar-sadh": _Counts(100, 500, True),
    "cifar-csdh": _Counts(100, 500, True),
    "digits": _Counts(20, None, True),
    "flickr-dsah": _Counts(1000, 10_000, False),
    "flickr-sadh": _Counts(1000, 4000, False),
    "flickr-sadh-20000": _Counts(1000, 4000, False, train_found=False),
    "flowers17": _Counts(20, 40, True, validation=20, own="if given"),
    "nus-dsah": _Counts(2100, 10_500, False),
    "nus-ddh": _Counts(1000, 4000, False),
    "nus-21": _Counts(100, 500, True, several_labels=True),
    "uniform": _Counts(1000, None, False),
}


def split(
    name: str, ids: NDArray[np.int64], labels: Labels | None, seed: int = 0, parts: Sequence[str] | None = None
) -> Split:
    """The split `name` of the images `ids`; give only images that have a feature.

    Args:
        name: one of the table above, `uniform:Q:T`, or `file:` with the path or URI of a protocol file.
        ids: int64 [N], distinct, in any order.
        labels: [N]; one class a row where the protocol draws by class.
        seed: draws other images.
        parts: [N], the data set's own: `train`, `test`, `val` or empty (see `parts_of`).

    Raises:
        InvalidInput: an unknown name, missing labels or parts, several labels where one is needed, an id twice, or
            fewer images than are to be drawn; a protocol file that is damaged, or of images that are not there.
    """
    if len(np.unique(ids)) != len(ids):
        raise InvalidInput(f"ids must be distinct, found {len(ids) - len(np.unique(ids))} repeated ones")
    if name.startswith(FILE):
        return _match(name.removeprefix(FILE), np.asarray(ids, np.int64))
    counts = _counts(name)
    if counts.own == "always" or (counts.own == "if given" and any(parts or ())):
        places = _own_parts(name, parts, len(ids))
    else:
        places = _draw(name, counts, ids, labels, seed)
    database = np.setdiff1d(np.arange(len(ids)), np.concatenate([places["query"], places["validation"]]))
    train = database if counts.train is None and counts.own == "no" else places["train"]
    if not counts.train_found:
        database = np.setdiff1d(database, train)
    return Split(places["query"], train, database, np.asarray(ids, np.int64), places["validation"])


def needs_labels(name: str) -> bool:
    """Whether the protocol draws by class. Raises InvalidInput for an unknown name."""
    return not name.startswith(FILE) and _counts(name).per_class


def parts_of(keys: Iterable[str]) -> list[str]:
    """The part of its data set that each key begins with: `train`, `test`, `val`, or empty for none."""
    found = (_PART.match(key) for key in keys)
    return [match[1].lower() if match else "" for match in found]


def _counts(name: str) -> _Counts:
    if name in _PROTOCOLS:
        return _PROTOCOLS[name]
    kind, _, numbers = name.partition(":")
    query, _, train = numbers.partition(":")
    if kind == "uniform" and query.isdecimal() and train.isdecimal() and int(query) and int(train):
        return _Counts(int(query), int(train), False)
    raise InvalidInput(
        f"a known protocol is required, found {name!r}; use one of {', '.join(_PROTOCOLS)}, or uniform:Q:T with the "
        f"numbers of queries and of training images, or file:PATH with a protocol file"
    )


def _own_parts(name: str, parts: Sequence[str] | None, rows: int) -> dict[str, NDArray[np.int64]]:
    """The data set's own parts."""
    given = np.array(parts if parts is not None else [""] * rows, dtype=str)
    found = {part: np.flatnonzero(given == part) for part in ("test", "train", "val")}
    placed = sum(len(rows_of) for rows_of in found.values())
    if placed < rows or not len(found["test"]) or not len(found["train"]):
        raise InvalidInput(
            f"protocol {name} takes the data set's own parts, which keys must name (train/..., test/...), found "
            f"{', '.join(f'{len(rows_of)} {part}' for part, rows_of in found.items())} among {rows} images; make the "
            f"collection with `hashdist dataset convert`, or a protocol file with `hashdist protocol make`"
        )
    return {"query": found["test"], "train": found["train"], "validation": found["val"]}


def _draw(
    name: str, counts: _Counts, ids: NDArray[np.int64], labels: Labels | None, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Rows drawn for each set, ascending."""
    drawn = _drawing_order(ids, seed)
    if counts.several_labels:
        return _fill(name, counts, labels, drawn)
    groups = _by_class(name, counts, labels, drawn) if counts.per_class else {"all": drawn}
    for label, rows in groups.items():
        _check_enough(name, counts, label, len(rows))
    bounds = np.cumsum([0, counts.query, counts.train or 0, counts.validation])
    return {
        part: np.sort(np.concatenate([rows[start:stop] for rows in groups.values()]))
        for part, start, stop in zip(("query", "train", "validation"), bounds, bounds[1:], strict=False)
    }


def _drawing_order(ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Rows in the order in which they are drawn."""
    key = mix64(np.array([seed], np.int64).astype(np.uint64))
    return np.argsort(mix64(mix64(ids.astype(np.uint64)) ^ key), kind="stable")


def _by_class(
    name: str, counts: _Counts, labels: Labels | None, drawn: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Rows of every class, in drawing order."""
    classes = np.array([given[0] for given in _checked_labels(name, counts, labels, len(drawn))], np.int64)[drawn]
    return {str(label): drawn[classes == label] for label in np.unique(classes)}


def _fill(name: str, counts: _Counts, labels: Labels | None, drawn: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Every image in drawing order takes a training or else a query place of its first label that has one left."""
    listed = [sorted(given) for given in _checked_labels(name, counts, labels, len(drawn))]
    classes = {label for given in listed for label in given}
    left = {part: dict.fromkeys(classes, getattr(counts, part)) for part in ("train", "query")}
    taken: dict[str, list[int]] = {"train": [], "query": []}
    open_places = sum(sum(places.values()) for places in left.values())
    for row in drawn.tolist():
        if not open_places:
            break
        place = next(((part, label) for label in listed[row] for part in left if left[part][label]), None)
        if place is not None:
            part, label = place
            left[part][label] -= 1
            taken[part].append(row)
            open_places -= 1
    for label in sorted(classes):
        missing = left["train"][label] + left["query"][label]
        _check_enough(name, counts, str(label), counts.query + (counts.train or 0) - missing)
    return {**{part: np.sort(np.array(rows, np.int64)) for part, rows in taken.items()}, "validation": _none()}


def _checked_labels(name: str, counts: _Counts, labels: Labels | None, rows: int) -> list[list[int]]:
    """The labels of each image: at least one, and one only where the protocol needs that."""
    if labels is None or len(labels) != rows:
        found = "none" if labels is None else f"{len(labels)} for {rows} images"
        raise InvalidInput(f"protocol {name} draws by class and needs the label of every image, found {found}")
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
        return [[label] for label in labels.tolist()]
    listed = [list(entry) if entry is not None else [] for entry in labels]
    wrong = [row for row, entry in enumerate(listed) if not entry or (len(entry) > 1 and not counts.several_labels)]
    if wrong:
        raise InvalidInput(
            f"protocol {name} needs {'a' if counts.several_labels else 'exactly one'} label an image, found "
            f"{len(wrong)} of {rows} images without (the first is row {wrong[0]}, with {len(listed[wrong[0]])} "
            f"labels); use a labelled collection, or uniform:Q:T"
        )
    return listed


def _check_enough(name: str, counts: _Counts, label: str, found: int) -> None:
    needed = counts.query + (1 if counts.train is None else counts.train) + counts.validation
    if found < needed:
        where = f"class {label} has" if counts.per_class else "there are"
        also = f" and {counts.validation} validation images" if counts.validation else ""
        raise InvalidInput(
            f"protocol {name} draws {counts.query} queries and {counts.train or 'the remaining'} training images{also}"
            f"{' a class' if counts.per_class else ''}, but {where} only {found} images; use a protocol that needs "
            f"fewer, or more images"
        )


# Over rows that a stage committed


def columns(name: str) -> list[str]:
    """The columns besides `id` that `split_rows` needs of a table. Raises InvalidInput for an unknown name."""
    if name.startswith(FILE):
        return []
    counts = _counts(name)
    return ["key"] * (counts.own != "no") + ["labels"] * counts.per_class


def split_rows(name: str, table: pa.Table, seed: int = 0) -> Split:
    """`split` of the rows of a table: id and what `columns` asks for, of the images that have a feature or code."""
    wanted = columns(name)
    labels = table["labels"].to_pylist() if "labels" in wanted else None
    parts = parts_of(table["key"].to_pylist()) if "key" in wanted else None
    return split(name, table["id"].to_numpy(), labels, seed, parts)


def identity(name: str) -> str:
    """The protocol's name, or the digest of its file: equal for equal sets, wherever the file lies."""
    return FILE + read_protocol(name.removeprefix(FILE)).split.digest() if name.startswith(FILE) else name


# Protocol files


class Protocol(NamedTuple):
    """The content of a protocol file.

    Attributes:
        name: what it was drawn by, or any.
        seed: likewise.
        source: what it was made from, in words.
        keys: of all images that are in a set, ascending.
        split: the sets, as rows of `keys`.
    """

    name: str
    seed: int
    source: str
    keys: list[str]
    split: Split

    def summary(self) -> dict[str, Any]:
        """Name, seed, source, counts and digests."""
        sets = {"counts": self.split.counts(), "digests": self.split.digests(), "digest": self.split.digest()}
        return {"name": self.name, "seed": self.seed, "source": self.source, **sets}


def _match(uri: str, ids: NDArray[np.int64]) -> Split:
    """The sets of a file as rows of `ids`."""
    protocol = read_protocol(uri)
    order = np.argsort(ids)
    places = np.searchsorted(ids[order], protocol.split.ids).clip(max=len(ids) - 1)
    rows = order[places] if len(ids) else places
    absent = np.flatnonzero(ids[rows] != protocol.split.ids) if len(ids) else np.arange(len(rows))
    if len(absent):
        raise InvalidInput(
            f"{uri}: all {len(rows)} keys of the protocol must be images with a feature, {len(absent)} are not (the "
            f"first: {protocol.keys[absent[0]]!r}); use the collection that the protocol was made for, with the same "
            f"keys, or make the protocol again"
        )
    return Split(ids=ids, **{part: np.sort(rows[getattr(protocol.split, part)]) for part in SETS})


def protocol_of(sets: Mapping[str, Iterable[str]], name: str, seed: int = 0, source: str = "") -> Protocol:
    """The protocol of given sets of keys.

    Args:
        sets: keys by set, of SETS; a key may be in several.
        name: of the protocol.
        seed: that it was drawn with.
        source: what it was made from, in words.

    Raises:
        InvalidInput: an empty query, training or database set; queries in another set.
    """
    members = {part: set(sets.get(part, ())) for part in SETS}
    empty = [part for part in SETS[:3] if not members[part]]
    if empty:
        raise InvalidInput(f"protocol {name} needs query, train and database images, found no {' and no '.join(empty)}")
    for one, other, rule in _APART:
        shared = sorted(members[one] & members[other])
        _check_apart(rule, "key", shared)
    keys = sorted(set().union(*members.values()))
    rows = {part: np.flatnonzero([key in members[part] for key in keys]) for part in SETS}
    return Protocol(name, seed, source, keys, Split(ids=_distinct_ids(keys), **rows))


def _distinct_ids(keys: list[str]) -> NDArray[np.int64]:
    ids = image_ids(keys)
    return ids if len(np.unique(ids)) == len(ids) else image_ids(keys, assign_salts(keys))


def write_protocol(uri: str, protocol: Protocol) -> str:
    """Write a protocol file: parquet, a row per key with one boolean column a set; returns its URI.

    Raises:
        AlreadyExists: a file is there: digests in results stand for files that do not change.
    """
    member = np.zeros((len(SETS), len(protocol.keys)), np.bool_)
    for column, part in zip(member, SETS, strict=True):
        column[getattr(protocol.split, part)] = True
    about = {"format_version": _FORMAT_VERSION, **protocol.summary()}
    kinds = [("key", pa.string()), *((part, pa.bool_()) for part in SETS)]
    schema = pa.schema(kinds, metadata={_METADATA: json.dumps(about, sort_keys=True)})
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(protocol.keys), *map(pa.array, member)], schema=schema), sink, compression="zstd")
    store, file = _place(uri)
    if store.exists(file):
        raise AlreadyExists(f"{uri} is there already, and a protocol file is never changed; choose another name")
    store.put(file, sink.getvalue())
    return f"{store.uri}/{file}"


def read_protocol(uri: str) -> Protocol:
    """Read a protocol file and check it.

    Raises:
        NotFound: there is none. InvalidInput: it is not a protocol file, or a newer one; its sets are not those that
            were written; queries are in another set.
    """
    store, file = _place(uri)
    return _parse(store.get(file), uri)


def _place(uri: str) -> tuple[Store, str]:
    store, file = of_file(uri)
    if not file:
        raise InvalidInput(f"a protocol file is required (file:PATH or file:s3://bucket/NAME), found {uri!r}")
    return store, file


@lru_cache(maxsize=4)
def _parse(data: bytes, uri: str) -> Protocol:
    """The content of a file; kept, because every stage asks for it."""
    advice = "make it with `hashdist protocol make`"
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput(f"{uri} must be a protocol file (parquet), found {error}; {advice}") from error
    about = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    if not about or table.schema.names != ["key", *SETS]:
        raise InvalidInput(f"{uri} must have the columns key, {', '.join(SETS)}, found {table.schema.names}; {advice}")
    if about["format_version"] > _FORMAT_VERSION:
        raise InvalidInput(
            f"{uri} has the format {about['format_version']}, this hashdist reads {_FORMAT_VERSION}; update hashdist"
        )
    keys = table["key"].to_pylist()
    if len(set(keys)) != len(keys):
        raise InvalidInput(f"{uri} must hold every key once, found {len(keys) - len(set(keys))} repeated; {advice}")
    sets = {part: pc.filter(table["key"], table[part]).to_pylist() for part in SETS}
    try:
        protocol = protocol_of(sets, about["name"], about["seed"], about["source"])
    except InvalidInput as error:
        raise InvalidInput(f"{uri}: {error}") from error
    found = protocol.split.digests()
    changed = [part for part in SETS if found[part] != about["digests"][part]]
    if changed or protocol.split.digest() != about["digest"]:
        part = changed[0] if changed else "whole"
        raise InvalidInput(
            f"{uri}: the {part} set must have the digest {about['digests'].get(part, about['digest'])} that it was "
            f"written with, found {found.get(part, protocol.split.digest())}: the file was changed; take the original, "
            f"or {advice}"
        )
    return protocol
