"""Folders of image files: files that vanish, change or cannot be named; labels by class folder."""

import os
from pathlib import Path

from hashdist.collection.collection import (
    Collection,
    assemble,
    plan,
    write_unit,
)
from hashdist.collection.listing import list_collection, manifest_fields
from hashdist.collection.vocabulary import label_numbers
from hashdist.ground.settings import CollectionSettings
from hashdist.store import open_store
from hashdist.store.commit import artefact
from tests.worlds.collection import commit, everything, jpeg


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
