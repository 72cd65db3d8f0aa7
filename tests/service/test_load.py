"""The service under load while its index changes: no request fails, no answer mixes versions, memory stays flat."""

import asyncio
from pathlib import Path

import pytest

from tests.worlds.load import KINDS, Load, Memory, slope, under_load, watched
from tests.worlds.service import Service, ServiceWorld, serving

pytestmark = pytest.mark.cluster

_SETTINGS = {"images_per_s": 10_000.0, "waiting": 200}


def _whole(load: Load, swaps: int) -> None:
    print(load.text())
    assert load.failed == []
    assert load.wrong == []
    assert load.failures == 0
    assert len(load.swapped) == swaps
    assert set(load.swapped) <= set(load.versions), "a version that was served has answered nobody"
    assert set(load.asked) == set(KINDS)


def test_no_request_fails_and_no_answer_mixes_versions(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path)
    with serving(world, tmp_path, **_SETTINGS) as service:
        changes = [world.add, world.switch_model, world.replace, world.delete, lambda: world.rollback(3)]
        _whole(asyncio.run(under_load(world, service, changes, clients=8, seconds=10)), swaps=5)


@pytest.mark.full
def test_a_minute_with_ten_swaps_and_a_new_model(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=500)
    with serving(world, tmp_path, **_SETTINGS) as service:
        rows = [world.add, world.replace, world.delete, world.compact, world.replace]
        changes = [*rows, world.switch_model, *rows]
        _whole(asyncio.run(under_load(world, service, changes, clients=32, seconds=60)), swaps=11)


@pytest.mark.full
def test_memory_stays_flat_for_ten_minutes(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path, images=500)
    with serving(world, tmp_path, **_SETTINGS) as service:
        load, samples = asyncio.run(_watched_load(world, service, minutes=10))
        names = service.replicas()
    _whole(load, swaps=40)
    for pid, seen in samples.items():
        slopes = {what: slope(seen, what, warm_up_s=120) for what in ("rss", "pss", "anonymous")}
        print(names[pid], seen[0], seen[-1], "MB/min", slopes)
        assert slopes["anonymous"] < 1.0, f"{names[pid]} grows by {slopes['anonymous']:.2f} MB a minute"


async def _watched_load(world: ServiceWorld, service: Service, minutes: float) -> tuple[Load, dict[int, list[Memory]]]:
    """Load with four changes a minute that leave as much as there was."""
    samples: dict[int, list[Memory]] = {}
    watching = asyncio.create_task(watched(list(service.replicas()), 2.0, samples))
    changes = [world.add, world.replace, world.delete, world.compact] * int(minutes)
    load = await under_load(world, service, changes, clients=8, seconds=60 * minutes, pause_s=0.02)
    watching.cancel()
    return load, samples
