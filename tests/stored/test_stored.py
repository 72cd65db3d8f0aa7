"""What earlier releases wrote is opened, searched, grown and looked after: no release may lose what users have stored.

Each archive beside this file is a folder as its release left it, and says in `written.json` what everything answered
then (write.py). Only public names and commands are used here, as by those whose folders these could be.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import hashdist

Written = dict[str, Any]
Row = dict[str, Any]
Command = Callable[..., dict[str, Any]]

INDEXES = pytest.mark.parametrize("name", ["photos", "sheets", "given"])


def codes_of(rows: Sequence[Row]) -> NDArray[np.uint8]:
    """Recorded codes, uint8 [N, W]."""
    return np.array([list(bytes.fromhex(row["code"])) for row in rows], np.uint8)


def nearest(rows: Sequence[Row], query_W: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(distance, id) of all rows, ascending: the bits that differ, counted one by one."""
    if not rows:
        return []
    apart_N = np.unpackbits(codes_of(rows) ^ query_W, axis=1).sum(1)
    return sorted((int(apart), row["id"]) for apart, row in zip(apart_N, rows, strict=True))


def queries_of(about: Written) -> NDArray[np.uint8]:
    return codes_of([{"code": text} for text in about["queries"]])


def opened(about: Written, version: str) -> hashdist.Index:
    if version == "candidate":
        return hashdist.open_index(about["uri"], candidate=True)
    return hashdist.open_index(about["uri"], version=int(version))


def newest(about: Written) -> list[Row]:
    """The rows of the newest version."""
    rows: list[Row] = about["versions"][str(about["log"][-1]["version"])]["rows"]
    return rows


def column(index: hashdist.Index, name: str) -> dict[str, Any]:
    """A column of the live rows, by key."""
    rows = [row for table in index.tables([name] if name != "id" else []) for row in table.to_pylist()]
    return {row["key"]: row[name] for row in rows}


def contents(rows: Sequence[Row]) -> dict[str, str]:
    """Recorded codes in hexadecimal, by key."""
    return {row["key"]: row["code"] for row in rows}


def require_content(index: hashdist.Index, codes: Mapping[str, str], about: Written) -> None:
    """The index holds these codes (hexadecimal, by key), and finds the nearest of them exactly."""
    ids = column(index, "id")
    assert sorted(ids) == sorted(codes)
    assert index.rows == len(codes)
    found_NW = index.codes_of(list(codes)) if codes else []
    assert [code.tobytes().hex() for code in found_NW] == list(codes.values())
    rows = [{"id": ids[key], "code": code} for key, code in codes.items()]
    queries_QW = queries_of(about)
    hits = index.search(queries_QW, k=len(codes) or 1)
    for query_W, found, distances in zip(queries_QW, hits.ids, hits.distances, strict=True):
        assert list(zip(distances.tolist(), found.tolist(), strict=True)) == nearest(rows, query_W)


# Reading


@INDEXES
def test_every_version_holds_and_answers_what_it_did(written: Written, name: str) -> None:
    about = written[name]
    queries_QW = queries_of(about)
    assert hashdist.open_index(about["uri"]).log() == about["log"]
    assert len(about["versions"]) > 2
    for version, then in about["versions"].items():
        index = opened(about, version)
        columns = [field for field in (then["rows"] or [{}])[0] if field not in ("id", "key", "code")]
        rows = [row for table in index.tables(columns) for row in table.to_pylist()]
        assert rows == [{field: value for field, value in row.items() if field != "code"} for row in then["rows"]]
        require_content(index, contents(then["rows"]), about)
        filters = {"k": None, "where": about["where"]}
        for kind, (ids, distances) in then["answers"].items():
            hits = index.search(queries_QW, k=5, where=filters[kind])
            assert (hits.ids.tolist(), hits.distances.tolist()) == (ids, distances)


@INDEXES
def test_engines_and_radius_agree_with_the_scan(written: Written, name: str) -> None:
    about = written[name]
    queries_QW, rows = queries_of(about), newest(about)
    index = hashdist.open_index(about["uri"])
    hits = index.search(queries_QW, k=10, engine="faiss")
    within = index.search_within(queries_QW, radius=6)
    for number, query_W in enumerate(queries_QW):
        wanted = nearest(rows, query_W)
        assert list(zip(hits.distances[number].tolist(), hits.ids[number].tolist(), strict=True)) == wanted[:10]
        found = slice(within.offsets[number], within.offsets[number + 1])
        near = list(zip(within.distances[found].tolist(), within.ids[found].tolist(), strict=True))
        assert near == [hit for hit in wanted if hit[0] <= 6]


