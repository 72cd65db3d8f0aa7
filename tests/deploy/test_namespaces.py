"""cluster/namespaces.py without namespaces: which faults make a run, and what is said of them."""

import importlib.util
import sys
from types import ModuleType

import pytest

from tests import REPOSITORY

SCRIPT = REPOSITORY / "cluster" / "namespaces.py"


@pytest.fixture(scope="module")
def namespaces() -> ModuleType:
    spec = importlib.util.spec_from_file_location("namespaces_script", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_faults_of_a_kind_share_a_run_and_those_of_a_stage_do_not(namespaces: ModuleType) -> None:
    every = [f"{fault}:{stage}" for fault in namespaces.FAULTS for stage in namespaces.STAGES]
    assert namespaces.rounds(every) == [dict.fromkeys(namespaces.STAGES, fault) for fault in namespaces.FAULTS]
    assert namespaces.rounds(["cut:train", "kill:train"]) == [{"train": "cut"}, {"train": "kill"}]
    assert namespaces.rounds([]) == []


def test_what_differs_from_the_run_without_faults_is_named(namespaces: ModuleType) -> None:
    def run(faults: dict[str, str], model: str) -> object:
        losses = [namespaces.Loss(fault, stage, 3, 7.5, 9, 1) for stage, fault in faults.items()]
        seconds = dict.fromkeys(namespaces.STAGES, 10.0)
        outcome = {"model": model, "codes": "c"}
        return namespaces.Run(None, "run", faults, 1, losses, seconds, outcome)

    good, bad = run({"features": "kill"}, "m"), run({"train": "cut"}, "other")
    found = namespaces.told([run({}, "m"), good, bad])
    assert [fault["differ"] for fault in found["faults"]] == [[], ["model"]]
    assert not found["equal"]
    assert namespaces.told([run({}, "m"), good])["equal"]
    first, second = namespaces.table(found).splitlines()[2:]
    assert first.endswith("| yes |")
    assert second.endswith("| no: model |")


def test_pictures_come_change_and_go(namespaces: ModuleType) -> None:
    first, changes, removed = namespaces.pictures()
    assert len(first) == namespaces.IMAGES
    assert len(changes.keys() - first.keys()) == namespaces.ADDED
    assert sum(changes[key] != first[key] for key in changes.keys() & first.keys()) == namespaces.CHANGED
    assert set(removed) <= first.keys() - changes.keys()
    assert len(removed) == namespaces.REMOVED
