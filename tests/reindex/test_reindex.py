"""`hashdist reindex` without Ray: what is read, encoded and written follows the difference, in every format."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hashdist import cli
from hashdist.collection.collection import Collection
from hashdist.collection.readers.folder import FolderReader
from hashdist.collection.readers.reader import content_digest
from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput, Refused
from hashdist.ground.options import ReindexOptions
from hashdist.ground.schema import OK
from hashdist.ground.settings import GateSettings
from hashdist.index import open_index
from hashdist.index.notes import MOST_FILES
from hashdist.models.model import load_model
from hashdist.reindex import encode as encoding
from hashdist.reindex import find as finding
from hashdist.reindex import run as reindex_run
from hashdist.store import local, open_store
from tests import REPOSITORY
from tests.worlds import reindex as world


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the images that were given to the network since the test began."""
    seen: list[str] = []
    before = encoding.encode

    def encode(model: Any, images: Any, outcome: Any, **more: Any) -> int:
        def told() -> Any:
            for row, data in images:
                seen.append(row["key"])
                yield row, data

        return before(model, told(), outcome, **more)

    monkeypatch.setattr(encoding, "encode", encode)
    return seen


def write_parquet(base: Path, images: dict[str, bytes]) -> None:
    """Two files, split by the key."""
    base.mkdir(exist_ok=True)
    for number in range(2):
        some = [key for key in images if len(key) % 2 == number]
        table = pa.table({"id": some, "image": pa.array([images[key] for key in some], pa.binary())})
        path = base / f"{number}.parquet"
        if not path.exists() or not pq.read_table(path).equals(table):
            pq.write_table(table, path, row_group_size=5)


def write_tars(base: Path, images: dict[str, bytes]) -> None:
    base.mkdir(exist_ok=True)
    for number in range(2):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for key in (key for key in images if len(key) % 2 == number):
                member = tarfile.TarInfo(key)
                member.size = len(images[key])
                tar.addfile(member, io.BytesIO(images[key]))
        path = base / f"{number}.tar"
        if not path.exists() or path.read_bytes() != sink.getvalue():
            path.write_bytes(sink.getvalue())


def write_folder(base: Path, images: dict[str, bytes]) -> None:
    """As it is to be: what is not among the images goes, and what is there as it was is not written."""
    there = {path.relative_to(base).as_posix(): path for path in base.rglob("*") if path.is_file()}
    for key in there.keys() - images.keys():
        there[key].unlink()
    world.write(base, {k: d for k, d in images.items() if k not in there or there[k].read_bytes() != d})


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_tars,
}


@pytest.fixture(params=sorted(WRITERS))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def named(form: str, images: dict[str, bytes]) -> dict[str, str]:
    """Content digest by the key that the format makes of the name."""
    keys = {key: key.partition(".")[0] if form == "webdataset" else key for key in images}
    return {keys[key]: content_digest(data) for key, data in images.items()}


def same_answers(root: str, images: dict[str, bytes], form: str = "folder") -> None:
    """The index holds exactly these images, with the codes that the model gives them."""
    assert world.content(root) == named(form, images)
    index = open_index(f"{root}/indexes/photos")
    codes_NW = load_model(str(index.model_uri)).encode(list(images.values()))
    np.testing.assert_array_equal(index.codes_of(list(named(form, images))), codes_NW)
    assert index.rows == len(images)