@INDEXES
def test_every_byte_is_as_it_was_committed(written: Written, command: Command, name: str) -> None:
    found = command("index verify", "--index.name", name)
    assert found["faults"] == []
    assert found["versions"] == sum(not version["expired"] for version in written[name]["log"])


def test_the_model_makes_the_codes_that_are_stored(written: Written) -> None:
    index = hashdist.open_index(written["photos"]["uri"])
    model = hashdist.load_model(str(index.model_uri))
    assert model.digest == index.model
    rows = newest(written["photos"])
    codes_NW = model.encode([Path("images", row["key"]) for row in rows])
    assert [code.tobytes().hex() for code in codes_NW] == [row["code"] for row in rows]


def test_pictures_features_and_listing_are_found_from_the_index(written: Written, command: Command) -> None:
    row = next(row for row in newest(written["photos"]) if row["key"].startswith("elm/"))
    by_image = command("search", "--image", f"images/{row['key']}", "--k", "5")
    assert by_image["code"] == row["code"]
    assert by_image["hits"][0]["distance"] == 0
    by_key = command("search", "--key", row["key"], "--k", "5", "--html", "sheet.html")
    assert by_key["hits"] == by_image["hits"]
    assert Path("sheet.html").read_text().count("data:image/png") > 1
    ranked = command("search", "--key", row["key"], "--k", "5", "--rerank")
    assert ranked["hits"][0]["key"] == row["key"]


def test_files_that_commands_wrote_are_taken_up(written: Written, command: Command) -> None:
    words = written["dedup"]
    fresh = command("dedup", *words, "--out", "fresh.parquet")
    again = command("dedup", *words, "--out", "again.parquet", "--previous", "clusters.parquet")
    assert again["joined"] == again["gone"] == 0
    assert fresh["clusters"] == again["clusters"] > 0
    vectors = command("protocol make", *written["vectors"], "--out", "vectors.json")
    assert vectors["digests"] == written["vectors_protocol"]
    os.rename("images", "grown")
    os.rename("first", "images")
    assert command("protocol check", "protocol.json")["digests"] == written["protocol"]
    cells = sorted(Path("root/compare/cells").iterdir())
    rows = command("compare", *written["compare"])["rows"]
    assert [{field: row[field] for field in ("name", "bits", "metrics")} for row in rows] == written["compared"]
    assert sorted(Path("root/compare/cells").iterdir()) == cells


# Growing


