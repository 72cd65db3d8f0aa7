"""A listing against an index, in one partition and in many, against a dictionary."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ids import image_ids
from hashdist.index.notes import SEEN, last_of_each
from hashdist.reindex import difference as tested
from hashdist.reindex.difference import Spill, difference
from hashdist.reindex.inventory import LISTED

INDEXED = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.large_string()),
        ("digest", pa.string()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
    ]
)


def rows_of(content: dict[str, tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Rows id, key, then the values, by ascending id."""
    keys = list(content)
    columns = list(zip(*content.values(), strict=True)) or [()] * (len(schema) - 2)
    return pa.table([image_ids(keys), keys, *map(list, columns)], schema=schema).sort_by("id")


def between(table: pa.Table) -> tested.Indexed:
    ids = table["id"].to_numpy()
    return lambda first, last: table.filter(pa.array((ids >= first) & (ids <= last)))


def merged(
    listed: dict[str, tuple[int, str]],
    indexed: dict[str, tuple[str, int, str]],
    notes: dict[str, tuple[str | None, int, str, str]],
    *,
    most: int = 1 << 18,
    **more: Any,
) -> dict[str, Any]:
    table = rows_of(listed, LISTED)
    noted = rows_of({key: (*note, None) for key, note in notes.items()}, SEEN)
    with Spill(LISTED, most) as spill:
        for start in range(0, len(table), 3):
            spill.add(table.slice(start, 3))
        found = difference(spill, between(rows_of(indexed, INDEXED)), between(noted), len(indexed), **more)
    touched = zip(found.touched["key"].to_pylist(), found.touched["indexed_digest"].to_pylist(), strict=True)
    return {
        "new": sorted(found.new["key"].to_pylist()),
        "touched": sorted(touched),
        "removed": sorted(found.removed),
        "unchanged": found.unchanged,
        "failed": found.failed,
    }


def model(
    listed: dict[str, tuple[int, str]],
    indexed: dict[str, tuple[str, int, str]],
    notes: dict[str, tuple[str | None, int, str, str]],
    retry_failed: bool,
) -> dict[str, Any]:
    """What `difference` promises, image by image."""
    new, touched, unchanged, failed = [], [], 0, 0
    for key, seen in listed.items():
        row, note = indexed.get(key), notes.get(key)
        noted = note is not None and note[1:3] == seen
        if row and (row[1:] == seen or (noted and note[3] == "ok" and note[0] == row[0])):  # type: ignore[index]
            unchanged += 1
        elif noted and note[3] != "ok" and note[0] is not None and not retry_failed:  # type: ignore[index]
            failed += 1
        elif row:
            touched.append((key, row[0]))
        else:
            new.append(key)
    removed = [key for key in indexed if key not in listed]
    return {
        "new": sorted(new),
        "touched": sorted(touched),
        "removed": sorted(removed),
        "unchanged": unchanged,
        "failed": failed,
    }


KEYS = [f"key-{number}" for number in range(12)]
STAMP = st.tuples(st.integers(1, 2), st.sampled_from("st"))
WORLD = st.tuples(
    st.dictionaries(st.sampled_from(KEYS), STAMP),
    st.dictionaries(st.sampled_from(KEYS), st.tuples(st.sampled_from("de"), STAMP).map(lambda x: (x[0], *x[1]))),
    st.dictionaries(
        st.sampled_from(KEYS),
        st.tuples(st.sampled_from(["d", "e", None]), STAMP, st.sampled_from(["ok", "unreadable"])).map(
            lambda x: (x[0], *x[1], x[2])
        ),
    ),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(WORLD, st.sampled_from([1 << 18, 4]))
def test_the_difference_is_that_of_the_model(world: Any, most: int) -> None:
    listed, indexed, notes, retry = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tested, "PARTITIONS", 4)
        found = merged(listed, indexed, notes, most=most, retry_failed=retry)
    assert found == model(listed, indexed, notes, retry)


def test_many_partitions_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = [f"{number:05d}" for number in range(3000)]
    listed = {key: (int(rng.integers(3)), "s") for key in keys if rng.random() < 0.9}
    indexed = {key: (f"d{key}", int(rng.integers(3)), "s") for key in keys if rng.random() < 0.9}
    wanted = merged(listed, indexed, {})
    assert wanted == model(listed, indexed, {}, False)
    assert merged(listed, indexed, {}, most=100) == wanted
    monkeypatch.setattr(tested, "IN_MEMORY", 10)  # the index alone is too large for one partition
    assert merged(listed, indexed, {}) == wanted


def test_a_key_of_another_key_s_id_is_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ids of different keys: the join is on both, so nothing is taken for something else."""
    same = pa.table([[7, 7, 9], ["a", "b", "c"], [1, 1, 1], ["s"] * 3], schema=LISTED)
    indexed = pa.table([[7, 9], ["b", "x"], ["d", "d"], [1, 1], ["s", "s"]], schema=INDEXED)
    with Spill(LISTED) as spill:
        spill.add(same)
        found = difference(spill, between(indexed), between(SEEN.empty_table()), 2)
    assert (found.new["key"].to_pylist(), found.removed, found.unchanged) == (["a", "c"], ["x"], 1)


def test_a_key_listed_twice_is_refused() -> None:
    with Spill(LISTED, 2) as spill:
        for stamp in ("s", "t"):
            spill.add(rows_of({"a": (1, stamp), "b" + stamp: (1, "s")}, LISTED))
        with pytest.raises(InvalidInput, match="found 1 keys more than once, among them 'a'"):
            difference(spill, between(INDEXED.empty_table()), between(SEEN.empty_table()), 0)


def test_images_of_files_that_were_not_opened_stay() -> None:
    indexed = {"a": ("d", 1, "file:1"), "b": ("d", 1, "file:2"), "c": ("d", 1, "file:0"), "e": ("d", 1, "file:9")}
    notes = {"c": ("d", 1, "file:1", "ok"), "f": ("x", 1, "file:1", "unreadable")}
    found = merged({"b": (1, "file:3")}, indexed, notes, sources={"file:1"})
    assert found == {"new": [], "touched": [("b", "d")], "removed": ["e"], "unchanged": 2, "failed": 1}
    with pytest.raises(InvalidInput, match="among them 'a'"):
        merged({"a": (1, "file:3")}, indexed, notes, sources={"file:1"})


def test_spilt_rows_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Spill(LISTED, 5) as spill:
        spill.add(rows_of({f"{i}": (i, "s") for i in range(40)}, LISTED))
        assert list(tmp_path.iterdir())
        rows = [spill.partition(number, 256) for number in range(256)]
        assert sum(map(len, rows)) == spill.rows == 40
        del rows
    assert not list(tmp_path.iterdir())


def test_the_last_note_holds() -> None:
    def note(key: str, stamp: str) -> pa.Table:
        return rows_of({key: ("d", 1, stamp, "ok", None)}, SEEN)

    found = last_of_each([note("a", "1"), note("b", "1"), note("a", "2")])
    assert dict(zip(found["key"].to_pylist(), found["stamp"].to_pylist(), strict=True)) == {"a": "2", "b": "1"}
    assert (np.diff(found["id"].to_numpy()) > 0).all()
    assert len(last_of_each([])) == 0
