"""Objects of a collection as it is now, in blocks and in bounded memory: by LIST, from an S3 Inventory, or by a list
of changes.

A LIST is cut at keys that are known to lie evenly among the names (the index has them), and the ranges are listed at
the same time; so it needs no folders to be parallel. An inventory is a report that S3 writes once a day
(manifest.json and CSV or parquet files): reading it costs a request a file instead of one per thousand objects.
"""

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice, takewhile
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.ids import image_ids
from hashdist.ground.threads import in_order
from hashdist.store import Entry, Store, of_file

LISTED = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("stamp", pa.string()),
    ]
)
"""An image as a listing shows it."""

BLOCK = 8192
"""Entries of a block."""

_REMOTE_RANGES, _LOCAL_RANGES = 16, 4
_HEADS = 32  # requests at once for the objects of a list of changes

Op = Literal["put", "delete"]
_OPS: dict[str, Op] = {
    **dict.fromkeys(("put", "add", "added", "change", "changed", "create", "update", "+"), "put"),
    **dict.fromkeys(("delete", "deleted", "remove", "removed", "-"), "delete"),
}

Blocks = Iterator[list[Entry]]


def list_in_parallel(store: Store, sample: Sequence[str] = ()) -> Blocks:
    """Every object of a store, in blocks, in no order; as many LISTs at once as `sample` allows.

    Args:
        store: folder or prefix.
        sample: names drawn evenly from those that are expected; any will do, better ones make more even ranges.
    """
    remote = store.local_path("any") is None
    bounds = cuts(sample, _REMOTE_RANGES if remote else _LOCAL_RANGES)
    ranges = [_range(store, after, last) for after, last in zip(["", *bounds], [*bounds, None], strict=True)]
    with ThreadPoolExecutor(len(ranges)) as pool:
        running: dict[Future[list[Entry]], Iterator[Entry]] = {}
        try:
            running = {pool.submit(_block, entries): entries for entries in ranges}
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    entries, block = running.pop(future), future.result()
                    if block:
                        running[pool.submit(_block, entries)] = entries
                        yield block
        finally:
            for future in running:
                future.cancel()