def test_an_index_of_own_codes_grows(written: Written, command: Command) -> None:
    about = written["given"]
    content = contents(newest(about))
    index = hashdist.open_index(about["uri"])
    new_NW = np.random.default_rng(3).integers(0, 256, (6, index.bits // 8), np.uint8)
    keys = [*list(content)[:2], "new 1", "new 2", "new 3", "new 4"]
    with pytest.raises(hashdist.AlreadyExists):
        index.append(new_NW, keys)
    columns = {"year": list(range(3030, 3036)), "tags": [["red"]] * 6}
    index.append(new_NW, keys, columns, on_existing="replace")
    content |= {key: code.tobytes().hex() for key, code in zip(keys, new_NW, strict=True)}
    gone = [list(content)[5], "new 4"]
    assert index.delete([*gone, "nobody"]).unknown == 1
    for key in gone:
        del content[key]
    require_content(index, content, about)
    hits = index.search(new_NW[:1], k=100, where="year >= 3030 and tags in red")
    assert set(hits.keys()[0]) == {*keys} - {*gone}

    given = ["--index.name", "given"]
    before, after = command("index compact", "--all", *given)["shards"]
    assert after < before
    require_content(hashdist.open_index(about["uri"]), content, about)
    command("index rollback", "--to", "early", *given)
    early = about["versions"][str(next(v["version"] for v in about["log"] if "early" in v["tags"]))]["rows"]
    require_content(hashdist.open_index(about["uri"]), contents(early), about)
    command("index tag", "late", *given)
    assert command("index verify", *given)["faults"] == []


def test_a_reader_that_is_still_there_is_spared_by_a_vacuum(written: Written, command: Command) -> None:
    words = ["--index.name", "given", "--older-than", "1s", "--force"]
    (pin,) = Path("root/indexes/given/pins").iterdir()
    os.utime(pin)
    spared = command("index vacuum", *words)
    (version,) = spared["pinned"]
    about = written["given"]
    rows = about["versions"][str(version)]["rows"]
    require_content(opened(about, str(version)), contents(rows), about)
    os.utime(pin, (1, 1))  # and was never renewed
    gone = command("index vacuum", *words)
    assert not gone["pinned"]
    assert not pin.exists()
    assert gone["foreign"] == 0
    with pytest.raises(hashdist.NotFound):
        opened(about, str(version))
    assert command("index verify", "--index.name", "given")["faults"] == []


def test_an_index_follows_its_collection(written: Written, command: Command) -> None:
    about = written["photos"]
    content = contents(newest(about))
    idle = command("reindex")
    assert [idle[count] for count in ("added", "changed", "removed", "encoded")] == [0, 0, 0, 0]
    assert idle["version"] == about["log"][-1]["version"]

    known = sorted(content)
    shutil.copyfile(f"images/{known[0]}", "images/ash/new.png")
    shutil.copyfile(f"images/{known[1]}", f"images/{known[-1]}")
    Path("images", known[2]).unlink()
    Path("images", "fir").mkdir()  # a label that is new
    shutil.copyfile(f"images/{known[0]}", "images/fir/new.png")
    done = command("reindex")
    assert [done[count] for count in ("added", "changed", "removed", "encoded")] == [2, 1, 1, 3]
    content |= {"ash/new.png": content[known[0]], "fir/new.png": content[known[0]], known[-1]: content[known[1]]}
    del content[known[2]]
    index = hashdist.open_index(about["uri"])
    require_content(index, content, about)
    labels = column(index, "labels")
    assert labels["ash/new.png"] == labels[known[0]]
    assert labels["fir/new.png"] not in [value for key, value in labels.items() if not key.startswith("fir/")]
    assert command("reindex")["version"] == done["version"]
    assert command("index verify")["faults"] == []


def test_an_index_follows_files_of_pictures(written: Written, command: Command) -> None:
    about = written["sheets"]
    content = contents(newest(about))
    idle = command("reindex", *written["sheets_words"])
    assert idle["version"] == about["log"][-1]["version"]
    assert idle["costs"]["listing"]["read"] == 0  # files that it knows stay shut
    table = pq.read_table("sheets/a.parquet")
    keys = table["id"].to_pylist()
    renamed = pa.table({"id": [f"again {key}" for key in keys], "image": table["image"], "labels": table["labels"]})
    pq.write_table(renamed, "sheets/c.parquet")
    done = command("reindex", *written["sheets_words"])
    assert [done[count] for count in ("added", "changed", "removed")] == [len(keys), 0, 0]
    content |= {f"again {key}": content[key] for key in keys}
    require_content(hashdist.open_index(about["uri"]), content, about)


def test_what_waits_is_promoted(written: Written, command: Command) -> None:
    about = written["photos"]
    waiting = contents(about["versions"]["candidate"]["rows"])
    assert waiting != contents(newest(about))
    command("index promote")
    require_content(hashdist.open_index(about["uri"]), waiting, about)


def test_versions_are_named_restored_compacted_and_erased_from(written: Written, command: Command) -> None:
    about = written["photos"]
    tags = {tag: version["version"] for version in about["log"] for tag in version["tags"]}
    first = contents(about["versions"][str(tags["first"])]["rows"])
    command("index discard")
    command("index rollback", "--to", "first")
    command("index tag", "restored")
    require_content(hashdist.open_index(about["uri"], version="restored"), first, about)
    command("index compact", "--all")
    require_content(hashdist.open_index(about["uri"]), first, about)
    key = min(first)
    command("index purge", key, "--reason", "asked for")
    del first[key]
    require_content(hashdist.open_index(about["uri"]), first, about)
    for version in about["versions"]:
        if version != "candidate":
            assert key not in set(opened(about, version).keys())
    assert command("index verify")["faults"] == []