def test_an_index_follows_its_collection(form: str, root_uri: str, tmp_path: Path, encoded: list[str]) -> None:
    images = {f"{'x' * (i % 2)}{i:03d}.png": world.png(i) for i in range(40)}
    base = tmp_path / "images"
    WRITERS[form](base, images)
    world.empty_index(root_uri)
    settings = world.settings_of(root_uri, base)
    first = reindex_run.reindex(settings)
    assert (first["version"], first["added"], first["encoded"], len(encoded)) == (2, 40, 40, 40)
    same_answers(root_uri, images, form)
    before = telemetry.traffic()
    assert reindex_run.reindex(settings)["version"] == 2
    spent = telemetry.traffic().since(before)
    assert spent.requests["put"] + spent.requests["create"] == 0

    encoded.clear()
    for key in ("000.png", "x001.png"):
        del images[key]
    images |= {"002.png": world.png(102), "x003.png": world.png(103), "new.png": world.png(200)}
    WRITERS[form](base, images)
    grown = reindex_run.reindex(settings)
    assert [grown[name] for name in ("added", "changed", "removed", "encoded", "version")] == [1, 2, 2, 3, 3]
    assert sorted(encoded) == sorted(named(form, dict.fromkeys(("002.png", "x003.png", "new.png"), b"")))
    same_answers(root_uri, images, form)
    again = reindex_run.reindex(settings)
    assert (again["version"], again["encoded"], len(encoded)) == (3, 0, 3)
    assert again["text"].startswith("reindex: nothing new: ")
    assert "\n" not in again["text"]


def test_bytes_that_are_the_same_are_read_once_and_never_encoded(
    form: str, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = {f"{'x' * (i % 2)}{i:03d}.png": world.png(i) for i in range(12)}
    WRITERS[form](base, images)
    world.empty_index(root)
    settings = world.settings_of(root, base)
    reindex_run.reindex(settings)
    encoded.clear()
    shards = open_index(f"{root}/indexes/photos").manifest["shards"]
    for path in base.rglob("*"):
        os.utime(path, ns=(1, 1))
    touched = reindex_run.reindex(settings)
    assert (touched["encoded"], touched["changed"], encoded) == (0, 0, [])
    assert touched["costs"]["listing" if form != "folder" else "encode"]["read"] or form != "folder"
    index = open_index(f"{root}/indexes/photos")
    assert (index.version, index.manifest["shards"]) == (3, shards)  # no row was written again
    read: list[str] = []
    monkeypatch.setattr(FolderReader, "_get", lambda self, key: read.append(key))
    monkeypatch.setattr(finding, "_scan", lambda found, *more: read.extend(entry.name for entry in found.files))
    assert reindex_run.reindex(settings)["version"] == 3
    assert read == []


def test_many_notes_become_one_file(tmp_path: Path) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    world.write(base, {f"{i}.png": world.png(i) for i in range(3)})
    world.empty_index(root)
    settings = world.settings_of(root, base)
    reindex_run.reindex(settings)
    for stamp in range(MOST_FILES + 2):
        os.utime(base / f"{stamp % 3}.png", ns=(stamp, stamp))
        assert reindex_run.reindex(settings)["version"] == stamp + 3
    manifest = open_index(f"{root}/indexes/photos").manifest
    assert [entry["rows"] for entry in manifest["seen"]] == [3, 1]
    assert reindex_run.reindex(settings)["version"] == MOST_FILES + 4


# Bad images


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **more: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **more)
    return sink.getvalue()


def odd_images() -> tuple[dict[str, bytes], dict[str, tuple[bytes, str]]]:
    """Images that are unusual and yet decoded; and images that are not, each with its reason."""
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 4), np.uint8)
    jpeg = saved(Image.fromarray(noise[:, :, :3]), "JPEG")
    frames = [Image.fromarray(noise[:, :, channel]) for channel in range(3)]
    decoded = {
        "cmyk.jpg": saved(Image.fromarray(noise[:, :, :3]).convert("CMYK"), "JPEG"),
        "sixteen.png": saved(Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257), "PNG"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    bad = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "empty.jpg": (b"", "empty"),
        "wrong.png": (b"<html>404 Not Found</html>", "not-an-image"),
        "bomb.png": (bomb(), "too-large"),
        "cut.png": (world.png(9)[:40], "undecodable|truncated|not-an-image"),
        "floats.tif": (saved(Image.fromarray(noise[:, :, 0].astype(np.float32)), "TIFF"), "unsupported"),
        "refused.png": (world.png(1), "refused"),
        "vanished.png": (world.png(2), "vanished"),
    }
    return decoded, bad


