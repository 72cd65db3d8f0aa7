"""Erasure of images from artefacts: tables are written again, what refers to rows goes whole, nothing is left."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from hashdist import cli
from hashdist.collection import collection as collection_module
from hashdist.collection import listing as listing_module
from hashdist.collection import vocabulary
from hashdist.collection.collection import Collection
from hashdist.collection.listing import list_collection
from hashdist.ground.ids import image_id, image_ids
from hashdist.ground.schema import OK, from_vectors, to_vectors, vector_schema
from hashdist.ground.settings import CollectionSettings
from hashdist.index import create_index, open_index
from hashdist.index.upkeep import artefacts
from hashdist.index.upkeep.artefacts import Artefacts, erase
from hashdist.store import open_store
from hashdist.store.commit import Artefact, Log, artefact, open_artefact, write_file, write_table
from hashdist.store.vectors import read_vectors
from tests.worlds.faults import Crash, FaultyStore

SECRET = "secret-one"


def traces(root: str, *needles: bytes) -> list[str]:
    """Names of the objects under a root whose bytes hold one of the needles."""
    store = open_store(root)
    return [entry.name for entry in store.list() if any(needle in store.get(entry.name) for needle in needles)]


def needles(key: str) -> list[bytes]:
    return [key.encode(), str(image_id(key)).encode(), image_id(key).to_bytes(8, "little")]


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Picture.new("RGB", (8, 8), (shade, 3, 7)).save(file, "JPEG")
    return file.getvalue()


def written_images(folder: Path, layout: str, keys: list[str]) -> None:
    """The images, one of them broken, as a folder or as parquet."""
    data = {key: b"no image" if key == "broken" else picture(n) for n, key in enumerate(keys)}
    folder.mkdir()
    if layout == "folder":
        for key, image in data.items():
            (folder / f"{key}.jpg").write_bytes(image)
        return
    for part in range(2):
        some = keys[part::2]
        table = pa.table({"id": some, "image": [data[key] for key in some], "label": [n % 3 for n in range(len(some))]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=4)


def committed_collection(root: str, images: str) -> Artefact:
    """What the stage does, without Ray."""
    chosen = CollectionSettings(uri=images, part_rows=3)
    listing = list_collection(chosen)
    target = artefact(open_store(root), "collections", inputs={"l": listing.digest}, settings={}, revision=1)
    planned = collection_module.plan(listing, 3)
    units = [collection_module.write_unit(target, unit, planned.reader.scan(unit), 3) for unit in planned.units]
    labels = vocabulary.label_numbers(planned.reader, units)
    fields = collection_module.assemble(target, units, salts=planned.salts, labels=labels, part_rows=3)
    target.publish({**listing_module.manifest_fields(listing), **fields, "settings": chosen.identity()})
    return target


def vectors(keys: list[str], kind: str) -> Any:
    rng = np.random.default_rng(image_ids(keys))
    width = 6 if kind == "feature" else 8
    return (
        rng.normal(size=(len(keys), width)).astype(np.float32)
        if kind == "feature"
        else rng.integers(0, 256, (len(keys), width), dtype=np.uint8)
    )


def committed_vectors(root: str, kind: str, column: str, keys: list[str], publish: bool = True) -> Artefact:
    """Features or codes of three files, the rows by id; `broken` has none, and a file is the secret's alone."""
    target = artefact(open_store(root), kind, inputs={"k": keys}, settings={}, revision=1)
    rest = [key for key in keys if key != SECRET]
    files, failed = [], 0
    for number, part in enumerate(([*rest[:4], SECRET], rest[4:])):
        part = sorted(part, key=image_id)
        present = np.array([key != "broken" for key in part])
        made = np.concatenate([vectors([key], column) for key in part])
        schema = vector_schema(column, str(made.dtype), made.shape[1])
        status = [OK if there else "unreadable" for there in present]
        reason = [None if there else "broken: no image" for there in present]
        rows = [image_ids(part), part, [f"digest {key}" for key in part], [[1]] * len(part), status, reason]
        table = pa.table([*rows, to_vectors(made, present)], schema=schema)
        files.append(write_table(target.store, target.new_name(".parquet"), table))
        target.publish_part(number, {"rows": len(part), "failed": int((~present).sum()), "file": files[-1]})
        failed += int((~present).sum())
    fields = {"reasons": {"broken": 1}} if column == "feature" else {}
    if publish:
        target.publish({"rows": len(keys), "failed": failed, "files": files, **fields})
    return target


