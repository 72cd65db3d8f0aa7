"""Filters, two-stage ranking and the search command against a dict and brute force."""

import ctypes
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import hashdist
from hashdist import cli
from hashdist.commands import search as search_command
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_id
from hashdist.index import Index, create_index, open_index
from hashdist.index.search import filters
from hashdist.index.search.filters import column, ids, keys
from hashdist.index.search.where import parse
from hashdist.index.shards.shard import Rows, write_shard
from hashdist.reindex import run as reindex_run
from tests.worlds import index as index_world
from tests.worlds import reindex as growth_world

Codes = NDArray[np.uint8]
Row = dict[str, Any]
ROWS = 400
random_codes = partial(index_world.random_codes, bits=32)


def rows_of(n: int = ROWS, seed: int = 0) -> list[Row]:
    """Images with columns of every kind, nulls in all of them, and codes of few kinds so that ties are the rule."""
    rng = np.random.default_rng(seed)
    codes = random_codes(12, seed=seed)[rng.integers(0, 12, n)]
    made = []
    for row in range(n):
        values = {
            "labels": [int(label) for label in rng.choice(8, rng.integers(0, 4), replace=False)],
            "taken": 2000 + int(rng.integers(0, 25)),
            "score": float(np.round(rng.random(), 3)),
            "camera": f"cam {rng.integers(0, 4)}",
            "public": bool(rng.random() < 0.5),
            "day": datetime.date(2024, 1, 1) + datetime.timedelta(int(rng.integers(0, 60))),
        }
        kept = {name: None if rng.random() < 0.1 else value for name, value in values.items()}
        made.append({"key": f"d/{row}.png", "code": codes[row], "place": row, **kept})
    return made


COLUMNS = pa.schema(
    [
        ("labels", pa.list_(pa.int32())),
        ("taken", pa.int64()),
        ("score", pa.float64()),
        ("camera", pa.string()),
        ("public", pa.bool_()),
        ("day", pa.date32()),
    ]
)


def columns_of(rows: list[Row]) -> pa.Table:
    return pa.table({f.name: pa.array([row[f.name] for row in rows], f.type) for f in COLUMNS}, schema=COLUMNS)


def add(index: Index, rows: list[Row]) -> None:
    codes, names = np.stack([row["code"] for row in rows]), [row["key"] for row in rows]
    index.append(codes, names, columns_of(rows), on_existing="replace")


def made(uri: str, shards: int) -> tuple[Index, list[Row]]:
    """An index after appends, replacements and deletions, and its live rows."""
    index, rows = create_index(uri, bits=32), rows_of()
    for part in np.array_split(np.arange(ROWS), shards):
        add(index, [rows[row] for row in part])
    changed = [{**new, "key": rows[at]["key"]} for at, new in zip(range(30, 50), rows_of(20, seed=5), strict=True)]
    add(index, changed)
    index.delete([row["key"] for row in rows[100:140]])
    return index, [*rows[:30], *changed, *rows[50:100], *rows[140:]]


def nearest(rows: list[Row], query: Codes, k: int) -> list[tuple[int, int, str]]:
    distances = ((int(np.bitwise_count(row["code"] ^ query).sum()), image_id(row["key"]), row["key"]) for row in rows)
    return sorted(distances)[:k]


def check(index: Index, rows: list[Row], where: Any, k: int = 9) -> None:
    """Searches within a filter give what brute force over the rows that match gives."""
    queries = np.concatenate([rows_of(2)[1]["code"][None], random_codes(2, seed=8)])
    hits, near = index.search(queries, k, where), index.search_within(queries, 11, where)
    assert hits.ids.shape == (len(queries), min(k, len(rows)))
    for q, query in enumerate(queries):
        found = list(zip(hits.distances[q].tolist(), hits.ids[q].tolist(), hits.keys()[q], strict=True))
        assert found == nearest(rows, query, k)
        span = slice(near.offsets[q], near.offsets[q + 1])
        ball = list(zip(near.distances[span].tolist(), near.ids[span].tolist(), near.keys()[q], strict=True))
        assert ball == [row for row in nearest(rows, query, len(rows)) if row[0] <= 11]


