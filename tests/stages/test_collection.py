"""The collection stage on Ray: committed once, skipped the second time, resumed after a kill, on disk and S3."""

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hashdist.collection import collection as committed
from hashdist.collection.collection import Collection
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings, Settings
from hashdist.stages import collection
from hashdist.store import open_store
from hashdist.store.commit import open_artefact, read_table

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def jpegs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def folder_of(base: Path, count: int) -> str:
    for number, data in enumerate(jpegs(count)):
        path = base / "abc"[number % 3] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(base)


def test_a_folder_becomes_a_listing_once(root_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = folder_of(tmp_path / "in", 50)
    Path(os.fsdecode(os.fsencode(uri) + b"/a/\xff.jpg")).write_bytes(b"a name that is no text")
    settings = Settings(root=root_uri, collection=CollectionSettings(uri=uri, part_rows=16))
    first = collection.run(settings)
    assert (first["stage"], first["rows"], first["failed"], first["skipped"]) == ("collection", 51, 1, False)
    assert "collection: 1 of 51 images cannot be read: 1 vanished" in capsys.readouterr().err
    second = collection.run(settings)
    assert second["skipped"]
    assert second["snapshot"] == first["snapshot"] == collection.snapshot(settings).uri
    manifest = open_artefact(first["snapshot"], "collections").manifest()
    assert manifest["inputs"]["listing"]["uri"] == Path(uri).as_uri()
    assert manifest["classes"] == ["a", "b", "c"]
    named = replace(settings, collection=CollectionSettings(snapshot=first["snapshot"]))
    assert collection.snapshot(named).uri == first["snapshot"]
    assert collection.run(named)["rows"] == 51
    assert collection.snapshot(replace(settings, fresh="again")).uri != first["snapshot"]
    (tmp_path / "in" / "b" / "new.jpg").write_bytes(jpegs(1)[0])
    grown = collection.run(settings)
    assert (grown["rows"], grown["skipped"]) == (52, False)


def test_formats_agree_on_s3(s3_endpoint: str, tmp_path: Path) -> None:
    images, keys = jpegs(40), [f"k{number}" for number in range(40)]
    base = open_store(f"s3://hashdist/{tmp_path.name}-{os.urandom(4).hex()}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": keys, "image": images, "label": [i % 4 for i in range(40)]}), sink, row_group_size=9)
    base.put("parquet/a.parquet", sink.getvalue().to_pybytes())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number, (key, image) in enumerate(zip(keys, images, strict=True)):
            for name, data in ((f"{key}.jpg", image), (f"{key}.cls", str(number % 4).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    base.put("tars/a.tar", packed.getvalue())
    found: list[Any] = []
    for part in ("parquet", "tars"):
        settings = Settings(
            root=f"{base.uri}/root", collection=CollectionSettings(uri=f"{base.uri}/{part}", part_rows=7)
        )
        made = open_artefact(collection.run(settings)["snapshot"], "collections")
        reader = Collection(made)
        found.append(
            (made.manifest()["content_digest"], [image for part in range(reader.parts) for image in reader.read(part)])
        )
    assert found[0] == found[1]
    assert [image.data for image in found[0][1]] == images


def test_a_second_run_scans_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = folder_of(tmp_path / "in", 60)
    root = tmp_path / "root"
    settings = Settings(root=str(root), collection=CollectionSettings(uri=uri, part_rows=10))

    def killed(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(collection, "assemble", killed)
    with pytest.raises(KeyboardInterrupt):
        collection.run(settings)
    target = collection.snapshot(settings)
    assert not target.exists()
    before = target.parts()
    assert sorted(before) == list(range(6))
    lost = target.store.local_path("parts/00000003.json")
    assert lost is not None
    lost.unlink()
    monkeypatch.setattr(collection, "assemble", committed.assemble)
    result = collection.run(settings)
    after = target.parts()
    assert {part for part in after if after[part] != before.get(part)} == {3}
    assert result["rows"] == 60
    table = pa.concat_tables(read_table(target.store, entry) for entry in target.manifest()["files"])
    assert table.num_rows == 60


def test_bad_input_ends_with_what_to_do(tmp_path: Path) -> None:
    settings = Settings(root=str(tmp_path / "root"), collection=CollectionSettings(uri=str(tmp_path / "none")))
    with pytest.raises(InvalidInput, match="found nothing there"):
        collection.run(settings)
    pq.write_table(pa.table({"id": ["a", "a"], "image": [b"1", b"2"]}), tmp_path / "x.parquet")
    twice = Settings(root=str(tmp_path / "root"), collection=CollectionSettings(uri=str(tmp_path / "x.parquet")))
    with pytest.raises(InvalidInput, match="every image must have its own key"):
        collection.run(twice)
    assert not collection.snapshot(twice).exists()


def test_an_unreadable_tar_is_the_callers_to_mend(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    settings = Settings(root=str(tmp_path / "root"), collection=CollectionSettings(uri=str(tmp_path)))
    with pytest.raises(InvalidInput, match=r"x\.tar must be a whole, uncompressed tar"):
        collection.run(settings)