def committed_graph(root: str, ids: Any, name: str) -> Artefact:
    graph = artefact(open_store(root), "graphs", inputs={"n": name}, settings={}, revision=1)
    files = {}
    for part, array in (("ids", ids), ("features", np.full((len(ids), 4), 0.123456, np.float32))):
        sink = io.BytesIO()
        np.save(sink, array)
        files[part] = write_file(graph.store, graph.new_name(".npy"), sink.getvalue(), len(ids))
    graph.publish({"n": len(ids), "files": {**files, "labels": None}})
    return graph


def committed_model(root: str, graph: Artefact | None, name: str) -> Artefact:
    """A model and its run; without a graph, a run that is not finished."""
    model = artefact(open_store(root), "models", inputs={"n": name}, settings={}, revision=1)
    log = Log(open_store(root).child(f"runs/{model.name}"))
    state = write_file(log.store, log.new_name("states", ".pt"), b"embeddings of " + name.encode())
    log.commit({"state": state}, 0)
    if graph is not None:
        weights = write_file(model.store, model.new_name(".safetensors"), b"weights")
        inputs = {"graphs": {"uri": graph.uri, "digest": graph.name}}
        model.publish({"inputs": inputs, "files": [weights], "head": weights})
    return model


KEYS = [SECRET, "broken", *(f"image-{n}" for n in range(9))]


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_a_collection_is_read_as_before_without_the_image(root_uri: str, tmp_path: Path, layout: str) -> None:
    written_images(tmp_path / "images", layout, KEYS)
    made = committed_collection(root_uri, str(tmp_path / "images"))
    key = next(k for k in read_keys(made) if SECRET in k)
    before = {image.key: image for part in range(Collection(made).parts) for image in Collection(made).read(part)}
    counts = made.manifest()
    assert traces(made.uri, *needles(key))
    done = erase(root_uri, [key], "on paper")
    assert (done.rewritten, done.deleted) == (1, 0)
    assert traces(root_uri, *needles(key)) == []
    after = open_artefact(made.uri, "collections")
    collection = Collection(after)
    images = [image for part in range(collection.parts) for image in collection.read(part)]
    assert {image.key: image for image in images} == {k: image for k, image in before.items() if k != key}
    assert (after.manifest()["rows"], after.manifest()["failed"]) == (counts["rows"] - 1, counts["failed"])
    assert sum(part["rows"] for part in after.manifest()["parts"]) == collection.rows == len(images)
    assert list(collection.fetch([images[0].key])) == [images[0].key]
    assert len(
        collection_module.subset(open_store(root_uri), after, [image.id for image in images[:3]]).manifest()["files"]
    )
    broken = next(k for k in before if "broken" in k)
    assert erase(root_uri, [broken, images[0].key]).rewritten >= 1
    now = open_artefact(made.uri, "collections").manifest()
    assert (now["rows"], now["failed"]) == (counts["rows"] - 3, 0)
    everything = [image.key for image in images]
    erase(root_uri, everything)
    empty = Collection(open_artefact(made.uri, "collections"))
    assert [image for part in range(empty.parts) for image in empty.read(part)] == []
    assert empty.rows == 0


def read_keys(made: Artefact) -> list[str]:
    collection = Collection(made)
    return [key for part in range(collection.parts) for key in collection.table(part)["key"].to_pylist()]


@pytest.mark.parametrize(("kind", "column"), [("features", "feature"), ("codes", "code")])
def test_vectors(root_uri: str, kind: str, column: str) -> None:
    made = committed_vectors(root_uri, kind, column, KEYS)
    secret = [*needles(SECRET), vectors([SECRET], column).tobytes()]
    assert traces(made.uri, *secret)
    assert erase(root_uri, [SECRET]) == Artefacts(1, 0, 0, 1)
    assert traces(root_uri, *secret) == []
    after = open_artefact(made.uri, kind)
    table = read_vectors(after, ["id", "key", "status", column])
    keys = sorted(set(KEYS) - {SECRET}, key=image_id)
    assert table["key"].to_pylist() == keys
    good = [row for row, key in enumerate(keys) if key != "broken"]
    np.testing.assert_array_equal(
        from_vectors(table[column], table.schema)[good], np.concatenate([vectors([keys[row]], column) for row in good])
    )
    assert (after.manifest()["rows"], after.manifest()["failed"]) == (len(KEYS) - 1, 1)
    assert erase(root_uri, [SECRET]) == Artefacts(0, 0, 0, 0)
    erase(root_uri, ["broken", *KEYS[2:6]])
    now = open_artefact(made.uri, kind)
    assert (now.manifest()["rows"], now.manifest()["failed"]) == (5, 0)
    assert now.manifest().get("reasons", {}) == {}
    erase(root_uri, KEYS)
    assert len(read_vectors(open_artefact(made.uri, kind), ["id", column])) == 0


