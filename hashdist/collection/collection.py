"""Collections of images: what is there (a listing), and the committed listing from which later stages read.

`list_collection` looks at names, sizes and stamps only; their digest names the artefact. A scan
(hashdist/collection/readers/reader.py) then reads every image once, unit by unit, and `assemble` makes of the scanned
units what is committed:

- `files`: the listing (schema LISTING), sorted by id, in files of one id prefix each;
- `units`: the same rows in the order of the sources, with what a reader needs to find the bytes again;
- `parts`: runs of rows of a unit: the unit of work, of retry and of resumption of every later stage.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.decode import EXTENSIONS
from hashdist.collection.readers.reader import (
    SCANNED,
    FolderReader,
    Lost,
    ParquetReader,
    Reader,
    TarReader,
    Unit,
    content_digest,
    is_hidden,
)
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import assign_salts, image_id, image_ids
from hashdist.ground.schema import LISTING, OK
from hashdist.ground.settings import CollectionSettings
from hashdist.store import Entry, Store, open_store
from hashdist.store.commit import Artefact, artefact, open_artefact, read_table, write_table

KIND = "collections"
REVISION = 1
PARTITION_ROWS = 262_144
"""Rows per file of the listing, about: the number of files is a power of two."""

Format = Literal["folder", "parquet", "webdataset"]
_ID_BITS = 63
_EXAMPLES = 3
_PARTITIONS_AT_ONCE = 8


class Image(NamedTuple):
    """An image of a collection; `data` is None, with a reason, where its bytes cannot be had."""

    id: int
    key: str
    digest: str | None
    labels: list[int] | None
    data: bytes | None
    reason: str | None


@dataclass(frozen=True)
class Listing:
    """What a collection consists of now, by name; no image has been read.

    Args:
        uri: canonical.
        format: of the files.
        store: the folder that names are relative to.
        files: the image, parquet or tar files, sorted by name.
        options: the settings that matter for reading: labels, id_column, image_column.
        digest: of all of it.
    """

    uri: str
    format: Format
    store: Store
    files: list[Entry]
    options: dict[str, Any]
    digest: str


# Listing


def list_collection(settings: CollectionSettings) -> Listing:
    """List the collection. Raises InvalidInput for one that is missing, empty, or of mixed formats."""
    whole = named_store(settings)
    store, name = split_file(whole)
    files = [entry for entry in whole.list() if not is_hidden(entry.name)]
    if not files and name:
        files = [entry for entry in store.list(name) if entry.name == name]
    else:
        store = whole
    kinds = kinds_of(files)
    chosen = chosen_format(whole.uri, Counter({kind: len(found) for kind, found in kinds.items()}), files, settings)
    found = kinds[chosen]
    options = reading_options(settings, chosen)
    return Listing(whole.uri, chosen, store, found, options, _listing_digest(chosen, options, found))


def reading_options(settings: CollectionSettings, chosen: Format) -> dict[str, Any]:
    """The settings that matter for reading a format."""
    options: dict[str, Any] = {"labels": settings.labels}
    if chosen == "parquet":
        options |= {"id_column": settings.id_column, "image_column": settings.image_column}
    return options


def named_store(settings: CollectionSettings) -> Store:
    """The store at the collection's URI. Raises InvalidInput where there is none."""
    if not settings.uri:
        raise InvalidInput(
            "a collection is required (a folder of images, parquet files or tars, local or s3://), found none; "
            "give --collection.uri"
        )
    return open_store(settings.uri)


def split_file(store: Store) -> tuple[Store, str]:
    """The folder and the file name, if the URI is one of a single file."""
    base, _, name = store.uri.rpartition("/")
    return (open_store(base), name) if PurePosixPath(name).suffix else (store, "")


def kinds_of(files: Iterable[Entry]) -> dict[Format, list[Entry]]:
    """Files by the format that their extension tells, those of none left out."""
    kinds: dict[Format, list[Entry]] = {"folder": [], "parquet": [], "webdataset": []}
    for entry in files:
        kind = _kind(entry.name)
        if kind:
            kinds[kind].append(entry)
    return kinds