def known(name: str, test: Callable[[Any], bool]) -> Callable[[Row], bool]:
    """A predicate that null never matches."""
    return lambda row: row[name] is not None and test(row[name])


SOME = [f"d/{row}.png" for row in (1, 35, 120, 300, 399, 9999)]
CASES: list[tuple[Any, Callable[[Row], bool]]] = [
    (keys(SOME), lambda row: row["key"] in SOME),
    (keys(SOME, keep=False), lambda row: row["key"] not in SOME),
    (keys([]), lambda row: False),
    (ids([image_id(key) for key in SOME]), lambda row: row["key"] in SOME),
    (ids(np.array([image_id(key) for key in SOME]), keep=False), lambda row: row["key"] not in SOME),
    ("key in d/1.png, 'd/35.png'", lambda row: row["key"] in SOME[:2]),
    ("key != d/1.png", lambda row: row["key"] != SOME[0]),
    (f"id not in {image_id(SOME[0])}", lambda row: row["key"] != SOME[0]),
    ("label in 3,5", known("labels", lambda v: bool({3, 5} & set(v)))),
    ("labels all 3,5", known("labels", lambda v: {3, 5} <= set(v))),
    ("labels not in 0,1,2,3", known("labels", lambda v: not {0, 1, 2, 3} & set(v))),
    ("taken == 2003", known("taken", lambda v: v == 2003)),
    ("taken != 2003", known("taken", lambda v: v != 2003)),
    ("taken in 2003,2004", known("taken", lambda v: v in (2003, 2004))),
    ("taken not in 2003,2004", known("taken", lambda v: v not in (2003, 2004))),
    ("taken between 2003 and 2006", known("taken", lambda v: 2003 <= v <= 2006)),
    ("taken > 2020", known("taken", lambda v: v > 2020)),
    ("taken >= 2010.5", known("taken", lambda v: v >= 2010.5)),
    ("score<.25", known("score", lambda v: v < 0.25)),
    ("score <= 1", known("score", lambda v: v <= 1)),
    ("camera == 'cam 2'", known("camera", lambda v: v == "cam 2")),
    ('camera in "cam 2", "cam 3"', known("camera", lambda v: v in ("cam 2", "cam 3"))),
    ("public == true", known("public", lambda v: v)),
    ("day >= 2024-02-10", known("day", lambda v: v >= datetime.date(2024, 2, 10))),
    (column("day", "<", datetime.date(2024, 1, 9)), known("day", lambda v: v < datetime.date(2024, 1, 9))),
    (column("taken", "<", 1900), lambda row: False),
    (
        "label in 3,5 and taken between 2005 and 2020 and key not in d/3.png and public == false",
        lambda row: (
            known("labels", lambda v: bool({3, 5} & set(v)))(row)
            and known("taken", lambda v: 2005 <= v <= 2020)(row)
            and row["key"] != "d/3.png"
            and row["public"] is False
        ),
    ),
    (
        keys(SOME, keep=False) & column("labels", "in", 3),
        lambda row: row["key"] not in SOME and 3 in (row["labels"] or []),
    ),
]


@pytest.mark.parametrize("shards", [1, 40])
def test_filters_equal_brute_force(tmp_path: Path, shards: int) -> None:
    index, rows = made(str(tmp_path / "index"), shards)
    check(index, rows, None)
    for where, matches in CASES:
        check(index, [row for row in rows if matches(row)], where)
    check(index, [row for row in rows if row["taken"] == 2003], "taken == 2003", k=1000)


def test_filters_of_other_versions_and_on_any_store(root_uri: str) -> None:
    index, rows = made(f"{root_uri}/index", 3)
    old = index.version
    add(index, [{**rows[0], "taken": 2050}])
    check(index, [{**rows[0]}], "taken == 2050")
    check(open_index(index.uri), [rows[0]], "taken > 2049")
    check(open_index(index.uri, version=old), [], "taken > 2049")