def test_graphs_and_runs_go_whole_and_models_stay(root_uri: str) -> None:
    holds = committed_graph(root_uri, np.sort(image_ids(KEYS)), "with")
    other = committed_graph(root_uri, np.sort(image_ids(KEYS[1:])), "without")
    models = [committed_model(root_uri, graph, name) for graph, name in ((holds, "a"), (other, "b"), (None, "c"))]
    assert erase(root_uri, ["never"]) == Artefacts(0, 0, 0, 0)
    done = erase(root_uri, [SECRET])
    assert (done.rewritten, done.deleted, done.runs) == (0, 1, 2)
    assert [entry.name for entry in holds.store.list()] == []
    assert open_artefact(other.uri, "graphs").manifest()["n"] == len(KEYS) - 1
    runs = {entry.name.split("/")[0] for entry in open_store(root_uri).child("runs").list()}
    assert runs == {models[1].name}
    assert open_artefact(models[0].uri, "models").manifest()["head"]
    assert traces(root_uri, *needles(SECRET)) == []


def test_what_is_not_finished_and_what_nothing_names(root_uri: str) -> None:
    unfinished = committed_vectors(root_uri, "codes", "code", KEYS, publish=False)
    made = committed_vectors(root_uri, "features", "feature", KEYS)
    table = pa.table({"id": image_ids([SECRET]), "key": [SECRET]})
    write_table(made.store, made.new_name(".parquet"), table)  # of a task that was carried out twice
    done = erase(root_uri, [SECRET])
    assert (done.rewritten, done.deleted) == (1, 1)
    assert [entry.name for entry in unfinished.store.list()] == []
    assert traces(root_uri, *needles(SECRET)) == []


def test_a_manifest_that_names_the_image(root_uri: str) -> None:
    made = artefact(open_store(root_uri), "features", inputs={}, settings={}, revision=1)
    made.publish({"rows": 0, "failed": 0, "files": [], "salts": {SECRET: 1}})
    assert erase(root_uri, ["other"]).deleted == 0
    assert erase(root_uri, [SECRET]).deleted == 1
    assert traces(root_uri, SECRET.encode()) == []


def test_killed_at_any_storage_call_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    written_images(tmp_path / "images", "folder", KEYS)
    committed_collection(str(made), str(tmp_path / "images"))
    key = f"{SECRET}.jpg"
    committed_vectors(str(made), "features", "feature", KEYS)
    graph = committed_graph(str(made), np.sort(image_ids(KEYS)), "with")
    committed_model(str(made), graph, "a")
    real, at, finished = open_store, 0, False
    while not finished:
        folder = str(shutil.copytree(made, tmp_path / str(at)))
        calls = [at]

        def call(_: str, left: list[int] = calls) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Crash

        with monkeypatch.context() as patched:
            patched.setattr(artefacts, "open_store", lambda uri: FaultyStore(real(uri), calls=call))
            try:
                erase(folder, [SECRET, key])
                finished = True
            except Crash:
                pass
        assert finished or calls[0] < 0
        erase(folder, [SECRET, key])
        assert traces(folder, *needles(SECRET), *needles(key)) == []
        kinds = {entry.name.split("/")[0] for entry in real(folder).list()}
        assert kinds == {"collections", "features", "models"}
        names = {entry.name.split("/")[1] for entry in real(folder).list() if entry.name.startswith("features/")}
        features = open_artefact(f"{folder}/features/{names.pop()}", "features")
        assert len(read_vectors(features, ["id", "feature"])) == features.manifest()["rows"] == len(KEYS) - 1
        shutil.rmtree(folder)
        at += 1
    assert at > 30


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "root")
    committed_vectors(root, "features", "feature", KEYS)
    for name in ("images", "others"):
        index = create_index(f"{root}/indexes/{name}", bits=64)
        index.append(np.concatenate([vectors([key], "code") for key in KEYS]), KEYS)
    (tmp_path / "keys").write_text("image-1\n\nimage-2\n")
    words = ["index", "purge", SECRET, "never was", "--keys-file", str(tmp_path / "keys"), "--root", root]
    assert cli.main([*words, "--reason", "asked for on paper"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 images were there" in said
    assert "not covered: the images themselves" in said
    assert "1 written again" in said
    for key in (SECRET, "image-1", "image-2"):
        assert traces(root, *needles(key), vectors([key], "code").tobytes(), vectors([key], "feature").tobytes()) == []
    assert sorted(open_index(f"{root}/indexes/others").keys()) == sorted(set(KEYS) - {SECRET, "image-1", "image-2"})
    assert cli.main(["index", "purge", "--root", root]) == 2
    assert cli.main(["index", "compact", "--root", root, "--dry-run"]) == 0
    assert cli.main(["index", "compact", "--root", root, "--all", "--json"]) == 0
