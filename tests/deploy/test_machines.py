"""tests/worlds/machines.py without namespaces: which faults make a run, and what is said of them."""

from tests.worlds import machines


def test_faults_of_a_kind_share_a_run_and_those_of_a_stage_do_not() -> None:
    every = [f"{fault}:{stage}" for fault in machines.FAULTS for stage in machines.STAGES]
    assert machines.rounds(every) == [dict.fromkeys(machines.STAGES, fault) for fault in machines.FAULTS]
    assert machines.rounds(["cut:train", "kill:train"]) == [{"train": "cut"}, {"train": "kill"}]
    assert machines.rounds([]) == []


def test_what_differs_from_the_run_without_faults_is_named() -> None:
    def run(faults: dict[str, str], model: str) -> object:
        losses = [machines.Loss(fault, stage, 3, 7.5, 9, 1) for stage, fault in faults.items()]
        seconds = dict.fromkeys(machines.STAGES, 10.0)
        outcome = {"model": model, "codes": "c"}
        return machines.Run(None, "run", faults, 1, losses, seconds, outcome)

    good, bad = run({"features": "kill"}, "m"), run({"train": "cut"}, "other")
    found = machines.told([run({}, "m"), good, bad])
    assert [fault["differ"] for fault in found["faults"]] == [[], ["model"]]
    assert not found["equal"]
    assert machines.told([run({}, "m"), good])["equal"]
    first, second = machines.table(found).splitlines()[2:]
    assert first.endswith("| yes |")
    assert second.endswith("| no: model |")


def test_pictures_come_change_and_go() -> None:
    first, changes, removed = machines.pictures()
    assert len(first) == machines.IMAGES
    assert len(changes.keys() - first.keys()) == machines.ADDED
    assert sum(changes[key] != first[key] for key in changes.keys() & first.keys()) == machines.CHANGED
    assert set(removed) <= first.keys() - changes.keys()
    assert len(removed) == machines.REMOVED