def test_a_column_that_only_some_shards_have(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=32)
    rows = rows_of(30)
    codes = np.stack([row["code"] for row in rows])
    index.append(codes[:10], [row["key"] for row in rows[:10]])
    index.append(codes[10:20], [row["key"] for row in rows[10:20]], {"owner": ["me"] * 10})
    index.append(codes[20:], [row["key"] for row in rows[20:]], {"owner": [None] * 10, "other": [1] * 10})
    check(index, rows[10:20], "owner == me")
    check(index, [], "owner != me")
    check(index, rows[20:], "other >= 0")


def test_a_filter_is_evaluated_once_for_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = made(str(tmp_path / "index"), 4)
    calls: list[Any] = []
    own = filters.select
    monkeypatch.setattr(filters, "select", lambda *args: calls.append(args) or own(*args))
    for _ in range(3):
        index.search(random_codes(2), 3, "taken > 2010")
        index.search(random_codes(2), 3, parse("taken > 2010"))
    assert len(calls) == 1
    for year in range(filters._KEPT + 1):
        index.search(random_codes(2), 3, f"taken > {year}")
    index.search(random_codes(2), 3, "taken > 2010")
    assert len(calls) == 2 + filters._KEPT + 1


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("labl in 3", "no column `labl` to filter by; the columns are: camera, day, labels, public, score, taken"),
        ("taken >= x", "column `taken` holds int64, which cannot be compared with 'x'"),
        ("camera == 3", "cannot be compared with 3; put the number in quotes"),
        ("public == 1", "holds bool, which cannot be compared with 1"),
        ("day > soon", "which cannot be compared with 'soon'"),
        ("labels == 3", "`==` cannot be asked of it; use one of: in, not in, all"),
        ("taken all 3", "`all` cannot be asked of it; use one of: ==, !="),
        ("labels in x", "column `labels` holds int32"),
        ("", "the name of a column, `key` or `id` must come next, found the end"),
        ("taken", "one of ==, !=, <, <=, >, >=, between, in, not in, all must come next, found the end"),
        ("taken = 3", "cannot read '= 3'"),
        ("taken >", "a value must come next, found the end"),
        ("taken > 3 4", "`and` or the end must come next, found '4'"),
        ("taken > 3 or taken < 2", "`and` or the end must come next, found 'or'"),
        ("taken between 3", "`and` and a second value must come next"),
        ("taken in 3,", "a value must come next"),
        ("key > a", "by ==, !=, in and not in, not by >"),
        ("id == x", "an id is a whole number"),
    ],
)
def test_filters_that_make_no_sense_say_so(tmp_path: Path, where: str, told: str) -> None:
    index, _ = made(str(tmp_path / "index"), 2)
    with pytest.raises(InvalidInput) as caught:
        index.search(random_codes(1), 3, where)
    assert told in str(caught.value)


def test_arguments_of_filters_are_checked() -> None:
    for wrong in (
        lambda: column("a", "~", 1),  # type: ignore[arg-type]
        lambda: column("a", "between", [1]),
        lambda: column("a", "all", []),
        lambda: keys("abc"),
        lambda: keys([""]),
    ):
        with pytest.raises(InvalidInput):
            wrong()
    assert parse("taken in 1,2") == column("taken", "in", [1, 2])
    assert hash(keys(["a", "b"])) == hash(keys(["b", "a", "b"]))
    assert keys(["a"]) != keys(["a"], keep=False)
    assert ids([1]) != ids([2])


# Many shards, many threads, nothing to write to


def test_five_hundred_shards_answer_as_one_does(tmp_path: Path) -> None:
    codes = random_codes(7, bits=16)[np.random.default_rng(3).integers(0, 7, 1000)]
    names = [f"k{row}" for row in range(1000)]
    every, parity = np.array([image_id(name) for name in names]), pa.table({"parity": [row % 2 for row in range(1000)]})
    many, one = (create_index(str(tmp_path / name), bits=16) for name in ("many", "one"))
    one.append(codes, names, parity)
    attempt = many.versions.new_attempt()
    parts = (
        Rows(every[p], codes[p], [names[row] for row in p], parity.take(p)) for p in np.split(np.arange(1000), 500)
    )
    shards = [write_shard(many.store, partial(attempt.new, "shards"), part) for part in parts]
    many.publish(shards, bits=16, salts={}, model="m", model_uri="file:///m", lineage={})
    assert len(many.manifest["shards"]) == 500
    queries = random_codes(5, bits=16, seed=1)
    for where in (None, "parity == 1", keys(names[:700:7])):
        for k in (1, 60, 2000):
            together, apart = one.search(queries, k, where), many.search(queries, k, where)
            np.testing.assert_array_equal(together.ids, apart.ids)
            np.testing.assert_array_equal(together.distances, apart.distances)
            single = np.concatenate([many.search(query[None], k, where).ids for query in queries])
            np.testing.assert_array_equal(single, apart.ids)
        np.testing.assert_array_equal(
            one.search_within(queries, 6, where).ids, many.search_within(queries, 6, where).ids
        )


