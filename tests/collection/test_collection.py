"""Collections of every format: what is listed, scanned, committed and read again, against what was written."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from hashdist.collection import salts as salting
from hashdist.collection.collection import (
    Collection,
    open_collection,
    subset,
)
from hashdist.collection.readers.reader import content_digest
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_id
from hashdist.ground.schema import LISTING, OK
from hashdist.ground.settings import CollectionSettings
from hashdist.store import open_store
from hashdist.store.commit import read_table
from tests.worlds.collection import WRITERS, commit, everything, expected_key, jpeg, listed


def test_every_image_is_read_once_with_its_key_id_digest_and_label(
    form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path
) -> None:
    uri = WRITERS[form](tmp_path / "in", images)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri, part_rows=4))
    manifest = target.manifest()
    assert (manifest["format"], manifest["rows"], manifest["failed"]) == (form, 25, 0)
    assert manifest["classes"] == ["ant", "cat", "dog"]
    assert sum(part["rows"] for part in manifest["parts"]) == 25
    assert max(part["rows"] for part in manifest["parts"]) <= 4
    collection = Collection(target)
    found = {image.key: image for image in everything(collection)}
    assert len(found) == 25
    for key, (data, label) in images.items():
        image = found[expected_key(form, key, label)]
        assert image.data == data
        assert image.digest == content_digest(data)
        assert image.id == image_id(image.key)
        assert image.labels == [["ant", "cat", "dog"].index(label)]
        assert image.reason is None


def test_listing_is_sorted_by_id_and_complete(form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    uri = WRITERS[form](tmp_path / "in", images)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri, part_rows=4))
    table = listed(target)
    assert table.schema.equals(LISTING)
    assert (np.diff(table["id"].to_numpy()) > 0).all()
    assert table["size"].to_pylist() == [
        len(image.data) for image in sorted(everything(Collection(target))) if image.data
    ]
    assert set(table["status"].to_pylist()) == {OK}
    assert None not in table["stamp"].to_pylist()


def test_content_digest_depends_on_content_alone(
    form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path
) -> None:
    def content(name: str, some: dict[str, tuple[bytes, str]], part_rows: int) -> Any:
        uri = WRITERS[form](tmp_path / name, some)
        return commit(str(tmp_path / f"root-{name}"), CollectionSettings(uri=uri, part_rows=part_rows)).manifest()[
            "content_digest"
        ]

    first = content("a", images, 4)
    assert content("b", dict(reversed(images.items())), 9) == first
    other = {**images, "img-003": (jpeg(1), images["img-003"][1])}
    assert content("c", other, 4) != first


def test_partitions_hold_one_id_prefix_each(
    form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = WRITERS[form](tmp_path / "in", images)
    whole = commit(str(tmp_path / "one"), CollectionSettings(uri=uri, part_rows=4))
    monkeypatch.setattr(salting, "PARTITION_ROWS", 2)
    monkeypatch.setattr(salting, "_PARTITIONS_AT_ONCE", 3)
    target = commit(str(tmp_path / "many"), CollectionSettings(uri=uri, part_rows=4))
    manifest = target.manifest()
    assert (manifest["prefix_bits"], len(manifest["files"])) == (4, 16)
    for prefix, entry in enumerate(manifest["files"]):
        ids = read_table(target.store, entry, ["id"])["id"].to_numpy()
        assert (ids >> (63 - 4) == prefix).all()
    assert listed(target).equals(listed(whole))
    assert manifest["content_digest"] == whole.manifest()["content_digest"]


def test_colliding_ids_get_salts_everywhere(
    form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few_ids(key: str, salt: int = 0) -> int:
        return image_id(key, salt) % 60

    for module in ("ground.ids", "collection.collection", "collection.salts", "collection.readers.reader"):
        monkeypatch.setattr(f"hashdist.{module}.image_id", few_ids)
    uri = WRITERS[form](tmp_path / "in", images)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri, part_rows=4))
    salts = target.manifest()["salts"]
    assert salts
    ids = listed(target)["id"].to_numpy()
    assert (np.diff(ids) > 0).all()
    found = everything(Collection(target))
    assert sorted(image.id for image in found) == ids.tolist()
    assert all(image.id == few_ids(image.key, salts.get(image.key, 0)) for image in found)
    part = subset(open_store(str(tmp_path / "root")), target, [image.id for image in found if image.key in salts])
    assert {image.key for image in everything(Collection(part))} == set(salts)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_duplicate_keys_are_refused(form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    base = tmp_path / "in"
    WRITERS[form](base, images)
    suffix = {"parquet": "parquet", "webdataset": "tar"}[form]
    (base / f"2.{suffix}").write_bytes((base / f"1.{suffix}").read_bytes())
    with pytest.raises(InvalidInput, match=r"every image must have its own key, found 18 keys more than once.*img-007"):
        commit(str(tmp_path / "root"), CollectionSettings(uri=str(base), part_rows=4))


def test_single_images_are_fetched_by_key(
    form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(salting, "PARTITION_ROWS", 4)
    uri = WRITERS[form](tmp_path / "in", images)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri, part_rows=4))
    collection = open_collection(target.uri)
    wanted = {expected_key(form, key, label): data for key, (data, label) in list(images.items())[3:20:5]}
    assert collection.fetch(wanted) == wanted
    assert collection.fetch([*wanted, "no such key"]) == wanted
    assert collection.fetch([]) == {}
    if form == "folder":
        (tmp_path / "in" / next(iter(wanted))).unlink()
        assert collection.fetch(wanted) == dict(list(wanted.items())[1:])


def test_subset_holds_exactly_the_images_asked_for(
    form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path
) -> None:
    uri = WRITERS[form](tmp_path / "in", images)
    root = str(tmp_path / "root")
    target = commit(root, CollectionSettings(uri=uri, part_rows=4))
    by_id = {image.id: image for image in everything(Collection(target))}
    wanted = sorted(by_id)[3:20:4]
    part = subset(open_store(root), target, wanted)
    assert {image.id: image for image in everything(Collection(part))} == {id_: by_id[id_] for id_ in wanted}
    assert listed(part)["id"].to_pylist() == wanted
    assert listed(part)["labels"].to_pylist() == [by_id[id_].labels for id_ in wanted]
    assert subset(open_store(root), target, reversed(wanted)).uri == part.uri
    with pytest.raises(InvalidInput, match="found 0 of them"):
        subset(open_store(root), target, [12])


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_single_file_is_a_collection(form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    base = tmp_path / "in"
    WRITERS[form](base, images)
    name = {"parquet": "1.parquet", "webdataset": "1.tar"}[form]
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=str(base / name), part_rows=4))
    assert {image.key for image in everything(Collection(target))} == set(list(images)[7:])


# Both stores


def test_on_s3_as_on_disk(form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path, s3_endpoint: str) -> None:
    local = Path(WRITERS[form](tmp_path / "in", images))
    here = commit(str(tmp_path / "root"), CollectionSettings(uri=str(local), part_rows=4))
    base = f"s3://hashdist/{tmp_path.name}-{os.urandom(4).hex()}"
    there = open_store(f"{base}/in")
    for path in local.rglob("*"):
        if path.is_file():
            there.put_file(str(path.relative_to(local)), path)
    target = commit(f"{base}/root", CollectionSettings(uri=there.uri, part_rows=4))
    assert target.manifest()["content_digest"] == here.manifest()["content_digest"]
    assert everything(Collection(target)) == everything(Collection(here))


# Real images


def test_real_parquet_files(shared_data: Path, tmp_path: Path) -> None:
    uri = str(shared_data / "cifar10_jpg_test.parquet")
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri))
    manifest = target.manifest()
    assert (manifest["rows"], manifest["failed"], len(manifest["classes"])) == (10_000, 0, 10)
    assert manifest["classes"][3] == "cat"
    table = pq.read_table(uri)
    rows = {image.key: image for image in Collection(target).read(3)}
    assert len(rows) == 2048
    for key, data, label in zip(*(table[name].to_pylist() for name in ("id", "image", "label")), strict=True):
        if key in rows:
            assert (rows[key].data, rows[key].labels) == (data, [label])
