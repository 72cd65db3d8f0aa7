"""World sizes 1, 2 and 4 over torch.distributed (gloo, spawned processes): one start a world size, many checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from tests.worlds import gloo as gloo_work
from tests.worlds.training import relative_difference

pytestmark = pytest.mark.cluster

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What rank 0 of every world size found."""
    results: dict[int, dict[str, Any]] = {}
    for world_size in WORLDS:
        folder = tmp_path_factory.mktemp(f"gloo{world_size}")
        multiprocessing.spawn(gloo_work.rank_main, (world_size, str(folder)), nprocs=world_size)  # type: ignore[no-untyped-call]
        results[world_size] = torch.load(Path(folder) / "found.pt", weights_only=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results[1] = gloo_work.alone()
    torch.set_num_threads(threads)
    return results


@pytest.mark.parametrize("name", [*gloo_work.PAPERS, "dsah, own rows"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_gradients_of_50_images_are_those_of_one_process(found: dict[int, Any], world_size: int, name: str) -> None:
    assert relative_difference(found[1][f"gradient {name}"], found[world_size][f"gradient {name}"]) <= 1e-9


@pytest.mark.parametrize("world_size", [1, *WORLDS])
def test_both_recipes_of_dsah_agree(found: dict[int, Any], world_size: int) -> None:
    assert relative_difference(found[world_size]["gradient dsah"], found[world_size]["gradient dsah, own rows"]) <= 1e-9


@pytest.mark.parametrize("name", gloo_work.PAPERS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_whole_runs_end_with_the_weights_of_one_process(found: dict[int, Any], world_size: int, name: str) -> None:
    alone, there = found[1][f"weights {name}"], found[world_size][f"weights {name}"]
    assert max(relative_difference(alone[key], there[key]) for key in alone) <= 1e-9


@pytest.mark.parametrize("name", gloo_work.PAPERS)
@pytest.mark.parametrize("world_size", [1, *WORLDS])
def test_resumed_runs_end_with_the_same_bits(found: dict[int, Any], world_size: int, name: str) -> None:
    assert found[world_size][f"resumed {name}"]


@pytest.mark.parametrize("name", [name for name in gloo_work.WRONG if name != "right"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_wrong_recipes_differ(found: dict[int, Any], world_size: int, name: str) -> None:
    right = found[1]["wrong: right"]
    assert relative_difference(right, found[world_size]["wrong: right"]) <= 1e-9
    assert relative_difference(right, found[world_size][f"wrong: {name}"]) > 0.01


@pytest.mark.parametrize("world_size", WORLDS)
def test_thresholds_and_w_are_identical(found: dict[int, Any], world_size: int) -> None:
    assert found[world_size]["refresh"]["thresholds"] == found[1]["refresh"]["thresholds"]
    assert torch.equal(found[world_size]["refresh"]["w"], found[1]["refresh"]["w"])


@pytest.mark.parametrize("world_size", [1, *WORLDS])
def test_blocks_and_sums_travel_whole(found: dict[int, Any], world_size: int) -> None:
    assert found[world_size]["exchange"]
