"""A training run as a log of checkpoints: how one attempt reads the newest one and commits the next.

Every checkpoint is a version of a Log (hashdist/store/commit.py): its state, PyTorch tensors and plain values read
with weights_only, is a data file under a name of this attempt, and its record says where in the run it stands, so
the curves can be read while the run goes on.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import torch

from hashdist.ground import telemetry
from hashdist.ground.errors import Conflict, Corrupt
from hashdist.methods.parts.communicator import Communicator
from hashdist.models.training import Checkpoint
from hashdist.store.commit import CommitLost, Log, Version, read_file, write_file

KEPT = 2
"""Newest checkpoints whose state is kept; of older ones only the record stays."""


def agree_on_newest(log: Log, comm: Communicator, device: torch.device | str = "cpu") -> Version | None:
    """The newest version as rank 0 sees it, the same on every rank; None while there is none."""
    number = torch.zeros(1, dtype=torch.int64, device=device)
    if comm.rank == 0:
        newest = log.latest()
        number[0] = newest.number if newest else 0
    comm.sum_(number)
    return log.read(int(number)) if number else None


def load_state(log: Log, version: Version) -> dict[str, Any]:
    """The state of a version, as `training.train` takes it for `resume`. Raises Corrupt, NotFound."""
    data = read_file(log.store, version.manifest["state"])
    try:
        loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises whatever its unpickler meets; the bytes are those that were committed, so it is no accident
        raise Corrupt(
            f"{log.uri}: the state of version {version.number} must load with weights_only, found {error}; "
            "train anew with --train.fresh TEXT"
        ) from error
    return loaded


class Checkpoints:
    """The versions that one attempt adds.

    Args:
        log: of the run.
        newest: the version the attempt starts from.
        about: what every version says of the run: model, attempt, world size.
        method: its name, for the metrics.
    """

    def __init__(self, log: Log, newest: Version | None, about: Mapping[str, Any], method: str) -> None:
        self._log, self._about, self._method = log, dict(about), method
        self._number = newest.number if newest else 0
        kept = range(max(1, self._number - KEPT + 1), self._number + 1)
        self._states = [log.read(number).manifest["state"] for number in kept]

    def save(self, checkpoint: Checkpoint) -> None:
        """Commit a checkpoint as the next version. Raises Conflict when another attempt has committed that one.

        Where a worker of this attempt that was given up, cut off from the others, has committed it after all, that
        one stands: training repeats itself bit by bit.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint.to_mapping(), buffer)
        state = write_file(self._log.store, self._log.new_name("states", ".pt"), buffer.getbuffer())
        stands = self._commit(
            {
                "finished": False,
                "state": state,
                "position": checkpoint.position,
                "history": checkpoint.history,
                "rounds": checkpoint.state["rounds"],
                "seconds": checkpoint.state["seconds"],
            }
        )
        self._states.append(stands["state"])
        # records first, bytes second: an attempt that starts now finds the newer state
        for old in self._states[:-KEPT]:
            self._log.store.delete(old["path"])
        self._states = self._states[-KEPT:]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Commit the last version, which names the finished weights; its state is the newest checkpoint's."""
        self._commit({"finished": True, "state": self._states[-1], **result})

    def _commit(self, body: dict[str, Any]) -> dict[str, Any]:
        """The manifest that stands."""
        own = finite({**self._about, **body})
        try:
            version = self._log.commit(own, self._number)
        except CommitLost as lost:
            version = lost.winner
            if any(version.manifest.get(name) != own.get(name) for name in ("attempt", "position", "finished")):
                raise Conflict(
                    f"{self._log.uri}: checkpoint {self._number + 1} must be this attempt's ({own['attempt']}), found "
                    f"attempt {version.manifest.get('attempt')}'s, so the same model is being trained twice; let that "
                    "one finish, or give --train.fresh TEXT for a run of your own"
                ) from lost
        self._number = version.number
        telemetry.CHECKPOINTS.inc(method=self._method)
        return version.manifest


def finite(value: Any) -> Any:
    """`value` with numbers that JSON has not (nan, inf) as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