def test_eight_threads_search_at_once(tmp_path: Path) -> None:
    index, _ = made(str(tmp_path / "index"), 5)
    queries = random_codes(6, seed=4)
    cases = [None, "taken > 2010", "label in 1,2", keys(SOME)]
    alone = [open_index(index.uri).search(queries, 20, where) for where in cases]

    def ask(number: int) -> None:
        which = number % len(cases)
        hits = index.search(queries, 20, cases[which])
        np.testing.assert_array_equal(hits.ids, alone[which].ids)
        assert hits.keys() == alone[which].keys()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(64)))


READ_ONLY = """
import json, os, sys
import numpy as np
import hashdist
from hashdist.index import open_index
queries = np.arange(24, dtype=np.uint8).reshape(6, 4)
answers = []
for uri in sys.argv[1:3]:
    index = open_index(uri)
    answers += [index.search(queries, 7, where).ids.tolist() for where in (None, "taken > 2010")]
    answers += [index.search(queries, 7, engine="faiss").keys()]
for folder in [*sys.argv[3:], os.path.dirname(hashdist.__file__)]:
    assert not os.access(folder, os.W_OK), folder
print(json.dumps(answers))
"""


def without_privileges() -> None:
    """Makes permissions of files bind root as well: takes the right to pass over them from what is executed next."""
    if os.getuid() == 0:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.skipif(sys.platform != "linux", reason="permissions are put on by Linux means")
