"""Which images are queries, training set and database: the papers' splits as pure functions of (ids, labels, seed).

Images are drawn in the order of a keyed hash of their ids, so a split depends neither on the order of rows nor on
numpy's generators, and another seed draws other images. Counts are the papers'; the training set lies inside the
database, queries never do.

| name | queries | training | database |
|---|---|---|---|
| cifar-dsah, cifar-ddh-release | 100 a class | 1000 a class | all but queries |
| cifar-sadh, cifar-csdh | 100 a class | 500 a class | all but queries |
| digits | 20 a class | all but queries | all but queries |
| flickr-dsah | 1000 | 10000 | all but queries |
| flickr-sadh | 1000 | 4000 | all but queries |
| nus-dsah | 2100 | 10500 | all but queries |
| nus-ddh | 1000 | 4000 | all but queries |
| nus-21 | 100 a class | 500 a class | all but queries |
| uniform:Q:T | Q | T | all but queries |
| uniform | 1000 | all but queries | all but queries |

nus-21 counts an image under the first of its labels. The release of DDH states 10000 training images in all, its
sibling BGAN 1000 queries; a class's share is inferred.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hashdist.errors import InvalidInput
from hashdist.order import mix64

Labels = Sequence[Sequence[int] | None] | NDArray[np.integer]
"""Labels of every row, as the column `labels` of a table gives them, or one class number a row."""


@dataclass(frozen=True)
class Split:
    """Rows of the three sets, int64, ascending.

    Args:
        query: rows asked for.
        train: rows learned from.
        database: rows searched.
        ids: int64 [N], ids of all rows.

    Raises:
        InvalidInput: a row is both query and database.
    """

    query: NDArray[np.int64]
    train: NDArray[np.int64]
    database: NDArray[np.int64]
    ids: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        shared = np.intersect1d(self.ids[self.query], self.ids[self.database])
        if len(shared):
            raise InvalidInput(
                f"queries must not be in the database, found {len(shared)} that are (the first id: {shared[0]}); "
                f"leave them out of one of the two"
            )

    def digest(self) -> str:
        """32 hex digits that name the three sets of ids, whatever the order of rows."""
        state = hashlib.blake2b(digest_size=16)
        for rows in (self.query, self.train, self.database):
            state.update(len(rows).to_bytes(8, "little") + np.sort(self.ids[rows]).astype("<i8").tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class _Counts:
    """How many images are drawn, per class or in all; train None = the whole database."""

    query: int
    train: int | None
    per_class: bool
    several_labels: bool = False


_PROTOCOLS = {
    "cifar-dsah": _Counts(100, 1000, True),
    "cifar-ddh-release": _Counts(100, 1000, True),
    "cifar-sadh": _Counts(100, 500, True),
    "cifar-csdh": _Counts(100, 500, True),
    "digits": _Counts(20, None, True),
    "flickr-dsah": _Counts(1000, 10_000, False),
    "flickr-sadh": _Counts(1000, 4000, False),
    "nus-dsah": _Counts(2100, 10_500, False),
    "nus-ddh": _Counts(1000, 4000, False),
    "nus-21": _Counts(100, 500, True, several_labels=True),
    "uniform": _Counts(1000, None, False),
}


def split(name: str, ids: NDArray[np.int64], labels: Labels | None, seed: int = 0) -> Split:
    """The split `name` of the images `ids`; give only images that have a feature.

    Args:
        name: one of the table above, or `uniform:Q:T`.
        ids: int64 [N], distinct, in any order.
        labels: [N]; one class a row where the protocol draws by class.
        seed: draws other images.

    Raises:
        InvalidInput: an unknown name, missing labels, several labels where one is needed, an id twice, or fewer
            images than are to be drawn.
    """
    counts = _counts(name)
    if len(np.unique(ids)) != len(ids):
        raise InvalidInput(f"ids must be distinct, found {len(ids) - len(np.unique(ids))} repeated ones")
    drawn = _drawing_order(ids, seed)
    groups = _by_class(name, counts, labels, drawn) if counts.per_class else {"all": drawn}
    for label, rows in groups.items():
        _check_enough(name, counts, label, len(rows))
    query = np.sort(np.concatenate([rows[: counts.query] for rows in groups.values()]))
    database = np.setdiff1d(np.arange(len(ids)), query)
    train = database
    if counts.train is not None:
        stop = counts.query + counts.train
        train = np.sort(np.concatenate([rows[counts.query : stop] for rows in groups.values()]))
    return Split(query, train, database, np.asarray(ids, np.int64))


def needs_labels(name: str) -> bool:
    """Whether the protocol draws by class. Raises InvalidInput for an unknown name."""
    return _counts(name).per_class


def _counts(name: str) -> _Counts:
    if name in _PROTOCOLS:
        return _PROTOCOLS[name]
    kind, _, numbers = name.partition(":")
    query, _, train = numbers.partition(":")
    if kind == "uniform" and query.isdecimal() and train.isdecimal() and int(query) and int(train):
        return _Counts(int(query), int(train), False)
    raise InvalidInput(
        f"a known protocol is required, found {name!r}; use one of {', '.join(_PROTOCOLS)}, or uniform:Q:T with the "
        f"numbers of queries and of training images"
    )


def _drawing_order(ids: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Rows in the order in which they are drawn."""
    key = mix64(np.array([seed], np.int64).astype(np.uint64))
    return np.argsort(mix64(mix64(ids.astype(np.uint64)) ^ key), kind="stable")


def _by_class(
    name: str, counts: _Counts, labels: Labels | None, drawn: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Rows of every class, in drawing order."""
    classes = _one_label(name, counts, labels, len(drawn))[drawn]
    return {str(label): drawn[classes == label] for label in np.unique(classes)}


def _one_label(name: str, counts: _Counts, labels: Labels | None, rows: int) -> NDArray[np.int64]:
    """The class under which each image is drawn."""
    if labels is None or len(labels) != rows:
        found = "none" if labels is None else f"{len(labels)} for {rows} images"
        raise InvalidInput(f"protocol {name} draws by class and needs the label of every image, found {found}")
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
        return labels.astype(np.int64)
    listed = [list(entry) if entry is not None else [] for entry in labels]
    wrong = [row for row, entry in enumerate(listed) if not entry or (len(entry) > 1 and not counts.several_labels)]
    if wrong:
        raise InvalidInput(
            f"protocol {name} needs {'a' if counts.several_labels else 'exactly one'} label an image, found "
            f"{len(wrong)} of {rows} images without (the first is row {wrong[0]}, with {len(listed[wrong[0]])} "
            f"labels); use a labelled collection, or uniform:Q:T"
        )
    return np.array([entry[0] for entry in listed], np.int64)


def _check_enough(name: str, counts: _Counts, label: str, found: int) -> None:
    needed = counts.query + (1 if counts.train is None else counts.train)
    if found < needed:
        where = f"class {label} has" if counts.per_class else "there are"
        raise InvalidInput(
            f"protocol {name} draws {counts.query} queries and {counts.train or 'the remaining'} training images"
            f"{' a class' if counts.per_class else ''}, but {where} only {found} images; use a protocol that needs "
            f"fewer, or more images"
        )
