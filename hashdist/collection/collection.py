"""Collections of images: a listing, scanned and committed, from which later stages read.

`list_collection` looks at names, sizes and stamps only; their digest names the artefact. A scan
(hashdist/collection/readers/reader.py) then reads every image once, unit by unit, and `assemble` makes of the scanned
units the committed collection:

- `files`: the listing (schema LISTING), sorted by id, in files of one id prefix each;
- `units`: the same rows in the order of the sources, with what a reader needs to find the bytes again;
- `parts`: runs of rows of a unit: the unit of work, of retry and of resumption of every later stage.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashdist.collection.listing import Listing
from hashdist.collection.readers import FORMATS
from hashdist.collection.readers.reader import Lost, Reader, Unit, content_digest
from hashdist.collection.salts import apply_salts, column_of, partitions, prefix_bits, salts_of_units
from hashdist.collection.vocabulary import Labels, number_labels
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import ID_BITS, image_id, image_ids
from hashdist.ground.schema import LISTING, OK, slug
from hashdist.store import Entry, Store, open_store
from hashdist.store.base import joined
from hashdist.store.commit import Artefact, artefact, open_artefact, read_table, write_table

KIND = "collections"
REVISION = 1


class Image(NamedTuple):
    """An image of a collection; `data` is None, with a reason, where its bytes cannot be read."""

    id: int
    key: str
    digest: str | None
    labels: list[int] | None
    data: bytes | None
    reason: str | None


# Planning a scan


@dataclass(frozen=True)
class ScanPlan:
    """The work of a scan: units of one reader, and the salts that are known before it."""

    reader: Reader
    units: list[Unit]
    salts: dict[str, int]


def plan(listing: Listing, part_rows: int) -> ScanPlan:
    """Cut a listing into units. Parquet footers are read here; tars are not opened before their scan."""
    if part_rows < 1:
        raise InvalidInput(f"a part needs at least 1 row, found part_rows = {part_rows}")
    reader = FORMATS[listing.format].open(listing.store, listing.files, **listing.options)
    units = reader.units(part_rows)
    if not units:
        raise InvalidInput(
            f"{listing.uri}: at least one image is required, found {len(listing.files)} files without rows"
        )
    return ScanPlan(reader, units, dict(reader.salts))


# Assembling a collection from scanned units


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
    labels: Labels,
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
    ids = [column_of(target, unit, "id") for unit in units]
    salts = {**salts, **salts_of_units(target, units, ids)}
    rows = sum(len(part) for part in ids)
    bits = prefix_bits(rows)
    files, content = [], blake2b(digest_size=16)
    unreadable: Counter[str] = Counter()
    for partition in partitions(target, units, ids, bits, salts):
        table = partition.sort_by("id")
        listed = table.select(LISTING.names).set_column(
            3, LISTING.field("labels"), number_labels(table, labels.vocabulary)
        )
        files.append(write_table(target.store, target.new_name(".parquet"), listed.cast(LISTING)))
        _digest_rows(content, listed)
        reasons = listed.filter(pc.not_equal(listed["status"], OK))["reason"].to_pylist()
        unreadable.update(map(slug, reasons))
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
        rows = apply_salts(rows, self._salts)
        return rows.set_column(rows.schema.get_field_index("labels"), "labels", number_labels(rows, self._vocabulary))

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
        later = [key for key in keys if key not in listed]
        found.update({new.key: new.data for new in self._reader.read_keys(later) if isinstance(new.data, bytes)})
        return found

    def picture_uri(self, key: str) -> str:
        """Where the image of a key lies: FOLDER/KEY, or URI#KEY where files hold many images."""
        manifest = self.artefact.manifest()
        return joined(manifest["base"], key) if self._reader.files_are_images else f"{manifest['uri']}#{key}"

    def _rows_of(self, keys: list[str]) -> Iterator[pa.Table]:
        """Rows of the keys, by source; looked up in the listing by id, so a few of its files are read."""
        manifest = self.artefact.manifest()
        ids = image_ids(keys, self._salts)
        for prefix in np.unique(ids >> (ID_BITS - manifest["prefix_bits"])):
            listed = read_table(self.artefact.store, manifest["files"][prefix])
            listed = listed.filter(pc.is_in(listed["id"], pa.array(ids)))
            if self._reader.files_are_images:
                yield listed
                continue
            sources = set(listed["source"].to_pylist())
            for unit in self._units:
                if unit["source"] in sources:
                    yield self._among(unit, listed["id"])

    def _among(self, unit: Mapping[str, Any], ids: pa.ChunkedArray) -> pa.Table:
        rows = apply_salts(read_table(self.artefact.store, unit["file"]), self._salts)
        return rows.filter(pc.is_in(rows["id"], ids.combine_chunks()))

    def _images(self, rows: pa.Table) -> Iterator[Image]:
        present = pc.equal(rows["status"], OK)
        data = self._reader.read(rows.filter(present))
        columns = (rows[name].to_pylist() for name in ("id", "key", "digest", "labels", "reason"))
        for row, there in zip(zip(*columns, strict=True), present.to_pylist(), strict=True):
            id_, key, digest, labels, reason = row
            image = next(data) if there else Lost(reason)
            if isinstance(image, bytes) and self._reader.files_are_images and content_digest(image) != digest:
                image = Lost("changed: its bytes are not those that were listed; list the collection again")
            if isinstance(image, Lost):
                yield Image(id_, key, digest, labels, None, image.reason)
            else:
                yield Image(id_, key, digest, labels, image, None)


def open_collection(uri: str) -> Collection:
    """A committed collection by its URI. Raises NotFound, InvalidInput."""
    return Collection(open_artefact(uri, KIND))


def _reader(manifest: Mapping[str, Any]) -> Reader:
    """The reader of a committed collection, without reading anything. Raises InvalidInput for an unknown format."""
    name = manifest["format"]
    if name not in FORMATS:
        raise InvalidInput(
            f"{manifest['uri']}: a collection of the format {name!r} was listed, and this hashdist reads "
            f"{', '.join(FORMATS)}; use one that has this format"
        )
    stamps = zip(manifest["sources"], manifest["stamps"], strict=False)  # files that are images have no stamps here
    files = [Entry(source, size, stamp, 0.0) for source, (size, stamp) in stamps]
    return FORMATS[name].reopen(open_store(manifest["base"]), files, **manifest["options"])


def subset(root: Store, whole: Artefact, ids: Iterable[int]) -> Artefact:
    """The collection of some images of a committed one, committed, for a re-index to encode.

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
        rows = apply_salts(read_table(whole.store, unit["file"]), manifest["salts"])
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