def test_a_search_needs_nothing_to_write_to(tmp_path: Path, s3_endpoint: str) -> None:
    """Indexes, cache folder, home and the package's own folder (where numba caches) cannot be written."""
    locked = tmp_path / "locked"
    locked.mkdir()
    package = Path(hashdist.__file__).parent
    shutil.copytree(package, locked / "hashdist", ignore=shutil.ignore_patterns("__pycache__"))
    opened = [made(uri, 3)[0] for uri in (str(locked / "index"), f"s3://hashdist/locked-{os.urandom(4).hex()}")]
    queries = np.arange(24, dtype=np.uint8).reshape(6, 4)
    wanted: list[Any] = []
    for index in opened:
        wanted += [index.search(queries, 7, where).ids.tolist() for where in (None, "taken > 2010")]
        wanted += [index.search(queries, 7).keys()]
    for path in [locked, *locked.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    places = {"HOME": locked, "HASHDIST_CACHE": locked / "cache", "NUMBA_CACHE_DIR": locked / "numba"}
    environment = {**os.environ, **{k: str(v) for k, v in places.items()}, "PYTHONPATH": str(locked)}
    words = [sys.executable, "-B", "-c", READ_ONLY, *(index.uri for index in opened), str(locked / "index")]
    try:
        done = subprocess.run(
            words,
            env=environment,
            cwd=locked,
            preexec_fn=without_privileges,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        for path in [locked, *locked.rglob("*")]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


# Two-stage ranking


def features_of(n: int, width: int = 24, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(6, width))[rng.integers(0, 6, n)] + 0.3 * rng.normal(size=(n, width))).astype(np.float32)


def with_features(folder: Path, shards: int = 3) -> tuple[Index, NDArray[np.float32], list[str]]:
    index = create_index(str(folder / "index"), bits=32)
    features, codes = features_of(300), rows_of(300)
    names = [row["key"] for row in codes]
    for part in np.array_split(np.arange(300), shards):
        index.apply(
            np.stack([codes[row]["code"] for row in part]),
            [names[row] for row in part],
            {"place": part},
            rerank=features[part],
        )
    index.delete(names[250:])
    return index, features[:250], names[:250]


def by_cosine(
    features: NDArray[Any], names: list[str], query: NDArray[Any], among: list[int]
) -> list[tuple[float, int]]:
    """(minus cosine of what is kept, id) in float64, another way than the index computes it."""
    kept = features.astype(np.float64)
    kept = (kept / np.linalg.norm(kept, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    cosines = kept @ query.astype(np.float64) / np.linalg.norm(kept, axis=1) / np.linalg.norm(query)
    return sorted((-float(cosines[row]), image_id(names[row])) for row in among)


@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("where", [None, "place >= 100"])
def test_candidates_are_ordered_by_cosine(tmp_path: Path, shards: int, where: str | None) -> None:
    index, features, names = with_features(tmp_path, shards)
    codes = index.codes_of(names)
    ids_of = np.array([image_id(name) for name in names])
    rows = [row for row in range(250) if where is None or row >= 100]
    query_features, queries = features_of(4, seed=0), random_codes(4, seed=6)
    for k, candidates in ((1, 0), (5, 20), (12, 12), (20, 1000)):
        hits = index.search(queries, k, where, rerank=query_features, candidates=candidates)
        assert hits.scores is not None
        for q, query in enumerate(queries):
            distances = np.bitwise_count(codes ^ query).sum(1)
            among = sorted(rows, key=lambda row: (distances[row], ids_of[row]))[: candidates or 10 * k]
            wanted = by_cosine(features, names, query_features[q], among)[:k]
            np.testing.assert_allclose(-hits.scores[q], [score for score, _ in wanted], atol=1e-12)
            assert hits.ids[q].tolist() == [id_ for _, id_ in wanted]
            row_of = {id_: row for row, id_ in enumerate(ids_of.tolist())}
            assert hits.distances[q].tolist() == [int(distances[row_of[id_]]) for _, id_ in wanted]


def test_equal_cosines_come_by_id(tmp_path: Path) -> None:
    index = create_index(str(tmp_path / "index"), bits=32)
    names = [f"k{row}" for row in range(40)]
    for part in (slice(0, 15), slice(15, 40)):
        rows = len(names[part])
        index.apply(random_codes(rows, seed=rows), names[part], rerank=np.tile(np.float32([3, 4]), (rows, 1)))
    hits = index.search(random_codes(1), 40, rerank=np.float32([[6, 8.01]]), candidates=40)
    assert hits.ids[0].tolist() == sorted(image_id(name) for name in names)


def test_the_order_does_not_depend_on_batches(tmp_path: Path) -> None:
    index, features, _ = with_features(tmp_path)
    queries = random_codes(9, seed=2)
    together = index.search(queries, 6, rerank=features[:9])
    for q in range(9):
        alone = index.search(queries[q : q + 1], 6, rerank=features[q : q + 1])
        np.testing.assert_array_equal(alone.scores, together.scores[q : q + 1])  # type: ignore[index]
        np.testing.assert_array_equal(alone.ids[0], together.ids[q])


def test_features_are_kept_of_all_rows_or_of_none(tmp_path: Path) -> None:
    plain = create_index(str(tmp_path / "plain"), bits=32)
    plain.append(random_codes(3), ["a", "b", "c"])
    with pytest.raises(InvalidInput, match="keeps no features"):
        plain.search(random_codes(1), 1, rerank=np.ones((1, 4), np.float32))
    with pytest.raises(InvalidInput, match="keeps no features; build it"):
        plain.apply(random_codes(1), ["d"], rerank=np.ones((1, 4), np.float32))
    index, features, names = with_features(tmp_path)
    with pytest.raises(InvalidInput, match=r"keeps features of width 24 .* come without"):
        index.append(random_codes(1), ["new"])
    with pytest.raises(InvalidInput, match=r"\[1, 24\], found \(1, 4\)"):
        index.apply(random_codes(1), ["new"], rerank=np.ones((1, 4), np.float32))
    for wrong in (features[:1, :3], features[:2], np.full((1, 24), np.nan), np.ones((1, 24), np.int64)):
        with pytest.raises(InvalidInput, match="the features of the queries"):
            index.search(random_codes(1), 1, rerank=wrong)
    with pytest.raises(InvalidInput, match="at least k = 5 candidates"):
        index.search(random_codes(1), 5, rerank=features[:1], candidates=4)
    assert index.delete(names[:5]) == 5
    index.apply(random_codes(1), [names[0]], rerank=features[:1])
    nothing = np.empty((0, 4), np.uint8), np.empty((0, 0), np.float16)
    index.apply(nothing[0], [], removed=[names[6]], rerank=nothing[1])
    assert index.manifest["rerank"] == {"width": 24}
    assert index.search(random_codes(1), 1000, rerank=features[:1], candidates=1000).ids.shape == (1, 245)


def test_growth_keeps_features_and_a_picture_is_ranked_by_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model on raw pixels: the cosine of two pictures is that of their pixels."""
    root, images = tmp_path.as_uri(), tmp_path / "images"
    growth_world.empty_index(root)
    growth_world.write(images, {f"{number:02d}.png": growth_world.png(number) for number in range(20)})
    settings = growth_world.settings_of(root, images)
    reindex_run.reindex(replace(settings, index=replace(settings.index, rerank=True)))
    growth_world.write(images, {"03.png": growth_world.png(103), "new.png": growth_world.png(104)})
    grown = reindex_run.reindex(settings)  # what the index keeps is the index's matter
    assert (grown["added"], grown["changed"]) == (1, 1)
    index = open_index(f"{root}/indexes/photos")
    assert index.manifest["rerank"]["width"] == index.view.features(index.view.find(["new.png"]).ids).shape[1]
    flags = ["--root", root, "--index.name", "photos", "--k", "3", "--candidates", "20", "--rerank", "--json"]
    for name in ("07.png", "03.png", "new.png"):
        found = []
        for given in (["--image", str(images / name)], ["--key", name]):
            assert cli.main(["search", *flags, *given]) == 0
            found.append(json.loads(capsys.readouterr().out)["hits"])
        assert found[0][0]["key"] == found[1][0]["key"] == name
        assert found[0][0]["score"] == pytest.approx(1, abs=1e-6)
        assert [hit["key"] for hit in found[0]] == [hit["key"] for hit in found[1]]


# The command


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An index under a root, without a collection."""
    folder = tmp_path / "root"
    index, _, _ = with_features(folder / "indexes")
    assert Path(index.uri.removeprefix("file://")) == folder / "indexes" / "index"
    return folder


def run(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> dict[str, Any]:
    code = cli.main(["search", "--root", str(root), "--index.name", "index", "--json", *words])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (code == 0) == ("error" not in result)
    return result


def test_search_by_key_with_everything(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(str(root / "indexes" / "index"))
    code = index.codes_of(["d/7.png"])
    plain = run(capsys, root, "--key", "d/7.png", "--k", "4")
    assert [hit["key"] for hit in plain["hits"]] == index.search(code, 4).keys()[0]
    assert plain["code"] == code[0].tobytes().hex()
    assert plain["hits"][0]["uri"] is None
    without = run(capsys, root, "--key", "d/7.png", "--k", "4", "--exclude-self", "--where", "place < 50")
    wanted = [key for key in index.search(code, 250, "place < 50").keys()[0] if key != "d/7.png"][:4]
    assert [hit["key"] for hit in without["hits"]] == wanted
    ranked = run(capsys, root, "--key", "d/7.png", "--rerank", "--candidates", "50")
    assert ranked["hits"][0]["key"] == "d/7.png"
    assert ranked["hits"][0]["score"] == pytest.approx(1)
    ball = run(capsys, root, "--key", "d/7.png", "--radius", "9", "--engine", "multihash")
    assert [hit["key"] for hit in ball["hits"]] == index.search_within(code, 9).keys()[0]
    by_code = run(capsys, root, "--code", plain["code"], "--k", "4", "--engine", "faiss")
    assert by_code["hits"] == plain["hits"]


def test_many_queries_are_answered_line_by_line(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    index = open_index(str(root / "indexes" / "index"))
    code = random_codes(1, seed=11)
    file = tmp_path / "queries.txt"
    file.write_text(f"d/7.png\n\n{code[0].tobytes().hex()}\nd/9.png\n")
    result = run(capsys, root, "--queries", str(file), "--k", "3", "--exclude-self")
    assert [query.get("key") for query in result["queries"]] == ["d/7.png", None, "d/9.png"]
    assert [hit["key"] for hit in result["queries"][1]["hits"]] == index.search(code, 3).keys()[0]
    assert all(len(query["hits"]) == 3 for query in result["queries"])
    cli.main(["search", "--root", str(root), "--index.name", "index", "--queries", str(file), "--k", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert lines[0]["hits"] == run(capsys, root, "--key", "d/7.png", "--k", "3")["hits"]
    file.write_text("d/7.png\nnobody.png\n")
    assert "line 2" in run(capsys, root, "--queries", str(file))["error"]["message"]


@pytest.mark.parametrize("engine", ["ivf", "multihash", "faiss"])
def test_recall_of_an_engine_is_printed(root: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    recall = run(capsys, root, "--engine", engine, "--recall", "40", "--k", "5", "--probes", "1", "--flips", "0")[
        "recall"
    ]
    assert (recall["engine"], recall["k"]) == (engine, 5)
    assert 30 <= recall["queries"] <= 40  # some of the rows drawn are deleted
    assert 0.2 < recall["recall@5"] <= 1
    assert (recall["recall@5"] == 1) >= (engine == "faiss")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "one of --image, --key, --code or --queries is required, found none"),
        (["--key", "a", "--code", "00"], "found key and code"),
        (["--code", "zz"], "hexadecimal"),
        (["--code", "00"], "codes of 32 bits, found 8"),
        (["--code", "00000000", "--rerank"], "--rerank needs the features of a query"),
        (["--key", "d/1.png", "--radius", "3", "--rerank"], "leave --radius or --rerank out"),
        (["--code", "00000000", "--exclude-self"], "--exclude-self is for searches by --key"),
        (["--code", "00000000", "--engine", "x"], "the engine must be one of"),
        (["--key", "d/1.png", "--where", "size > 3"], "the columns are: place"),
        (["--image", "nobody.png"], "--image needs a file"),
        (["--queries", "nobody.txt"], "--queries needs a file"),
    ],
)
def test_what_cannot_be_asked(root: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert told in run(capsys, root, *words)["error"]["message"]


def test_a_key_that_is_not_there_names_keys_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"album{n % 3:02}/{10000 + n}.jpg" for n in range(30)] + ["gone/10003.jpg"]
    index = create_index((tmp_path / "r/indexes/images").as_uri(), bits=32)
    index.append(random_codes(20), names[:20])
    index.append(random_codes(11, seed=1), names[20:])
    index.delete(names[-1:])

    def told(*words: str) -> str:
        assert cli.main(["search", *words, "--root", str(tmp_path / "r")]) == 2
        return capsys.readouterr().err

    assert "keys like it: 'album00/10003.jpg'\n" in told("10003.jpg")
    assert "'album00/10003.jpg'" in told("--key", "ALBUM00/10003.JPG")
    assert "'album01/10025.jpg'" in told("--key", "another/10025.jpg")
    assert "'album02/10011.jpg'" in told("--key", "album02/10011.jpgg")
    assert "like it" not in told("--key", "ü")
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").touch()
    assert "--image searches" in told("--key", "photo.jpg")
    monkeypatch.setattr(search_command, "_NEAR_ROWS", 5)
    assert "album01/10025.jpg" not in told("10025.jpg")  # no more rows than these are looked at


def test_a_file_is_an_image_and_any_other_word_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = create_index((tmp_path / "i").as_uri(), bits=32)
    index.append(random_codes(3), ["a.jpg", "b.jpg", "c.jpg"])
    assert cli.main(["search", "b.jpg", "-k", "2", "--index.uri", index.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["bits", "key", "uri"]
    assert lines[2].split() == ["0", "b.jpg"]
    assert len(lines) == 4
    file = tmp_path / "photo.jpg"
    file.touch()
    assert cli.main(["search", str(file), "--index.uri", index.uri]) == 2
    assert "which model made it" in capsys.readouterr().err
