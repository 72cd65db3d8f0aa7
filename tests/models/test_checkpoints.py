"""The log of checkpoints without Ray: what is read is the newest, what is lost stops, what is old is let go."""

import math
from pathlib import Path

import pytest
import torch

from hashdist.ground.errors import Conflict, Corrupt
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.models.checkpoints import KEPT, Checkpoints, agree_on_newest, finite, load_state
from hashdist.models.training import Checkpoint
from hashdist.store import open_store
from hashdist.store.commit import Log, write_file

ABOUT = {"model": "m", "attempt": "first", "world_size": 1}


def _log(folder: Path) -> Log:
    return Log(open_store(folder.as_uri()))


def _checkpoint(step: int) -> Checkpoint:
    state = {"head": {"w": torch.full((3,), float(step))}, "rounds": [], "seconds": 0.5, "gamma": math.inf}
    history = [{"epoch": epoch, "loss": 1.0} for epoch in range(step)]
    return Checkpoint(state, {"round": 0, "epoch": step, "step": 0}, history)


def test_an_attempt_goes_on_from_the_newest(tmp_path: Path) -> None:
    assert agree_on_newest(_log(tmp_path), SingleProcess()) is None
    first = Checkpoints(_log(tmp_path), None, ABOUT, "dsah")
    for step in (1, 2):
        first.save(_checkpoint(step))

    newest = agree_on_newest(_log(tmp_path), SingleProcess())
    assert newest is not None
    assert newest.number == 2
    assert newest.manifest["position"] == {"round": 0, "epoch": 2, "step": 0}
    resumed = load_state(_log(tmp_path), newest)
    assert resumed["state"]["head"]["w"].tolist() == [2.0, 2.0, 2.0]
    assert resumed["state"]["gamma"] == math.inf
    assert resumed["history"] == _checkpoint(2).history

    second = Checkpoints(_log(tmp_path), newest, {**ABOUT, "attempt": "second"}, "dsah")
    second.save(_checkpoint(3))
    second.finish({"head": "h"})
    last = agree_on_newest(_log(tmp_path), SingleProcess())
    assert last is not None
    assert last.manifest["finished"]
    assert last.manifest["head"] == "h"
    assert [_log(tmp_path).read(n).manifest["attempt"] for n in (1, 2, 3, 4)] == ["first", "first", "second", "second"]


def test_what_a_worker_that_was_given_up_commits_late_stands(tmp_path: Path) -> None:
    first = Checkpoints(_log(tmp_path), None, {**ABOUT, "worker": "cut off"}, "dsah")
    first.save(_checkpoint(1))
    newest = agree_on_newest(_log(tmp_path), SingleProcess())
    second = Checkpoints(_log(tmp_path), newest, {**ABOUT, "worker": "new"}, "dsah")
    first.save(_checkpoint(2))
    for step in (2, 3, 4):
        second.save(_checkpoint(step))
    log = _log(tmp_path)
    assert [log.read(n).manifest["worker"] for n in log.numbers()] == ["cut off", "cut off", "new", "new"]
    assert [load_state(log, log.read(n))["position"]["epoch"] for n in (3, 4)] == [3, 4]
    first.save(_checkpoint(3))  # and it goes on in vain, until its machine is told
    second.finish({"head": "h", "position": {"round": 1}})
    with pytest.raises(Conflict):
        first.save(_checkpoint(5))


def test_a_lost_commit_stops_the_attempt(tmp_path: Path) -> None:
    slow, fast = (Checkpoints(_log(tmp_path), None, {**ABOUT, "attempt": a}, "dsah") for a in ("slow", "fast"))
    fast.save(_checkpoint(1))
    with pytest.raises(Conflict, match="found attempt fast's"):
        slow.save(_checkpoint(1))
    assert _log(tmp_path).numbers() == [1]
    assert load_state(_log(tmp_path), _log(tmp_path).read(1))["position"]["epoch"] == 1


def test_old_states_go_and_records_stay(tmp_path: Path) -> None:
    writer = Checkpoints(_log(tmp_path), None, ABOUT, "dsah")
    for step in range(1, 6):
        writer.save(_checkpoint(step))
    assert _log(tmp_path).numbers() == [1, 2, 3, 4, 5]
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pt")}
    assert kept == {_log(tmp_path).read(n).manifest["state"]["path"] for n in range(6 - KEPT, 6)}
    # the next attempt lets go of what the one before has left
    after = Checkpoints(_log(tmp_path), _log(tmp_path).latest(), {**ABOUT, "attempt": "second"}, "dsah")
    for step in range(6, 6 + KEPT):
        after.save(_checkpoint(step))
    assert not kept & {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pt")}


def test_a_state_that_would_run_code_is_corrupt(tmp_path: Path) -> None:
    log = _log(tmp_path)
    torch.save({"state": Path("/")}, tmp_path / "evil.pt")  # a pickled object that weights_only refuses
    state = write_file(log.store, "states/evil.pt", (tmp_path / "evil.pt").read_bytes())
    version = log.commit({**ABOUT, "finished": False, "state": state}, 0)
    with pytest.raises(Corrupt, match="weights_only"):
        load_state(log, version)


def test_records_hold_numbers_that_json_has() -> None:
    found = finite({"loss": math.nan, "terms": [math.inf, 1.0], "m": (-math.inf, 2)})
    assert found == {"loss": "nan", "terms": ["inf", 1.0], "m": ["-inf", 2]}