def chosen_format(uri: str, counts: Counter[Format], others: Iterable[Entry], settings: CollectionSettings) -> Format:
    """The format of a collection with so many files of each. Raises InvalidInput unless it is one.

    `others`: some of the files, for the message where none is of a format.
    """
    wanted = settings.format
    present = [kind for kind, count in counts.items() if count and wanted in ("auto", kind)]
    if len(present) == 1:
        return present[0]
    if present:
        raise InvalidInput(
            f"{uri}: files of one format are required, found "
            f"{' and '.join(f'{counts[kind]} for {kind}' for kind in present)}; choose with --collection.format"
        )
    seen = Counter(PurePosixPath(entry.name).suffix.lower() or "no extension" for entry in others)
    met = ", ".join(f"{count} x {suffix}" for suffix, count in seen.most_common(5))
    needed = "images, parquet files or tars" if wanted == "auto" else f"files of the format {wanted!r}"
    advice = "; unpack compressed tars first" if any(s in seen for s in (".gz", ".tgz", ".zst", ".bz2", ".xz")) else ""
    raise InvalidInput(
        f"{uri}: {needed} are required, found {met or 'nothing there'}{advice}; check --collection.uri "
        f"(images are recognised by extension: {' '.join(sorted(EXTENSIONS))})"
    )


def _kind(name: str) -> Format | None:
    suffix = name[name.rfind(".") :].lower() if "." in name else ""  # there may be 10**9 names: no path objects
    if suffix in EXTENSIONS:
        return "folder"
    return {".parquet": "parquet", ".tar": "webdataset"}.get(suffix)  # type: ignore[return-value]


def _listing_digest(chosen: Format, options: dict[str, Any], files: list[Entry]) -> str:
    state = blake2b(repr((chosen, sorted(options.items()))).encode(), digest_size=16)
    for entry in files:
        state.update(f"{entry.name}\0{entry.size}\0{entry.stamp}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


# Planning: what is scanned, and under which ids


@dataclass(frozen=True)
class Plan:
    """What a scan does: units of one reader, and the salts that are known before it."""

    reader: Reader
    units: list[Unit]
    salts: dict[str, int]


def plan(listing: Listing, part_rows: int) -> Plan:
    """Cut a listing into units. Parquet footers are read here; tars are not opened before their scan."""
    if part_rows < 1:
        raise InvalidInput(f"a part needs at least 1 row, found part_rows = {part_rows}")
    if listing.format == "folder":
        rows, salts = _folder_rows(listing.files)
        reader: Reader = FolderReader(listing.store, rows, listing.options["labels"])
        return Plan(reader, reader.units(part_rows), salts)
    if listing.format == "parquet":
        reader = ParquetReader.open(listing.store, listing.files, **listing.options)
    else:
        reader = TarReader(listing.store, listing.files, listing.options["labels"])
    units = reader.units(part_rows)
    if not units:
        raise InvalidInput(
            f"{listing.uri}: at least one image is required, found {len(listing.files)} files without rows"
        )
    return Plan(reader, units, {})


def _folder_rows(files: list[Entry]) -> tuple[pa.Table, dict[str, int]]:
    """id, key, size, stamp sorted by id."""
    # names that are not UTF-8 cannot be keys; escaped, they are rows that will not be found
    keys = [entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for entry in files]
    ids = image_ids(keys)
    salts = _salts(ids, lambda rows: [keys[row] for row in rows], lambda: keys)
    if salts:
        ids = image_ids(keys, salts)
    table = pa.table(
        [ids, keys, [entry.size for entry in files], [entry.stamp for entry in files]],
        schema=pa.schema([LISTING.field(name) for name in ("id", "key", "size", "stamp")]),
    )
    return table.take(np.argsort(ids)), salts


def _salts(ids: NDArray[np.int64], keys_at: Any, all_keys: Any) -> dict[str, int]:
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
            f"{', '.join(map(repr, sorted(twice)[:_EXAMPLES]))}; rename them, or choose another id column"
        )
    salts = assign_salts(keys)
    salted = np.array([image_id(key, salt) for key, salt in salts.items()], np.int64)
    return assign_salts(all_keys()) if np.isin(salted, ids).any() else salts


# Assembling: from scanned units to what is committed


def write_unit(target: Artefact, unit: Unit, rows: pa.Table, part_rows: int) -> dict[str, Any]:
    """Write a scanned unit; returns the record of it."""
    names = pc.unique(pc.list_flatten(rows["names"])).to_pylist()
    return {
        "file": write_table(target.store, target.new_name(".parquet"), rows, row_group_rows=part_rows),
        "source": unit.source,
        "start": unit.start,
        "rows": len(rows),
        "names": sorted(names),
    }


