"""The gate before a commit, candidates, and the switch to a new model, on disk and on S3, against brute force."""

import pickle
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from hashdist.ground.bits import hamming
from hashdist.ground.errors import Conflict, InvalidInput, NotFound, Refused
from hashdist.ground.ids import image_ids
from hashdist.ground.settings import IndexSettings
from hashdist.index import Index, create_index, open_index
from hashdist.index.candidate import Gate
from hashdist.index.manifest import content, files, successor
from hashdist.index.promotion import discard, promote
from hashdist.index.search import scanning
from hashdist.index.shards.shard import Rows, write_shard
from hashdist.index.upkeep.compaction import compact
from hashdist.index.view import View
from tests.worlds.index import names, random_codes

Codes = NDArray[np.uint8]


def report(passed: bool, **more: Any) -> dict[str, Any]:
    checks = [
        {"name": "probes", "passed": passed, "value": 0.5, "limit": 0.999, "text": "half of them differ"},
        {"name": "counts", "passed": True, "value": 10, "limit": 5, "text": "enough"},
    ]
    return {"passed": passed, "checks": checks, **more}


def says(passed: bool, **more: Any) -> Gate:
    return lambda served, proposed: report(passed, **more)


def publish(index: Index, codes: Codes, keys: list[str], model: str, gate: Gate | None, shards: int = 2) -> int:
    """A whole new content, as `hashdist index build` commits it."""
    new = index.versions.new_attempt()
    ids = image_ids(keys)
    written = [
        write_shard(
            index.store,
            lambda suffix: new.new("shards", suffix),
            Rows(ids[r], codes[r], [keys[i] for i in r], pa.table({})),
        )
        for r in np.array_split(np.arange(len(keys)), shards)
    ]
    lineage = {"inputs": {"codes": {"uri": "c", "digest": model}}, "built_from": model}
    return index.publish(
        written, bits=codes.shape[1] * 8, salts={}, model=model, model_uri=f"u/{model}", lineage=lineage, gate=gate
    )


def holds(index: Index, wanted: dict[str, Codes]) -> None:
    assert sorted(index.keys()) == sorted(wanted)
    assert index.rows == len(wanted)
    if wanted:
        np.testing.assert_array_equal(index.codes_of(list(wanted)), np.stack(list(wanted.values())))


def test_what_passes_is_committed_with_its_report(uri: str) -> None:
    index = create_index(uri, bits=64, model="m1")
    seen: list[tuple[View, View]] = []

    def gate(served: View, proposed: View) -> dict[str, Any]:
        seen.append((served, proposed))
        near = scanning.nearest(
            proposed, random_codes(3), 1
        )  # its files are written: it can be searched before the commit
        assert near.distances_QK.ravel().tolist() == [0, 0, 0]
        return report(True, quality={"recall": 0.25})

    done = index.apply(random_codes(20), names(20), gate=gate)
    assert (done.version, done.added) == (2, 20)
    assert [(s.number, p.number) for s, p in seen] == [(1, 2)]
    assert index.manifest["gate"] == report(True)
    assert index.manifest["quality"] == {"recall": 0.25}
    assert open_index(uri).manifest["gate"]["passed"] is True
    index.append(random_codes(2, seed=3), names(2, "other"))
    assert "gate" not in index.manifest
    assert index.manifest["quality"] == {"recall": 0.25}