def cuts(sample: Sequence[str], ranges: int) -> list[str]:
    """Distinct names that cut a sample into `ranges` ranges of equal counts, ascending; fewer for a small sample."""
    names = sorted(set(sample), key=os.fsencode)
    picked = [names[len(names) * cut // ranges] for cut in range(1, ranges)] if len(names) >= ranges else []
    return list(dict.fromkeys(picked))


def _range(store: Store, after: str, last: str | None) -> Iterator[Entry]:
    """Objects with after < name <= last, in the order of their UTF-8 bytes."""
    entries = store.list(start_after=after)
    if last is None:
        return entries
    stop = os.fsencode(last)
    return takewhile(lambda entry: os.fsencode(entry.name) <= stop, entries)


def _block(entries: Iterator[Entry]) -> list[Entry]:
    return list(islice(entries, BLOCK))


def listed_rows(entries: Sequence[Entry], salts: Mapping[str, int]) -> pa.Table:
    """Entries of image files as rows LISTED.

    Names that are not UTF-8 cannot be keys; escaped, they are rows that will not be found.
    """
    keys = [entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for entry in entries]
    sizes, stamps = [entry.size for entry in entries], [entry.stamp for entry in entries]
    return pa.table([image_ids(keys, salts), keys, sizes, stamps], schema=LISTED)


# A report instead of a LIST


class Inventory(NamedTuple):
    """An S3 Inventory: which objects a bucket had when the report was begun.

    Attributes:
        time: ISO 8601, of the report's beginning; None if it does not say.
        blocks: the objects under the collection's prefix.
    """

    time: float | None
    blocks: Blocks


def read_inventory(uri: str, collection: Store) -> Inventory:
    """The inventory whose manifest.json lies at `uri` (local or s3://).

    Args:
        uri: of manifest.json; its files are looked for where the manifest says, in the same bucket, or beside it.
        collection: s3:// prefix that the collection lies at; other objects of the report are left out.

    Raises InvalidInput for what is no inventory of that bucket, or lacks a column. NotFound: the manifest, its files.
    """
    store, name = of_file(uri)
    try:
        manifest = json.loads(store.get(name))
        bucket, form, files = manifest["sourceBucket"], manifest["fileFormat"].lower(), manifest["files"]
        columns = [column.strip() for column in str(manifest.get("fileSchema", "")).split(",")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{uri} must be the manifest.json of an S3 Inventory, with sourceBucket, fileFormat, fileSchema and files: "
            f"{error!r}"
        ) from error
    if form not in ("csv", "parquet"):
        raise InvalidInput(f"{uri}: an inventory in CSV or parquet is required, found {manifest['fileFormat']}")
    base = f"s3://{bucket}"
    if not f"{collection.uri}/".startswith(f"{base}/"):
        raise InvalidInput(f"{uri} is an inventory of {base}, but the collection is {collection.uri}")
    prefix = f"{collection.uri}/".removeprefix(f"{base}/")
    created = manifest.get("creationTimestamp")

    def blocks() -> Blocks:
        for data in in_order(lambda file: _file_of(store, name, file["key"]), files, 2):
            rows = _parquet_rows(data, uri) if form == "parquet" else _csv_rows(data, columns, uri)
            entries = (entry for row in rows if (entry := _entry_of(row, prefix)))
            while block := list(islice(entries, BLOCK)):
                yield block

    return Inventory(float(created) / 1000 if created else None, blocks())


def _file_of(store: Store, manifest: str, key: str) -> bytes:
    """A file of an inventory: under its key in the destination bucket, else beside the manifest or in ../data."""
    file, bucket = key.rpartition("/")[2], store.bucket()
    places = [(store, key), (store, file), (store.as_file()[0], f"data/{file}")]
    for where, name in [*([(bucket, key)] if bucket else []), *places]:
        try:
            return where.get(name)
        except NotFound:
            continue
    raise NotFound(f"{store.uri}/{manifest} names {key}, but it is neither in that bucket nor beside the manifest")


def _csv_rows(data: bytes, columns: Sequence[str], uri: str) -> Iterator[dict[str, Any]]:
    _require(columns, uri)
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    for values in csv.reader(io.StringIO(text.decode(), newline="")):
        row = dict(zip(columns, values, strict=False))
        yield {**row, "Key": unquote_plus(row["Key"])}  # CSV inventories carry URL-encoded keys, parquet ones plain


_PARQUET_NAMES = {"key": "Key", "size": "Size", "e_tag": "ETag", "is_latest": "IsLatest"}


def _parquet_rows(data: bytes, uri: str) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(pa.BufferReader(data))
    names = {**_PARQUET_NAMES, "is_delete_marker": "IsDeleteMarker"}
    present = [name for name in file.schema_arrow.names if name in names]
    _require([names[name] for name in present], uri)
    for batch in file.iter_batches(BLOCK, columns=present):
        for row in batch.to_pylist():
            yield {names[name]: value for name, value in row.items()}


def _require(columns: Sequence[str], uri: str) -> None:
    missing = {"Key", "Size", "ETag"} - set(columns)
    if missing:
        raise InvalidInput(
            f"{uri}: the inventory must have the fields Key, Size and ETag, {', '.join(sorted(missing))} missing; add "
            "them to its configuration"
        )


def _entry_of(row: Mapping[str, Any], prefix: str) -> Entry | None:
    """The entry of a row under the prefix; None for others, for old versions and for marks of deletion."""
    name = row["Key"]
    old = str(row.get("IsLatest", "true")).lower() == "false" or str(row.get("IsDeleteMarker", "")).lower() == "true"
    if old or not name.startswith(prefix) or name.endswith("/"):
        return None
    return Entry(name.removeprefix(prefix), int(row["Size"] or 0), str(row["ETag"]).strip('"'), 0.0)


# A list of changes instead of a LIST


class Changes(NamedTuple):
    """Names that were written, and names that were removed, since the index was brought up to date.

    Attributes:
        put: keys, distinct.
        deleted: keys, distinct, none of them in `put`.
    """

    put: list[str]
    deleted: list[str]


def read_changes(uri: str) -> Changes:
    """A list of changes; of several about one key the last holds.

    Args:
        uri: a parquet file with the columns `key` and `op`, or text with a line a change: the key, or `op<TAB>key`.
            `op` is put or delete (add, change, remove and the like are understood); a key alone is a put.

    Raises InvalidInput for another `op`, or an empty key. NotFound.
    """
    store, name = of_file(uri)
    data = store.get(name)
    last: dict[str, Op] = {}
    for number, (op, key) in enumerate(_parquet_changes(data, uri) if data[:4] == b"PAR1" else _text_changes(data), 1):
        known = _OPS.get(op.strip().lower())
        if known is None or not key:
            raise InvalidInput(f"{uri}, change {number}: `put` or `delete` of a key is required, found {op!r} {key!r}")
        last[key] = known
    return Changes([k for k, op in last.items() if op == "put"], [k for k, op in last.items() if op == "delete"])


def _text_changes(data: bytes) -> Iterator[tuple[str, str]]:
    for line in data.decode().splitlines():
        if line.strip():
            op, tab, key = line.partition("\t")
            yield (op, key) if tab else ("put", line)


def _parquet_changes(data: bytes, uri: str) -> Iterator[tuple[str, str]]:
    found = pq.read_table(pa.BufferReader(data))
    if "key" not in found.column_names:
        raise InvalidInput(f"{uri}: a list of changes needs the columns key and op, found {found.column_names}")
    ops: Iterable[Any] = found["op"].to_pylist() if "op" in found.column_names else ["put"] * len(found)
    for op, key in zip(ops, found["key"].to_pylist(), strict=True):
        yield str(op), str(key or "")


def look_up(store: Store, names: Iterable[str]) -> Blocks:
    """The entries of these objects, a request each, many at once; those that do not exist are left out."""

    def stat(name: str) -> Entry | None:
        try:
            return store.stat(name)
        except NotFound:
            return None

    found = (entry for entry in in_order(stat, names, _HEADS) if entry)
    while block := list(islice(found, BLOCK)):
        yield block