def assemble(
    target: Artefact,
    units: Sequence[Mapping[str, Any]],
    *,
    salts: Mapping[str, int],
    labels: "Labels",
    part_rows: int,
) -> dict[str, Any]:
    """Write the listing of scanned units; returns the fields of the manifest that follow from them.

    Memory: the ids of all rows, and the rows of a few partitions.

    Args:
        target: the artefact that is being made.
        units: records of `write_unit`, in source order.
        salts: those known already.
        labels: see `label_numbers`.
        part_rows: rows per part at most.

    Raises InvalidInput for two images with one key.
    """
    ids = [_column(target, unit, "id") for unit in units]
    salts = {**salts, **_found_salts(target, units, ids)}
    rows = sum(len(part) for part in ids)
    bits = max(0, (max(rows, 1) - 1) // PARTITION_ROWS).bit_length()
    files, content = [], blake2b(digest_size=16)
    unreadable: Counter[str] = Counter()
    for partition in _partitions(target, units, ids, bits, salts):
        table = partition.sort_by("id")
        listed = table.select(LISTING.names).set_column(3, LISTING.field("labels"), numbered(table, labels.vocabulary))
        files.append(write_table(target.store, target.new_name(".parquet"), listed.cast(LISTING)))
        _digest_rows(content, listed)
        reasons = listed.filter(pc.not_equal(listed["status"], OK))["reason"].to_pylist()
        unreadable.update(str(reason).partition(":")[0] for reason in reasons)
    return {
        "rows": rows,
        "failed": unreadable.total(),
        "unreadable": dict(unreadable),
        "files": files,
        "prefix_bits": bits,
        "units": [{key: unit[key] for key in ("file", "source", "start", "rows")} for unit in units],
        "parts": [part for number, unit in enumerate(units) for part in _parts(number, unit, part_rows)],
        "salts": dict(salts),
        "classes": labels.classes,
        "vocabulary": labels.vocabulary,
        "content_digest": content.hexdigest(),
    }


def _column(target: Artefact, unit: Mapping[str, Any], name: str) -> Any:
    return read_table(target.store, unit["file"], [name])[name].to_numpy()


def _found_salts(
    target: Artefact, units: Sequence[Mapping[str, Any]], ids: Sequence[NDArray[np.int64]]
) -> dict[str, int]:
    bounds = np.cumsum([0, *[len(part) for part in ids]])

    def keys_at(rows: NDArray[np.int64]) -> list[str]:
        keys: list[str] = []
        for number in np.unique(np.searchsorted(bounds, rows, side="right") - 1):
            here = rows[(rows >= bounds[number]) & (rows < bounds[number + 1])] - bounds[number]
            keys += list(_column(target, units[number], "key")[here])
        return keys

    def all_keys() -> Iterator[str]:
        for unit in units:
            yield from _column(target, unit, "key")

    return _salts(np.concatenate([*ids, np.empty(0, np.int64)]), keys_at, all_keys)


def _partitions(
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
            prefixes = unit_ids >> (_ID_BITS - bits)
            # a salted id may lie elsewhere, so units are looked into whenever there are salts
            if salts or ((prefixes >= first) & (prefixes < last)).any():
                table = salted(read_table(target.store, unit["file"]), salts)
                prefixes = table["id"].to_numpy() >> (_ID_BITS - bits)
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


class Labels(NamedTuple):
    """The number of each label that the source gives as text, and the names of the numbers."""

    vocabulary: dict[str, int]
    classes: list[str]


def label_numbers(reader: Reader, units: Sequence[Mapping[str, Any]]) -> Labels:
    """Numbers for the labels that a scan has found: in the order of their names, over the whole collection.

    Names that the source's own metadata numbers keep those numbers; the texts in a tar that are all numbers are
    those numbers, since a tar has no other way to give any.
    """
    names = sorted({name for unit in units for name in unit["names"]})
    classes = reader.classes()
    if reader.format == "webdataset" and all(name.isdecimal() for name in names):
        return Labels({name: int(name) for name in names}, classes)
    if set(names) <= set(classes):
        return Labels({name: classes.index(name) for name in names}, classes)
    return Labels({name: number for number, name in enumerate(names)}, names)


def extended(vocabulary: Mapping[str, int], names: Iterable[str], reader: Reader) -> dict[str, int]:
    """The numbers of labels given as text, with numbers for those that have none yet; numbers once given stay.

    The first numbers of all are those that `label_numbers` gives; later names follow the largest number, in order.
    """
    if not vocabulary:
        return label_numbers(reader, [{"names": list(names)}]).vocabulary
    new = sorted(set(names) - vocabulary.keys())
    if reader.format == "webdataset" and all(name.isdecimal() for name in [*vocabulary, *new]):
        return {**vocabulary, **{name: int(name) for name in new}}
    return {**vocabulary, **{name: number for number, name in enumerate(new, max(vocabulary.values()) + 1)}}


def numbered(table: pa.Table, vocabulary: Mapping[str, int]) -> pa.ChunkedArray:
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


def _digest_rows(state: Any, listed: pa.Table) -> None:
    """Add (id, key, digest, labels) of rows sorted by id: equal for equal content, however it is stored."""
    for batch in listed.to_batches(max_chunksize=65_536):
        labels = pc.binary_join(batch["labels"].cast(pa.list_(pa.string())), ",")
        columns = [batch["id"].cast(pa.string()), batch["key"], batch["digest"], labels, pa.scalar("\n")]
        lines = pc.binary_join_element_wise(*columns, "\0", null_handling="replace", null_replacement="-")
        state.update("".join(lines.to_pylist()).encode())


def _parts(number: int, unit: Mapping[str, Any], part_rows: int) -> Iterator[dict[str, int]]:
    for first in range(0, unit["rows"], part_rows):
        rows = min(part_rows, unit["rows"] - first)
        start = unit["start"] + first
        yield {
            "unit": number,
            "first": first,
            "source": unit["source"],
            "start": start,
            "stop": start + rows,
            "rows": rows,
        }


# Reading a committed collection


class Collection:
    """A committed collection, for stages that read images. Picklable with its artefact.

    Args:
        artefact: of kind `collections`.
    """

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        manifest = artefact.manifest()
        self._parts: list[dict[str, int]] = manifest["parts"]
        self._units: list[dict[str, Any]] = manifest["units"]
        self._salts: dict[str, int] = manifest["salts"]
        self._vocabulary: dict[str, int] = manifest["vocabulary"]
        self._reader = _reader(manifest)
        self.parts = len(self._parts)
        self.rows: int = manifest["rows"]

    def table(self, part: int) -> pa.Table:
        """The rows of a part without their images: schema SCANNED, labels numbered, in the order `read` has."""
        place = self._parts[part]
        span = (place["first"], place["first"] + place["rows"])
        rows = read_table(self.artefact.store, self._units[place["unit"]]["file"], None, span)
        rows = salted(rows, self._salts)
        return rows.set_column(rows.schema.get_field_index("labels"), "labels", numbered(rows, self._vocabulary))

    def read(self, part: int, ids: NDArray[np.int64] | None = None) -> Iterator[Image]:
        """The images of a part, or those with these ids, in source order; memory: a few requests' worth of bytes.

        Raises InvalidInput where a parquet file or tar is not the one that was listed; a single image that is gone
        or changed comes without data, with the reason.
        """
        rows = self.table(part)
        yield from self._images(rows if ids is None else rows.filter(pc.is_in(rows["id"], pa.array(ids))))

    def fetch(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Encoded bytes of some images by key, for showing them; cost: a few requests for each image.

        Keys that the collection does not have, and images that cannot be read, are left out; in a folder, an image
        that came after the listing is read by its key. Raises as `read`.
        """
        found: dict[str, bytes] = {}
        listed: set[str] = set()
        for rows in self._rows_of(list(keys)):
            listed.update(rows["key"].to_pylist())
            found.update({image.key: image.data for image in self._images(rows) if image.data is not None})
        if isinstance(self._reader, FolderReader):
            later = [key for key in keys if key not in listed]
            found.update({k: data for k, data in self._reader.read_keys(later) if isinstance(data, bytes)})
        return found

    def _rows_of(self, keys: list[str]) -> Iterator[pa.Table]:
        """Rows of the keys, by source; looked up in the listing by id, so a few of its files are read."""
        manifest = self.artefact.manifest()
        ids = image_ids(keys, self._salts)
        for prefix in np.unique(ids >> (_ID_BITS - manifest["prefix_bits"])):
            listed = read_table(self.artefact.store, manifest["files"][prefix])
            listed = listed.filter(pc.is_in(listed["id"], pa.array(ids)))
            if self._reader.format == "folder":
                yield listed
                continue
            sources = set(listed["source"].to_pylist())
            for unit in self._units:
                if unit["source"] in sources:
                    yield self._among(unit, listed["id"])

    def _among(self, unit: Mapping[str, Any], ids: pa.ChunkedArray) -> pa.Table:
        rows = salted(read_table(self.artefact.store, unit["file"]), self._salts)
        return rows.filter(pc.is_in(rows["id"], ids.combine_chunks()))

    def _images(self, rows: pa.Table) -> Iterator[Image]:
        present = pc.equal(rows["status"], OK)
        data = self._reader.read(rows.filter(present))
        columns = (rows[name].to_pylist() for name in ("id", "key", "digest", "labels", "reason"))
        for row, there in zip(zip(*columns, strict=True), present.to_pylist(), strict=True):
            id_, key, digest, labels, reason = row
            image = next(data) if there else Lost(reason)
            if isinstance(image, bytes) and self._reader.format == "folder" and content_digest(image) != digest:
                image = Lost("changed: its bytes are not those that were listed; list the collection again")
            if isinstance(image, Lost):
                yield Image(id_, key, digest, labels, None, image.reason)
            else:
                yield Image(id_, key, digest, labels, image, None)


def open_collection(uri: str) -> Collection:
    """A committed collection by its URI. Raises NotFound, InvalidInput."""
    return Collection(open_artefact(uri, KIND))


def _reader(manifest: Mapping[str, Any]) -> Reader:
    """The reader of a committed collection, without reading anything."""
    store, options = open_store(manifest["base"]), manifest["options"]
    if manifest["format"] == "folder":
        return FolderReader(store, SCANNED.empty_table(), options["labels"])
    files = [
        Entry(name, size, stamp, 0.0)
        for name, (size, stamp) in zip(manifest["sources"], manifest["stamps"], strict=True)
    ]
    if manifest["format"] == "parquet":
        return ParquetReader(store, files, options["id_column"], options["image_column"], options["labels"])
    return TarReader(store, files, options["labels"])


def described(listing: Listing) -> dict[str, Any]:
    """The manifest's fields that say where the images lie."""
    files = [] if listing.format == "folder" else listing.files
    return {
        "uri": listing.uri,
        "base": listing.store.uri,
        "format": listing.format,
        "options": listing.options,
        "sources": [entry.name for entry in files] or ["."],
        "stamps": [[entry.size, entry.stamp] for entry in files],
    }


def subset(root: Store, whole: Artefact, ids: Iterable[int]) -> Artefact:
    """The collection of some images of a committed one, committed: what a re-index encodes.

    Args:
        root: of the artefacts.
        whole: a committed collection.
        ids: of the images; order and repetition do not matter.

    Raises InvalidInput for an id that is not in `whole`.
    """
    wanted = np.unique(np.fromiter(ids, np.int64))
    manifest = whole.manifest()
    inputs = {
        "collection": manifest["content_digest"],
        "uri": whole.uri,
        "ids": blake2b(wanted.tobytes(), digest_size=16).hexdigest(),
    }
    made = artefact(root, KIND, inputs=inputs, settings={}, revision=REVISION)
    if made.exists():
        return made
    part_rows = max([part["rows"] for part in manifest["parts"]], default=1)
    units = []
    for unit in manifest["units"]:
        rows = salted(read_table(whole.store, unit["file"]), manifest["salts"])
        rows = rows.filter(pc.is_in(rows["id"], pa.array(wanted)))
        if len(rows):
            units.append(write_unit(made, Unit(unit["source"], 0, None), rows, part_rows))
    found = sum(unit["rows"] for unit in units)
    if found != len(wanted):
        raise InvalidInput(f"{whole.uri} must hold the {len(wanted)} ids that were asked for, found {found} of them")
    salts = {key: salt for key, salt in manifest["salts"].items() if image_id(key, salt) in set(wanted.tolist())}
    # labels keep the numbers they have in the whole
    labels = Labels(manifest["vocabulary"], manifest["classes"])
    fields = assemble(made, units, salts=salts, labels=labels, part_rows=part_rows)
    kept = {name: manifest[name] for name in ("uri", "base", "format", "options", "sources", "stamps", "settings")}
    lineage = {
        "stage": "collection",
        "inputs": {"collection": {"uri": whole.uri, "digest": manifest["content_digest"]}},
    }
    made.publish({**kept, **fields, **lineage})
    return made