def test_what_does_not_pass_waits_as_a_candidate(uri: str) -> None:
    codes, keys = random_codes(20), names(20)
    index = create_index(uri, bits=64, model="m1")
    index.append(codes, keys)
    served = content(index.manifest)
    with pytest.raises(Refused, match="probes: half of them differ") as error:
        index.apply(random_codes(5, seed=1), names(5, "new"), removed=keys[:3], gate=says(False, quality={"x": 1.0}))
    assert "counts" not in str(error.value)
    assert error.value.exit_code == 1
    for opened in (index, open_index(uri)):
        assert opened.version == 3
        assert content(opened.manifest) == served
        assert opened.manifest["operation"] == "candidate"
        holds(opened, dict(zip(keys, codes, strict=True)))
    wanted = dict(zip(keys[3:], codes[3:], strict=True)) | dict(
        zip(names(5, "new"), random_codes(5, seed=1), strict=True)
    )
    waiting = pickle.loads(pickle.dumps(open_index(uri, candidate=True)))
    holds(waiting, wanted)
    assert waiting.search(random_codes(1, seed=1), 1).keys() == [["new0"]]
    with pytest.raises(InvalidInput, match="opened at version 3"):
        waiting.delete(keys)
    named = {entry["path"] for entry in files(index.manifest)}
    assert {entry["path"] for entry in files(waiting.manifest)} <= named  # a vacuum keeps what the candidate names
    with pytest.raises(Refused, match="half of them differ"):
        promote(index)
    assert index.version == 3
    assert promote(index, force=True, reason="looked at it") == 4
    holds(open_index(uri), wanted)
    assert index.manifest["forced"] == {"reason": "looked at it", "failed": ["probes"]}
    assert (index.manifest["promoted"], index.manifest["added"], index.manifest["removed"]) == ({"upon": 2}, 5, 3)
    assert index.manifest["quality"] == {"x": 1.0}
    assert "candidate" not in index.manifest
    with pytest.raises(NotFound, match="no candidate waits"):
        promote(index, force=True)


def test_discarding_leaves_what_is_served(uri: str) -> None:
    codes, keys = random_codes(20), names(20)
    index = create_index(uri, bits=64, model="m1")
    with pytest.raises(NotFound, match="no candidate waits"):
        discard(index)
    with pytest.raises(NotFound, match="no candidate waits"):
        open_index(uri, candidate=True)
    index.append(codes, keys)
    with pytest.raises(Refused):
        index.apply(random_codes(5, seed=1), names(5, "new"), gate=says(False))
    assert discard(index) == 4
    assert "candidate" not in index.manifest
    holds(open_index(uri), dict(zip(keys, codes, strict=True)))


def test_a_candidate_is_put_to_the_gate_again_and_a_later_one_that_passes_replaces_it(uri: str) -> None:
    index = create_index(uri, bits=64, model="m1")
    index.append(random_codes(20), names(20))
    with pytest.raises(Refused):
        index.apply(random_codes(5, seed=1), names(5, "new"), gate=says(False))
    seen: list[int] = []

    def again(served: View, proposed: View) -> dict[str, Any]:
        seen.append(proposed.manifest["rows"] - served.manifest["rows"])
        return report(True, quality={"recall": 0.5})

    assert promote(index, again) == 4
    assert seen == [5]
    assert (index.rows, index.manifest["gate"]["passed"], index.manifest["quality"]) == (25, True, {"recall": 0.5})
    assert "forced" not in index.manifest
    with pytest.raises(Refused):
        index.apply(random_codes(5, seed=2), names(5, "more"), gate=says(False))
    index.apply(random_codes(7, seed=2), names(7, "more"), gate=says(True))
    assert index.rows == 32
    assert "candidate" not in index.manifest


def test_a_candidate_is_not_promoted_over_rows_that_came_since(uri: str) -> None:
    codes, keys = random_codes(20), names(20)
    index = create_index(uri, bits=64, model="m1")
    index.append(codes, keys)
    with pytest.raises(Refused):
        index.apply(random_codes(5, seed=1), names(5, "new"), gate=says(False))
    other = open_index(uri)
    other.append(random_codes(1, seed=7), ["late"])
    for force in (False, True):
        with pytest.raises(Conflict, match="version 4 changed the served rows since"):
            promote(index, says(True), force=force)
    holds(open_index(uri), dict(zip(keys, codes, strict=True)) | {"late": random_codes(1, seed=7)[0]})
    assert discard(index) == 5


