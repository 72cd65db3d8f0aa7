"""Collections of every format: what is listed, scanned, committed and read again, against what was written."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from hashdist.collection import salts as salting
from hashdist.collection.collection import (
    Collection,
    Image,
    assemble,
    open_collection,
    plan,
    subset,
    write_unit,
)
from hashdist.collection.listing import list_collection, manifest_fields
from hashdist.collection.readers import FORMATS, tar
from hashdist.collection.readers.reader import content_digest
from hashdist.collection.vocabulary import label_numbers
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_id
from hashdist.ground.schema import LISTING, OK
from hashdist.ground.settings import CollectionSettings
from hashdist.store import open_store
from hashdist.store.commit import Artefact, artefact, read_table
from tests.worlds import extensions


def jpeg(shade: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Picture.new("RGB", (size, size), (shade % 256, shade // 256 % 256, 7)).save(file, "JPEG")
    return file.getvalue()


def commit(root: str, settings: CollectionSettings) -> Artefact:
    """What the stage does, without Ray."""
    listing = list_collection(settings)
    target = artefact(
        open_store(root), "collections", inputs={"l": listing.digest}, settings={"rows": settings.part_rows}, revision=1
    )
    planned = plan(listing, settings.part_rows)
    units = [write_unit(target, unit, planned.reader.scan(unit), settings.part_rows) for unit in planned.units]
    labels = label_numbers(planned.reader, units)
    fields = assemble(target, units, salts=planned.salts, labels=labels, part_rows=settings.part_rows)
    target.publish({**manifest_fields(listing), **fields, "settings": settings.identity()})
    return target


def everything(collection: Collection) -> list[Image]:
    return [image for part in range(collection.parts) for image in collection.read(part)]


def listed(target: Artefact) -> pa.Table:
    return pa.concat_tables(read_table(target.store, entry) for entry in target.manifest()["files"])


Writer = Callable[[Path, dict[str, tuple[bytes, str]]], str]


def write_folder(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    for key, (data, label) in images.items():
        path = base / label / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(base)


def write_parquet(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    base.mkdir()
    keys = list(images)
    for number, some in enumerate([keys[:7], keys[7:]]):
        table = pa.table(
            {"id": some, "image": [images[key][0] for key in some], "label": [images[key][1] for key in some]}
        )
        pq.write_table(table, base / f"{number}.parquet", row_group_size=5)
    return str(base)


def write_tars(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    base.mkdir()
    keys = list(images)
    for number, some in enumerate([keys[:7], keys[7:]]):
        with tarfile.open(base / f"{number}.tar", "w") as tar:
            for key in some:
                for extension, data in (("json", b"{}"), ("jpg", images[key][0]), ("cls", images[key][1].encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(base)


def write_zip(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    base.mkdir()
    with zipfile.ZipFile(base / "0.zip", "w") as archive:
        for key, (data, label) in images.items():
            archive.writestr(f"{label}/{key}.jpg", data)
    return str(base)


WRITERS: dict[str, Writer] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_tars,
    "zip": write_zip,
}
"""Every format of the package, and the one that docs/extend.md shows."""


@pytest.fixture(params=sorted(WRITERS))
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zip":
        monkeypatch.setitem(FORMATS, "zip", extensions.module("hashdist/collection/readers/zip.py").ZipReader)
    return str(request.param)


@pytest.fixture
def images() -> dict[str, tuple[bytes, str]]:
    return {f"img-{i:03d}": (jpeg(i * 37), ["cat", "dog", "ant"][i % 3]) for i in range(25)}


def expected_key(form: str, key: str, label: str) -> str:
    return f"{label}/{key}.jpg" if form in ("folder", "zip") else key


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: None, "found nothing there"),
        (lambda base: base.mkdir(), "found nothing there"),
        (lambda base: (base.mkdir(), (base / "a.txt").write_text("x")), r"found 1 x \.txt"),
        (lambda base: (base.mkdir(), (base / "a.tar.gz").write_text("x")), "unpack compressed tars first"),
        (
            lambda base: (base.mkdir(), (base / "a.jpg").write_text("x"), (base / "a.tar").write_text("x")),
            "found 1 for folder and 1 for webdataset; choose with --collection.format",
        ),
    ],
)
def test_missing_empty_and_mixed_collections_are_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "in")
    with pytest.raises(InvalidInput, match=message):
        list_collection(CollectionSettings(uri=str(tmp_path / "in")))


def test_no_uri_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"give --collection\.uri"):
        list_collection(CollectionSettings())


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".thumbnails/a.jpg", "__MACOSX/a.jpg", "x/B.JPEG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    listing = list_collection(CollectionSettings(uri=str(tmp_path)))
    assert [entry.name for entry in listing.files] == ["a.jpg", "x/B.JPEG"]


def test_listing_digest_follows_content_stamps_and_options(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    settings = CollectionSettings(uri=str(tmp_path))
    digest = list_collection(settings).digest
    assert list_collection(CollectionSettings(uri=tmp_path.as_uri())).digest == digest
    assert list_collection(CollectionSettings(uri=str(tmp_path), labels=False)).digest != digest
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert list_collection(settings).digest != digest


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_single_file_is_a_collection(form: str, images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    base = tmp_path / "in"
    WRITERS[form](base, images)
    name = {"parquet": "1.parquet", "webdataset": "1.tar"}[form]
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=str(base / name), part_rows=4))
    assert {image.key for image in everything(Collection(target))} == set(list(images)[7:])


# Folders


def test_vanished_changed_and_unreadable_files_are_rows_with_a_reason(tmp_path: Path) -> None:
    base = tmp_path / "in"
    base.mkdir()
    for number in range(4):
        (base / f"{number}.jpg").write_bytes(jpeg(number))
    listing = list_collection(CollectionSettings(uri=str(base)))
    (base / "0.jpg").unlink()
    planned = plan(listing, 10)
    target = artefact(open_store(str(tmp_path / "root")), "collections", inputs={}, settings={}, revision=1)
    units = [write_unit(target, unit, planned.reader.scan(unit), 10) for unit in planned.units]
    labels = label_numbers(planned.reader, units)
    fields = assemble(target, units, salts={}, labels=labels, part_rows=10)
    manifest = target.publish({**manifest_fields(listing), **fields})
    assert (manifest["rows"], manifest["failed"], manifest["unreadable"]) == (4, 1, {"vanished": 1})
    (base / "1.jpg").write_bytes(jpeg(99))
    (base / "2.jpg").unlink()
    found = {image.key: image for image in everything(Collection(target))}
    assert found["0.jpg"].data is None
    assert str(found["0.jpg"].reason).startswith("vanished:")
    assert found["1.jpg"].data is None
    assert str(found["1.jpg"].reason).startswith("changed:")
    assert str(found["2.jpg"].reason).startswith("vanished:")
    assert found["3.jpg"].data == jpeg(3)


def test_a_name_that_is_not_utf8_is_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    base = tmp_path / "in"
    base.mkdir()
    (base / "good.jpg").write_bytes(jpeg(1))
    Path(os.fsdecode(os.fsencode(base) + b"/bad\xff.jpg")).write_bytes(jpeg(2))
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=str(base)))
    assert (target.manifest()["rows"], target.manifest()["failed"]) == (2, 1)
    assert {image.key: image.data is None for image in everything(Collection(target))} == {
        "good.jpg": False,
        "bad\\xff.jpg": True,
    }


def test_images_beside_class_folders_have_no_label(tmp_path: Path) -> None:
    base = tmp_path / "in"
    (base / "cat").mkdir(parents=True)
    (base / "cat" / "deep").mkdir()
    for name in ("a.jpg", "cat/b.jpg", "cat/deep/c.jpg"):
        (base / name).write_bytes(jpeg(1))
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=str(base)))
    assert {image.key: image.labels for image in everything(Collection(target))} == {
        "a.jpg": None,
        "cat/b.jpg": [0],
        "cat/deep/c.jpg": [0],
    }
    without = commit(str(tmp_path / "root"), CollectionSettings(uri=str(base), labels=False))
    assert [image.labels for image in everything(Collection(without))] == [None] * 3
    assert without.manifest()["classes"] == []


# Parquet


def one_parquet(base: Path, **options: Any) -> CollectionSettings:
    base.mkdir(exist_ok=True)
    table = pa.table(options.pop("columns"))
    metadata = options.pop("metadata", None)
    pq.write_table(
        table.replace_schema_metadata(metadata), base / "a.parquet", row_group_size=options.pop("group", 100)
    )
    return CollectionSettings(uri=str(base), **options)


@pytest.mark.parametrize(
    ("labels", "metadata", "expected", "classes"),
    [
        (pa.array([2, 0, None]), None, [[2], [0], None], []),
        (pa.array([2, 0, None]), {"classes": "a,b,c"}, [[2], [0], None], ["a", "b", "c"]),
        (pa.array([1, 0, 0]), {"classes": "cat, wild|dog"}, [[1], [0], [0]], ["cat, wild", "dog"]),
        (pa.array([1, 0, 0]), {"classes": '["x", "y"]'}, [[1], [0], [0]], ["x", "y"]),
        (
            pa.array([1, 0, 0]),
            {"huggingface": '{"info": {"features": {"label": {"names": ["x", "y"]}}}}'},
            [[1], [0], [0]],
            ["x", "y"],
        ),
        (pa.array([[1, 0], [], None]), None, [[1, 0], [], None], []),
        (pa.array(["b", "a", None]), None, [[1], [0], None], ["a", "b"]),
        (pa.array(["b", "a", None]), {"classes": "b,a"}, [[0], [1], None], ["b", "a"]),
        (pa.array([["b", "a"], [], ["c"]]), None, [[1, 0], [], [2]], ["a", "b", "c"]),
        (pa.array(["b", "a", None]).dictionary_encode(), None, [[1], [0], None], ["a", "b"]),
    ],
)
def test_parquet_labels(labels: Any, metadata: Any, expected: Any, classes: list[str], tmp_path: Path) -> None:
    name = "labels" if pa.types.is_list(labels.type) else "label"
    columns = {"id": ["x", "y", "z"], "image": [b"1", b"2", b"3"], name: labels}
    settings = one_parquet(tmp_path / "in", columns=columns, metadata=metadata)
    target = commit(str(tmp_path / "root"), settings)
    assert [image.labels for image in everything(Collection(target))] == expected
    assert target.manifest()["classes"] == classes


def test_parquet_images_in_a_struct_and_integer_keys(tmp_path: Path) -> None:
    columns = {"n": [5, 6], "picture": [{"bytes": b"one", "path": "p"}, {"bytes": None, "path": "q"}]}
    settings = one_parquet(tmp_path / "in", columns=columns, id_column="n", image_column="picture")
    target = commit(str(tmp_path / "root"), settings)
    assert [(image.key, image.data) for image in everything(Collection(target))] == [("5", b"one"), ("6", None)]
    assert target.manifest()["unreadable"] == {"null": 1}


@pytest.mark.parametrize("part_rows", [1, 3, 7, 1000])
@pytest.mark.parametrize("group", [2, 10, 1000])
def test_parquet_parts_cut_row_groups_anywhere(part_rows: int, group: int, tmp_path: Path) -> None:
    data = [os.urandom(40_000 if i % 5 == 0 else 30) if i % 7 else None for i in range(60)]
    columns = {"id": [f"{i}" for i in range(60)], "image": pa.array(data, pa.binary())}
    settings = one_parquet(tmp_path / "in", columns=columns, group=group, part_rows=part_rows)
    target = commit(str(tmp_path / "root"), settings)
    collection = Collection(target)
    assert [image.data for image in everything(collection)] == data
    assert [part["start"] for part in target.manifest()["parts"]] == list(range(0, 60, part_rows))
    assert [image.data for image in collection.read(collection.parts - 1)] == data[-((60 - 1) % part_rows + 1) :]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a"], "image": [b"x"]}, r"must have a column 'id', found \['key', 'image'\]; name yours with"),
        ({"id": ["a"], "jpg": [b"x"]}, r"must have a column 'image', .* --collection\.image_column"),
        ({"id": ["a"], "image": ["text"]}, "must hold encoded image bytes .* found string"),
        ({"id": [1.5], "image": [b"x"]}, "must hold strings or integers, found double"),
        ({"id": ["a"], "image": [b"x"], "label": [0.5]}, "'label' must hold integers or strings"),
        ({"id": ["a", None], "image": [b"x", b"y"]}, "every row must have a value in column 'id', row 1 has none"),
        ({"id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}, "at least one image is required"),
    ],
)
def test_parquet_that_cannot_be_used_is_refused(columns: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        commit(str(tmp_path / "root"), one_parquet(tmp_path / "in", columns=columns))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidInput, match=r"a\.parquet must be a parquet file"):
        commit(str(tmp_path / "root"), CollectionSettings(uri=str(tmp_path)))


def test_a_source_that_changed_is_refused(images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    uri = write_parquet(tmp_path / "in", images)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=uri, part_rows=4))
    os.utime(tmp_path / "in" / "0.parquet", ns=(5, 5))
    with pytest.raises(InvalidInput, match=r"0\.parquet changed after it was listed"):
        everything(Collection(target))
    (tmp_path / "in" / "0.parquet").unlink()
    with pytest.raises(InvalidInput, match=r"0\.parquet was listed, but is not there any more"):
        everything(Collection(target))


# WebDataset


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_samples_of_a_tar(tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "n" * 120
    members = {
        "a/0001.seg.png": b"mask",
        "a/0001.jpg": b"image-1",
        "a/0001.cls": b"7\n",
        "./a/0002.JPG": b"image-2",
        "a/0003.txt": b"words",
        "._a/0004.jpg": b"resource fork",
        f"{long}.webp": b"image-5" * 1000,
        "b.mask.png": b"only mask",
    }
    make_tar(tmp_path / "in" / "x.tar", members)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=str(tmp_path / "in"), part_rows=2))
    found = {image.key: image for image in everything(Collection(target))}
    assert {key: image.data for key, image in found.items()} == {
        "a/0001": b"image-1",
        "a/0002": b"image-2",
        "a/0003": None,
        long: b"image-5" * 1000,
        "b": b"only mask",
    }
    assert found["a/0001"].labels == [7]
    assert found["a/0002"].labels is None
    assert found["a/0003"].reason == "no-image: the sample has only txt"
    assert target.manifest()["classes"] == []


def test_a_truncated_tar_is_named(images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    write_tars(tmp_path / "in", images)
    path = tmp_path / "in" / "1.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(
        InvalidInput, match=r"1\.tar must be a whole, uncompressed tar; reading it failed after 5 samples"
    ):
        commit(str(tmp_path / "root"), CollectionSettings(uri=str(tmp_path / "in")))


def test_neighbouring_images_are_read_together() -> None:
    megabyte = 1 << 20
    assert tar.spans([0], [5]) == [(0, 0)]
    assert tar.spans([0, 10, 20], [5, 5, 5]) == [(0, 2)]
    assert tar.spans([0, 10, 10 * megabyte], [5, 5, 5]) == [(0, 1), (2, 2)]
    many = [index * megabyte for index in range(20)]
    assert tar.spans(many, [megabyte] * 20) == [(0, 7), (8, 15), (16, 19)]
    assert tar.spans([0, 99 * megabyte], [99 * megabyte, 3]) == [(0, 0), (1, 1)]


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
