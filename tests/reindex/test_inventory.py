"""Where the names of a collection come from: a listing in ranges, a file of changes, an inventory of S3."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.reindex import inventory
from hashdist.store import Entry, open_store


@pytest.mark.parametrize("known", [0, 3, 40, 400])
def test_ranges_list_every_object_once(root_uri: str, known: int) -> None:
    store = open_store(root_uri)
    names = sorted({f"{'abc'[i % 3]}/{i * 7919 % 1000:03d}{'é' * (i % 2)}.png" for i in range(150)})
    for name in names:
        store.put(name, b"x")
    sample = [name for number, name in enumerate(names * 3) if number % (450 // known) == 0] if known else []
    found = [entry.name for block in inventory.list_in_parallel(store, [*sample, "b", "zzz"]) for entry in block]
    assert sorted(found) == names


def test_cuts_are_even_and_distinct() -> None:
    names = [f"{i:04d}" for i in range(1000)]
    cuts = inventory.cuts(list(reversed(names)), 8)
    assert [names.index(cut) for cut in cuts] == [125 * i for i in range(1, 8)]
    assert inventory.cuts(["a"] * 50, 4) == []
    assert inventory.cuts([], 4) == []


def changes(path: Path, text: str) -> inventory.Changes:
    path.write_text(text)
    return inventory.read_changes(str(path))


def test_changes_are_read_from_text_and_parquet(tmp_path: Path) -> None:
    found = changes(tmp_path / "c", "a.png\nput\tb c.png\n\ndelete\td.png\n+\te.png\nremove\ta.png\nput\td.png\n")
    assert found == inventory.Changes(["b c.png", "d.png", "e.png"], ["a.png"])
    pq.write_table(pa.table({"key": ["x", "y"], "op": ["put", "deleted"]}), tmp_path / "c.parquet")
    assert inventory.read_changes((tmp_path / "c.parquet").as_uri()) == inventory.Changes(["x"], ["y"])
    with pytest.raises(InvalidInput, match=r"change 2: `put` or `delete` of a key is required, found 'mv' 'b'"):
        changes(tmp_path / "c", "a\nmv\tb\n")
    with pytest.raises(NotFound):
        inventory.read_changes(str(tmp_path / "nowhere"))


FIELDS = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
OBJECTS = [
    ("images/a b.png", "true", "false", 5, "e1"),
    ("images/é.png", "true", "false", 6, "e2"),
    ("images/old.png", "false", "false", 7, "e3"),
    ("images/gone.png", "true", "true", 0, ""),
    ("imagesque/no.png", "true", "false", 8, "e4"),
]


@pytest.mark.parametrize("form", ["CSV", "Parquet"])
def test_an_inventory_is_read_as_s3_writes_it(form: str, tmp_path: Path) -> None:
    name = "inv/bucket/daily/data/0.csv.gz" if form == "CSV" else "inv/bucket/daily/data/0.parquet"
    file = tmp_path / "daily" / "data" / name.rpartition("/")[2]
    manifest = tmp_path / "daily" / "2026-11-20T00-00Z" / "manifest.json"
    for path in (file, manifest):
        path.parent.mkdir(parents=True)
    if form == "CSV":
        quoted = [(k.replace(" ", "+").replace("é", "%C3%A9"), *rest) for k, *rest in OBJECTS]
        lines = [f'"bucket","{k}","v","{new}","{mark}","{size}","2026","{tag}"' for k, new, mark, size, tag in quoted]
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        keys, latest, marks, sizes, tags = zip(*OBJECTS, strict=True)
        table = {"bucket": ["bucket"] * 5, "key": keys, "size": sizes, "e_tag": tags}
        flags = {"is_latest": [x == "true" for x in latest], "is_delete_marker": [x == "true" for x in marks]}
        pq.write_table(pa.table({**table, **flags}), file)
    about = {"sourceBucket": "bucket", "fileFormat": form, "fileSchema": FIELDS, "creationTimestamp": "1700000000000"}
    manifest.write_text(json.dumps({**about, "files": [{"key": name, "size": 1}]}))
    found = inventory.read_inventory(str(manifest), open_store("s3://bucket/images"))
    assert found.time == 1_700_000_000
    assert [entry for block in found.blocks for entry in block] == [
        Entry("a b.png", 5, "e1", 0.0),
        Entry("é.png", 6, "e2", 0.0),
    ]
    with pytest.raises(InvalidInput, match="is an inventory of s3://bucket, but the collection is s3://other/images"):
        inventory.read_inventory(str(manifest), open_store("s3://other/images"))
    manifest.write_text(json.dumps({**about, "fileFormat": "ORC", "files": []}))
    with pytest.raises(InvalidInput, match="CSV or parquet is required, found ORC"):
        inventory.read_inventory(str(manifest), open_store("s3://bucket/images"))
    manifest.write_text("[]")
    with pytest.raises(InvalidInput, match=r"must be the manifest\.json of an S3 Inventory"):
        inventory.read_inventory(str(manifest), open_store("s3://bucket/images"))