def test_bad_images_are_rows_with_a_reason(tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """5 % of them bad, of eight kinds; three unusual ones have codes: the first frame, converted to RGB."""
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    decoded, bad = odd_images()
    good = {f"{i:03d}.png": world.png(i) for i in range(150)} | decoded
    world.write(base, good | {key: data for key, (data, _) in bad.items()})
    world.empty_index(root)
    settings = world.settings_of(root, base)
    find = finding.find

    def find_and_lose(*words: Any) -> Any:
        found = find(*words)
        (base / "vanished.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(finding, "find", find_and_lose)
    monkeypatch.setattr("hashdist.store.local._regular", _refusing(local._regular))
    first = reindex_run.reindex(settings)
    assert (first["added"], first["failed"]) == (len(good), len(bad))
    same_answers(root, good)
    notes = open_index(f"{root}/indexes/photos").view.notes_between(0, (1 << 63) - 1).to_pylist()
    assert {note["key"] for note in notes} == set(bad)
    for note in notes:
        assert note["status"] != OK
        assert note["reason"].partition(":")[0] in bad[note["key"]][1].split("|"), note
    encoded.clear()
    again = reindex_run.reindex(settings)
    assert (again["version"], encoded) == (first["version"], [])  # only bytes that could not be had are tried again
    assert (again["unreadable"], again["failed"]) == (len(bad) - 2, 1)
    retried = reindex_run.reindex(settings, ReindexOptions(retry_failed=True))
    assert (retried["version"], retried["failed"]) == (first["version"], len(bad) - 1)
    monkeypatch.undo()
    world.write(base, {"empty.jpg": good["001.png"], "vanished.png": bad["vanished.png"][0]})
    mended = reindex_run.reindex(settings)
    assert (mended["added"], mended["failed"]) == (3, 0)
    same_answers(root, good | {k: (base / k).read_bytes() for k in ("empty.jpg", "vanished.png", "refused.png")})


def _refusing(opened: Callable[[str, int], int]) -> Callable[[str, int], int]:
    def refuse(path: str, flags: int) -> int:
        if Path(path).name == "refused.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, flags)

    return refuse


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_bad_images_of_a_file_are_retried_by_opening_it(form: str, tmp_path: Path, encoded: list[str]) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = {f"{'x' * (i % 2)}{i:03d}.png": world.png(i) for i in range(12)}
    WRITERS[form](base, images | {"bad.png": b"no image"})
    world.empty_index(root)
    settings = world.settings_of(root, base)
    assert reindex_run.reindex(settings)["failed"] == 1
    same_answers(root, images, form)
    idle = reindex_run.reindex(settings)
    assert (idle["unreadable"], idle["unchanged"], idle["listed"], idle["version"]) == (1, 12, 13, 2)
    encoded.clear()
    again = reindex_run.reindex(settings, ReindexOptions(retry_failed=True))
    assert (encoded, again["version"]) == (list(named(form, {"bad.png": b""})), 2)


# Plans, lists of changes, inventories


def test_a_plan_changes_nothing_and_foretells_the_run(root_uri: str, tmp_path: Path) -> None:
    base = tmp_path / "images"
    world.write(base, {f"{i}.png": world.png(i) for i in range(60)})
    world.empty_index(root_uri)
    settings = world.settings_of(root_uri, base)
    reindex_run.reindex(settings)
    world.write(base, {"0.png": world.png(90), "new.png": world.png(91)})
    (base / "1.png").unlink()
    store = open_store(root_uri)
    before = {entry.name: entry.stamp for entry in store.list()}
    planned = reindex_run.reindex(settings, ReindexOptions(plan=True))
    assert {entry.name: entry.stamp for entry in store.list()} == before
    assert planned["actual"] is None
    assert planned["plan"]["seconds"] > 0
    done = reindex_run.reindex(settings)
    for plan in (planned["plan"], done["plan"]):
        assert [plan[name] for name in ("new", "touched", "removed", "unchanged")] == [1, 1, 1, 58]
    for name in ("new", "touched", "removed", "unchanged", "read_bytes", "get_requests"):
        assert done["plan"][name] == done["actual"][name], name
    assert done["plan"]["put_requests"] - 1 <= done["actual"]["put_requests"] <= done["plan"]["put_requests"]
    for phase in ("listing", "diff", "encode", "commit"):
        assert f"{phase} " in done["text"]
        assert set(done["costs"][phase]) == {"seconds", "requests", "read", "written"}


def test_a_list_of_changes_stands_in_for_the_listing(tmp_path: Path, encoded: list[str]) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = {f"{i}.png": world.png(i) for i in range(10)}
    world.write(base, images)
    world.empty_index(root)
    settings = world.settings_of(root, base)
    reindex_run.reindex(settings)
    encoded.clear()
    images |= {"0.png": world.png(50), "new.png": world.png(51), "not-told.png": world.png(52)}
    images = {key: data for key, data in images.items() if key not in ("1.png", "2.png", "3.png")}
    write_folder(base, images)
    told = tmp_path / "changes"
    told.write_text(
        "0.png\nput\tnew.png\nput\t4.png\ndelete\t1.png\nput\t2.png\nnotes.txt\nput\tnever.png\ndelete\tno.png"
    )
    before = telemetry.traffic()
    done = reindex_run.reindex(settings, ReindexOptions(changes=str(told)))
    assert [done[name] for name in ("added", "changed", "removed", "unchanged")] == [1, 1, 2, 1]
    assert sorted(encoded) == ["0.png", "new.png"]
    assert telemetry.traffic().since(before).requests["head"] >= 5
    # what nobody told of is found by a listing
    assert set(world.content(root)) == {*images, "3.png"} - {"not-told.png"}
    reindex_run.reindex(settings)
    same_answers(root, images)
    write_parquet(tmp_path / "files", images)
    with pytest.raises(InvalidInput, match="leave out --changes"):
        reindex_run.reindex(
            world.settings_of(root, tmp_path / "files", format="parquet"), ReindexOptions(changes=str(told))
        )


def test_an_inventory_stands_in_for_the_listing(s3_endpoint: str, tmp_path: Path) -> None:
    root = (tmp_path / "root").as_uri()
    images = {f"{i}.png": world.png(i) for i in range(10)}
    uri = f"s3://hashdist/{tmp_path.name}"
    store = open_store(uri)
    for key, data in images.items():
        store.put(key, data)
    world.empty_index(root)
    settings = world.settings_of(root, uri)

    def inventory(created: float) -> str:
        lines = [f'"hashdist","{tmp_path.name}/{e.name}",{e.size},"{e.stamp}"' for e in store.list()]
        (tmp_path / "data.csv").write_text("\n".join(lines))
        about = {"sourceBucket": "hashdist", "fileFormat": "CSV", "fileSchema": "Bucket, Key, Size, ETag"}
        about |= {"creationTimestamp": str(created * 1000), "files": [{"key": "data.csv"}]}
        (tmp_path / "manifest.json").write_text(json.dumps(about))
        return str(tmp_path / "manifest.json")

    before = telemetry.traffic()
    done = reindex_run.reindex(settings, ReindexOptions(inventory=inventory(2e9)))
    assert done["added"] == 10
    assert done["costs"]["listing"]["requests"] == {"get": 2}
    same_answers(root, images)
    assert reindex_run.reindex(settings)["version"] == 2  # LIST shows the same sizes and stamps
    assert telemetry.traffic().since(before).requests["get"] >= 12
    with pytest.raises(InvalidInput, match="images that came in between would be removed"):
        reindex_run.reindex(settings, ReindexOptions(inventory=inventory(1e9)))


# Labels, pictures, settings


def test_labels_keep_their_numbers_when_classes_come(tmp_path: Path) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    world.write(base, {f"{label}/{i}.png": world.png(hash(label) % 999 + i) for label in "bd" for i in range(3)})
    world.empty_index(root)
    settings = world.settings_of(root, base)
    reindex_run.reindex(settings)
    world.write(base, {f"{label}/9.png": world.png(i) for i, label in enumerate("acb")} | {"plain.png": world.png(7)})
    reindex_run.reindex(settings)
    index = open_index(f"{root}/indexes/photos")
    assert index.manifest["vocabulary"] == {"b": 0, "d": 1, "a": 2, "c": 3}
    found = pa.concat_tables(index.tables(["labels"]))
    for key, labels in zip(found["key"].to_pylist(), found["labels"].to_pylist(), strict=True):
        assert labels == ([["b", "d", "a", "c"].index(key[0])] if "/" in key else None), key


def test_an_index_without_a_model_or_a_wrong_collection_is_refused(tmp_path: Path) -> None:
    root = (tmp_path / "root").as_uri()
    world.empty_index(root)
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidInput, match="found nothing there"):
        reindex_run.reindex(world.settings_of(root, tmp_path / "none"))
    with pytest.raises(InvalidInput, match=r"give --collection\.uri"):
        reindex_run.reindex(world.settings_of(root, ""))
    with pytest.raises(InvalidInput, match="give one of them"):
        reindex_run.reindex(world.settings_of(root, tmp_path), ReindexOptions(changes="a", inventory="b"))
    with pytest.raises(InvalidInput, match=r"leave out --collection\.snapshot"):
        reindex_run.reindex(world.settings_of(root, tmp_path, snapshot="x"))


def test_pictures_that_came_later_are_found_by_key(tmp_path: Path) -> None:
    from hashdist.collection.collection import REVISION, assemble, plan, write_unit
    from hashdist.collection.listing import list_collection, manifest_fields
    from hashdist.collection.vocabulary import label_numbers
    from hashdist.ground.settings import CollectionSettings
    from hashdist.store.commit import artefact

    base = tmp_path / "images"
    world.write(base, {"a.png": world.png(0)})
    listing = list_collection(CollectionSettings(uri=str(base)))
    made = artefact(open_store(str(tmp_path / "root")), "collections", inputs={}, settings={}, revision=REVISION)
    planned = plan(listing, 10)
    units = [write_unit(made, unit, planned.reader.scan(unit), 10) for unit in planned.units]
    labels = label_numbers(planned.reader, units)
    made.publish({**manifest_fields(listing), **assemble(made, units, salts={}, labels=labels, part_rows=10)})
    world.write(base, {"b.png": world.png(1)})
    found = Collection(made).fetch(["a.png", "b.png", "c.png"])
    assert found == {"a.png": world.png(0), "b.png": world.png(1)}


# Several runs at once, and runs that die


def command(root: str, images: Path, *more: str) -> list[str]:
    words = ["reindex", "--root", root, "--index.name", "photos", "--collection.uri", str(images), "--json", *more]
    words += ["--gate.lost_rows", "1"]
    return [sys.executable, "-c", _CHILD, *words]


_CHILD = """
import os, signal, sys
from hashdist import cli
from hashdist.ground import telemetry
left = int(os.environ.get("KILL_AT", "0"))
count = telemetry.count_request
def counted(operation):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    count(operation)
telemetry.count_request = counted
code = cli.main(sys.argv[1:])
print(-left, file=sys.stderr)
sys.exit(code)
"""


def child(words: list[str], tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A process of the command; it dies by SIGKILL before its request to a store number KILL_AT."""
    values = {**os.environ, "HASHDIST_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", **environment}
    values["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.Popen(words, env=values, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def grown_world(root: str, base: Path) -> dict[str, bytes]:
    """An index that is behind its collection by new, changed, touched, removed and bad images; what is there now."""
    images = {f"{i:03d}.png": world.png(i) for i in range(30)}
    world.write(base, images)
    world.empty_index(root)
    reindex_run.reindex(world.settings_of(root, base))
    images |= {f"{i:03d}.png": world.png(i + 500) for i in range(5)} | {
        f"n{i}.png": world.png(700 + i) for i in range(9)
    }
    for key in ("010.png", "011.png"):
        (base / key).unlink()
        del images[key]
    world.write(base, images | {"bad.png": b"no image"})
    os.utime(base / "020.png", ns=(5, 5))
    return images


def test_two_late_crons_index_nothing_twice(tmp_path: Path) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = grown_world(root, base)
    running = [child(command(root, base), tmp_path) for _ in range(2)]
    done = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    results = [json.loads(out.splitlines()[-1]) for out, _ in done]
    assert sorted(result["added"] + result["changed"] for result in results) == [0, 14]
    index = open_index(f"{root}/indexes/photos")
    assert index.version == 3
    same_answers(root, images)


@pytest.mark.parametrize(
    "moment", [*(pytest.param(m, marks=pytest.mark.full) for m in (1, 2, 3, 5, 6, 8, 9)), 4, 7, 10]
)
def test_a_killed_run_is_made_up_for_by_the_next(moment: int, tmp_path: Path) -> None:
    """SIGKILL at ten moments spread over the run's requests; the last one is just before it would commit."""
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = grown_world(root, base)
    requests = _requests_of_a_run(tmp_path)
    killed = child(command(root, base), tmp_path, KILL_AT=str(max(1, requests * moment // 10)))
    _, said = killed.communicate(timeout=300)
    assert killed.returncode == -9, said
    index = open_index(f"{root}/indexes/photos")
    assert index.version in (2, 3)
    done = cli.main(["reindex", *command(root, base)[4:]])
    assert done == 0
    same_answers(root, images)
    assert open_index(f"{root}/indexes/photos").version == 3
    queries_QW = index.codes_of(["005.png", "006.png"])
    alone = (tmp_path / "alone").as_uri()
    _never_killed(alone, tmp_path)
    mine, other = (open_index(f"{uri}/indexes/photos").search(queries_QW, 50) for uri in (root, alone))
    np.testing.assert_array_equal(mine.ids, other.ids)
    np.testing.assert_array_equal(mine.distances, other.distances)


def _requests_of_a_run(tmp_path: Path) -> int:
    """How many requests a run takes up to its commit, the commit included."""
    root, base = (tmp_path / "counted" / "root").as_uri(), tmp_path / "counted" / "images"
    grown_world(root, base)
    before = telemetry.traffic()
    seen: list[int] = []
    create = telemetry.count_request

    def counted(operation: str) -> None:
        create(operation)
        if operation == "create":
            seen.append(telemetry.traffic().since(before).requests.total())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "count_request", counted)
        reindex_run.reindex(world.settings_of(root, base))
    return seen[0]


def _never_killed(root: str, tmp_path: Path) -> None:
    base = tmp_path / "alone-images"
    grown_world(root, base)
    reindex_run.reindex(world.settings_of(root, base))


# What comes after the commit


def test_an_index_of_many_small_increments_is_compacted(tmp_path: Path) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    world.empty_index(root)
    settings = world.settings_of(root, base)
    settings = replace(settings, index=replace(settings.index, compact_small_shards=3))
    images: dict[str, bytes] = {}
    reasons = []
    for run in range(4):
        images |= {f"{run}-{i}.png": world.png(10 * run + i) for i in range(5)}
        write_folder(base, images)
        reasons.append(reindex_run.reindex(settings)["compacted"])
    assert [bool(reason) for reason in reasons].count(True) >= 1
    assert len(open_index(f"{root}/indexes/photos").manifest["shards"]) < 4
    same_answers(root, images)
    assert reindex_run.reindex(settings)["encoded"] == 0  # sizes and stamps went with the rows


def test_a_refused_increment_waits_and_what_is_served_stays(tmp_path: Path) -> None:
    root, base = (tmp_path / "root").as_uri(), tmp_path / "images"
    images = {f"{i}.png": world.png(i) for i in range(20)}
    world.write(base, images)
    world.empty_index(root)
    settings = replace(world.settings_of(root, base), gate=GateSettings())
    reindex_run.reindex(settings)
    for i in range(10):
        (base / f"{i}.png").unlink()
    with pytest.raises(Refused, match="10 rows, 20 are served"):
        reindex_run.reindex(settings)
    same_answers(root, images)