def test_a_gate_sees_the_version_that_another_writer_brought(uri: str) -> None:
    """The gate is asked again about what will stand, not about what would have stood."""
    one, other = create_index(uri, bits=64, model="m1"), open_index(uri)
    other.append(random_codes(4, seed=9), names(4, "other"))
    rows = []

    def gate(served: View, proposed: View) -> dict[str, Any]:
        rows.append((served.manifest["rows"], proposed.manifest["rows"], len(proposed.shards)))
        return report(True)

    one.apply(random_codes(5), names(5), gate=gate)
    assert rows == [(0, 5, 1), (4, 9, 2)]


def test_a_new_model_is_switched_to_by_one_commit(uri: str) -> None:
    """Threads that search during the switch see the old model's content or the new one's, whole, and nothing else."""
    keys, before, after = names(300), random_codes(300), random_codes(300, bits=32, seed=1)
    index = create_index(uri, bits=64)
    publish(index, before, keys, "m1", says(True))
    with pytest.raises(Refused):
        publish(index, after[::-1], keys, "bad", says(False))
    assert (index.model, index.bits, open_index(uri, candidate=True).model) == ("m1", 64, "bad")
    searcher, old_view = open_index(uri), open_index(uri).view
    stop, seen, wrong = threading.Event(), set(), []
    ids = image_ids(keys)
    wanted = {
        bits: [int(ids[i]) for i in np.lexsort((ids, hamming(codes[5], codes)))[:10]]
        for bits, codes in ((64, before), (32, after))
    }
    queries = {64: before[5:6], 32: after[5:6]}

    def ask() -> None:
        while not stop.is_set():
            view = searcher.view
            bits = int(view.manifest["bits"])
            found = scanning.nearest(view, queries[bits], 10)
            seen.add((bits, view.manifest["model"]))
            if found.rows_QK[0].tolist() != wanted[bits]:
                wrong.append((bits, found))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    publish(index, after, keys, "m2", says(True))
    searcher.refresh()
    assert searcher.model == "m2"
    while (32, "m2") not in seen and not wrong:
        time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen <= {(64, "m1"), (32, "m2")}
    assert "candidate" not in index.manifest
    assert (
        scanning.nearest(old_view, queries[64], 10).rows_QK[0].tolist() == wanted[64]
    )  # who holds the old one goes on with it
    holds(open_index(uri), dict(zip(keys, after, strict=True)))


def test_the_older_version_of_a_content_is_one_commit_away(uri: str) -> None:
    """Promotion of one that was made upon the served content, after tags and such that left it as it was."""
    keys, before, after = names(50), random_codes(50), random_codes(50, bits=32, seed=1)
    index = create_index(uri, bits=64)
    publish(index, before, keys, "m1", None)
    with pytest.raises(Refused):
        publish(index, after, keys, "m2", says(False))
    index.transact(lambda view, tried: _as_is(view))
    assert promote(index, force=True, reason="by eye") == index.version
    holds(open_index(uri), dict(zip(keys, after, strict=True)))
    assert (index.bits, index.model, index.model_uri, index.manifest["built_from"]) == (32, "m2", "u/m2", "m2")
    holds(open_index(uri, version=2), dict(zip(keys, before, strict=True)))


def test_a_compaction_is_no_obstacle_to_a_candidate(uri: str) -> None:
    codes, keys = random_codes(60), names(60)
    index = create_index(uri, bits=64, model="m1")
    for part in np.array_split(np.arange(60), 3):
        index.append(codes[part], [keys[row] for row in part])
    with pytest.raises(Refused):
        index.apply(random_codes(5, seed=1), names(5, "new"), removed=keys[:3], gate=says(False))
    compact(index, IndexSettings(compact_small_shards=2))
    assert len(index.view.shards) == 1
    promote(index, force=True)
    holds(open_index(uri), dict(zip(keys[3:] + names(5, "new"), [*codes[3:], *random_codes(5, seed=1)], strict=True)))


def _as_is(view: View) -> dict[str, Any]:
    return successor(view.version, "tag", kept={"tags": {"here": view.number}})
