"""Stages that commit an artefact share how its name is made, and the result of a run."""

import time
from collections.abc import Mapping
from typing import Any

from hashdist.ground.settings import Settings
from hashdist.store import open_store
from hashdist.store.commit import Artefact, artefact


def target(
    settings: Settings, kind: str, revision: int, *, inputs: Mapping[str, Any], identity: Mapping[str, Any]
) -> Artefact:
    """The artefact below the root that these inputs and settings make, committed or not.

    Args:
        settings: of the run.
        kind: of the artefact.
        revision: of the stage's code.
        inputs: digests of what it is made from.
        identity: the settings that can change it.
    """
    root = open_store(settings.root)
    return artefact(root, kind, inputs=inputs, settings=identity, revision=revision, salt=settings.fresh)


def result(stage: str, made: Artefact, started: float, *, skipped: bool, **details: Any) -> dict[str, Any]:
    """The result of a stage: where its artefact lies, its rows, and how many seconds have passed.

    Args:
        stage: its name.
        made: what is committed.
        started: reading of `time.perf_counter` when the run began.
        skipped: whether it was committed before.
        details: more fields.
    """
    manifest = made.manifest()
    return {
        "stage": stage,
        "snapshot": made.uri,
        "rows": manifest["rows"],
        "failed": manifest["failed"],
        "seconds": time.perf_counter() - started,
        "skipped": skipped,
        **details,
    }
