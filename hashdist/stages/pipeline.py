"""The order of the stages, and how one finds what the others committed.

A stage's artefact is named by its inputs and settings, so the same settings lead every job to the same snapshots:
nothing is passed from job to job but the configuration file. `run_stage` runs one stage on what is committed;
`run_all` runs every stage that is not.
"""

import time
from dataclasses import replace
from typing import Any

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.progress import say
from hashdist.ground.settings import Settings
from hashdist.stages import collection, encode, evaluate, features, graph, index, train
from hashdist.stages.cluster import session
from hashdist.store.commit import Artefact, open_artefact

STAGES = {
    "collection": collection,
    "features": features,
    "graph": graph,
    "train": train,
    "encode": encode,
    "index": index,
    "evaluate": evaluate,
}
"""Every stage in pipeline order."""


def upstream(stage: str, settings: Settings) -> list[str]:
    """The stages whose artefacts `stage` reads, in the order of its arguments."""
    images = settings.train.mode == "images"
    return {
        "collection": [],
        "features": [] if settings.features.source else ["collection"],
        "graph": ["features"],
        "train": ["graph", "features", *(["collection"] if images else [])],
        "encode": ["train", "collection" if images else "features"],
        "index": ["encode"],
        "evaluate": ["encode", "features"],
    }[stage]


def snapshot(stage: str, settings: Settings) -> Artefact:
    """Where the artefact of `stage` lives under these settings, committed or not.

    Raises NotFound if something it is made from is not committed yet.
    """
    named = getattr(settings, stage).snapshot
    if named:
        return open_artefact(named, STAGES[stage].KIND)
    made: Artefact = STAGES[stage].snapshot(settings, *inputs(stage, settings))
    return made


def inputs(stage: str, settings: Settings) -> list[Artefact]:
    """The committed artefacts that `stage` reads. Raises NotFound naming the first that is missing."""
    found = []
    for name in upstream(stage, settings):
        artefact = snapshot(name, settings)
        if name == "collection" and not artefact.exists():
            run_in_session(settings, name)  # listing is cheap, and no job is named after it
        if not artefact.exists():
            raise NotFound(
                f"`{stage}` needs a committed {name} snapshot; with these settings it would be {artefact.uri}, and "
                f"nothing is committed there; run `hashdist {name}` with the same settings first, run "
                f"`hashdist pipeline`, or name one with --{name}.snapshot URI"
            )
        found.append(artefact)
    return found


def run_stage(settings: Settings, stage: str) -> dict[str, Any]:
    """Run one stage on what is committed; a stage that is done already is recognised and skipped."""
    _check(settings)
    with session.observed_session(settings):
        return run_in_session(settings, stage)


def run_all(settings: Settings) -> dict[str, Any]:
    """Run every stage in order, skipping those whose artefact is committed; one Ray session for all."""
    _check(settings)
    started = time.perf_counter()
    with session.observed_session(settings):
        results: dict[str, Any] = {}
        for stage in STAGES:
            if stage == "collection" and settings.features.source:
                continue
            results[stage] = run_in_session(settings, stage)
            if stage == "collection":
                # pinned: images that arrive while this runs belong to the next run
                settings = replace(
                    settings, collection=replace(settings.collection, snapshot=results[stage]["snapshot"])
                )
    return {"stage": "pipeline", "stages": results, "seconds": time.perf_counter() - started}


def run_in_session(settings: Settings, stage: str) -> dict[str, Any]:
    """Like run_stage, inside a session that is open already."""
    started = time.perf_counter()
    with telemetry.run_of(stage):
        result: dict[str, Any] = STAGES[stage].run(settings, *inputs(stage, settings))
    result["seconds"] = time.perf_counter() - started
    telemetry.STAGE_ROWS.set(result.get("rows", 0), stage=stage)
    telemetry.STAGE_FAILED.set(result.get("failed", 0), stage=stage)
    say(summary(stage, result))
    return result


def summary(stage: str, result: dict[str, Any]) -> str:
    """The last line of a stage: what came out, what failed, where it is."""
    verb = "found committed" if result.get("skipped") else "done"
    failed = f", {result['failed']} failed" if result.get("failed") else ""
    rows = f"{result['rows']} rows{failed} in " if "rows" in result else ""
    return f"{stage}: {verb}: {rows}{result['seconds']:.1f} s  {result.get('snapshot', '')}".rstrip()


def _check(settings: Settings) -> None:
    if not settings.root:
        raise InvalidInput("a root is required, found none; give --root FOLDER or --root s3://bucket/prefix")
