"""What the service follows its index by: versions swapped in by reference, refused, waited for; no Ray, real stores."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashdist.ground.errors import NotFound, Unavailable
from hashdist.index import create_index, open_index
from hashdist.index.upkeep.retention import vacuum
from hashdist.service.serving import Serving
from tests.worlds.faults import FaultyProxy
from tests.worlds.service import ServiceWorld

WAIT_S = 60


def until(reached: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < end, f"not within {WAIT_S} s: {what}"
        time.sleep(0.01)


@contextmanager
def following(uri: str, **more: Any) -> Iterator[Serving]:
    serving = Serving(uri, **{"refresh_s": 0.02, "held_versions": 2, **more})
    serving.start()
    try:
        yield serving
    finally:
        serving.close()


def serves(serving: Serving, version: int) -> Callable[[], bool]:
    return lambda: serving.state()[0] != "not ready" and serving.now.version == version


def answers(index: Any) -> list[tuple[str, int]]:
    hits = index.search(np.zeros((1, index.bits // 8), np.uint8), 20)
    return list(zip(hits.keys()[0], hits.distances[0].tolist(), strict=True))


def test_versions_are_swapped_in_and_one_that_was_taken_stays_what_it_is(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=30)
    prepared: list[str] = []

    def prepare(uri: str) -> Mapping[str, Any]:
        prepared.append(uri)
        return {"reads_images": True, "reason": ""}

    with following(world.uri, prepare=prepare) as serving:
        until(serves(serving, 2), "version 2")
        taken = serving.now
        before = answers(taken.index)
        for change in (world.add, world.delete, world.replace):
            version = change()
            until(serves(serving, version), f"version {version}")
            assert answers(serving.now.index) == answers(world.at(version))
        assert answers(taken.index) == before == answers(world.at(2))
        assert len(prepared) == 1
        version = world.switch_model()
        until(serves(serving, version), "the other model")
        assert prepared == [str(world.at(2).model_uri), str(world.at(version).model_uri)]
        assert serving.now.model == {"reads_images": True, "reason": ""}
        version = world.rollback(2)
        until(serves(serving, version), "rolled back")
        assert answers(serving.now.index) == before
        assert serving.state() == ("ready", [])


def test_older_versions_are_opened_when_asked_for_and_only_some_are_kept(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=20)
    for _ in range(3):
        world.add(2)
    with following(world.uri, held_versions=2) as serving:
        until(serves(serving, 5), "version 5")
        for version in (2, 3, 4, 2, 5):
            assert answers(serving.at(version).index) == answers(world.at(version))
            assert len(serving._older) <= 2
        assert serving.at(5) is serving.now
        assert serving.at(2) is serving.at(2)
        with pytest.raises(NotFound, match="versions are 1 to 5"):
            serving.at(77)


def test_an_index_that_does_not_exist_yet_is_waited_for(tmp_path: Path) -> None:
    uri = str(tmp_path / "root" / "indexes" / "photos")
    with following(uri) as serving:
        until(lambda: "holds no index" in serving.state()[1][0], "said so")
        assert serving.state()[0] == "not ready"
        with pytest.raises(Unavailable, match="holds no index"):
            _ = serving.now
        create_index(uri, 64)
        until(serves(serving, 1), "the new index")
        assert answers(serving.now.index) == []


def test_a_corrupt_version_is_refused_and_the_one_before_stays(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=30)
    with following(world.uri) as serving:
        until(serves(serving, 2), "version 2")
        before = answers(serving.now.index)
        bad = world.corrupt()
        until(lambda: serving.refused, "refused")
        state, reasons = serving.state()
        assert state == "degraded"
        assert f"version {bad} is refused: Corrupt" in reasons[0]
        assert serving.now.version == 2
        assert answers(serving.now.index) == before
        good = world.rollback(2)
        until(serves(serving, good), "the version after it")
        assert serving.state() == ("ready", [])


def test_a_corrupt_first_version_is_waited_out(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=10)
    world.corrupt()
    with following(world.uri) as serving:
        until(lambda: serving.refused, "refused")
        assert serving.state()[0] == "not ready"
        assert serving.alive
        good = world.rollback(2)
        until(serves(serving, good), "the version after it")


def test_a_store_that_is_away_changes_nothing_but_what_is_said(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ServiceWorld(tmp_path, images=30, root=f"s3://hashdist/{tmp_path.name}-away")
    with FaultyProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with following(world.uri) as serving:
            until(serves(serving, 2), "version 2")
            before = answers(serving.now.index)
            proxy.away = True
            until(lambda: serving.away_s > 0, "said so")
            state, reasons = serving.state()
            assert state == "degraded"
            assert "the store has not answered" in reasons[0]
            for _ in range(5):
                assert answers(serving.now.index) == before
            key = before[0][0]
            assert serving.now.index.search(serving.now.index.codes_of([key]), 1).distances[0, 0] == 0
            proxy.away = False
            version = world.add(3)
            until(serves(serving, version), "the version that was committed meanwhile")
            assert serving.state() == ("ready", [])
            assert serving.away_s == 0


def test_a_clean_up_spares_the_version_that_is_served(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=20)
    with following(world.uri, refresh_s=30.0) as serving:  # so that it does not move on
        until(serves(serving, 2), "version 2")
        world.switch_model()
        world.delete(1)
        vacuum(open_index(world.uri), 0, force=True)
        assert answers(open_index(world.uri, 2)) == answers(world.at(2))
    vacuum(open_index(world.uri), 0, force=True)
    with pytest.raises(NotFound):
        open_index(world.uri, 2)
