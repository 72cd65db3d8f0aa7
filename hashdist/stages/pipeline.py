"""The order of the stages, and how one finds what the others committed.

A stage's artefact is named by its inputs and settings, so the same settings lead every job to the same artefacts:
nothing is passed from job to job but the configuration file. `run_stage` runs one stage on what is committed;
`run_all` runs every stage that is not.
"""

import time
from functools import cached_property
from typing import Any

from hashdist.collection.listing import Listing, list_collection
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
    given = settings.features.source or settings.features.snapshot
    return {
        "collection": [],
        "features": [] if given else ["collection"],
        "graph": ["features"],
        "train": ["graph", "features", *(["collection"] if images else [])],
        "encode": ["train", "collection" if images else "features"],
        "index": ["encode"],
        "evaluate": ["encode", "features"],
    }[stage]


class Pipeline:
    """The artefacts that settings lead to, each looked for once.

    A command makes one and hands it down. The collection is listed at most once and a file of weights digested at most
    once, so images that arrive while the command runs belong to the next one.

    Args:
        settings: of the command.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._artefacts: dict[str, Artefact] = {}

    def artefact(self, stage: str) -> Artefact:
        """The artefact of `stage`, committed or not. Raises NotFound where one that it is made from is not committed.

        Args:
            stage: one that commits an artefact.
        """
        if stage not in self._artefacts:
            self._artefacts[stage] = self._look_for(stage)
        return self._artefacts[stage]

    def _look_for(self, stage: str) -> Artefact:
        named = getattr(self.settings, stage).snapshot
        if named:
            return open_artefact(named, STAGES[stage].KIND)
        if stage == "collection":
            return collection.snapshot(self.settings, self._listing)
        made: Artefact = STAGES[stage].snapshot(self.settings, *self.inputs(stage))
        return made

    @cached_property
    def _listing(self) -> Listing:
        return list_collection(self.settings.collection)

    def inputs(self, stage: str) -> list[Artefact]:
        """The committed artefacts that `stage` reads. Raises NotFound naming the first that is missing."""
        found = []
        for name in upstream(stage, self.settings):
            artefact = self.artefact(name)
            if name == "collection" and not artefact.exists():
                self.run(name)  # listing is cheap, and no job is named after it
            if not artefact.exists():
                raise NotFound(
                    f"`{stage}` needs a committed {name} snapshot; with these settings it would be {artefact.uri}, and "
                    f"nothing is committed there; run `hashdist {name}` with the same settings first, run "
                    f"`hashdist pipeline`, or name one with --{name}.snapshot URI"
                )
            found.append(artefact)
        return found

    def run(self, stage: str) -> dict[str, Any]:
        """Run one stage on what is committed, inside a session that is open already; returns its result."""
        started = time.perf_counter()
        with telemetry.run_of(stage):
            result = self._run(stage)
        result["seconds"] = time.perf_counter() - started
        telemetry.STAGE_ROWS.set(result.get("rows", 0), stage=stage)
        telemetry.STAGE_FAILED.set(result.get("failed", 0), stage=stage)
        say(summary(stage, result))
        return result

    def _run(self, stage: str) -> dict[str, Any]:
        named = getattr(getattr(self.settings, stage), "snapshot", "")
        if stage == "collection":
            result = collection.run(self.settings, None if named else self._listing)
        else:
            result = STAGES[stage].run(self.settings, *self.inputs(stage))
        kind = getattr(STAGES[stage], "KIND", None)
        if kind and not named:
            self._artefacts.setdefault(stage, open_artefact(result["snapshot"], kind))
        return result

    def run_all(self) -> dict[str, Any]:
        """Run every stage in order, inside a session that is open already; returns their results."""
        started = time.perf_counter()
        stages = [stage for stage in STAGES if stage != "collection" or not self.settings.features.source]
        results = {stage: self.run(stage) for stage in stages}
        return {"stage": "pipeline", "stages": results, "seconds": time.perf_counter() - started}


def run_stage(settings: Settings, stage: str) -> dict[str, Any]:
    """Run one stage on what is committed; a stage that is done already is recognised and skipped."""
    pipeline = Pipeline(checked(settings))
    with session.observed_session(settings):
        return pipeline.run(stage)


def run_all(settings: Settings) -> dict[str, Any]:
    """Run every stage in order, skipping those whose artefact is committed; one Ray session for all."""
    pipeline = Pipeline(checked(settings))
    with session.observed_session(settings):
        return pipeline.run_all()


def summary(stage: str, result: dict[str, Any]) -> str:
    """The last line of a stage: its rows, its failures, and where its artefact lies."""
    verb = "found committed" if result.get("skipped") else "done"
    failed = f", {result['failed']} failed" if result.get("failed") else ""
    rows = f"{result['rows']} rows{failed} in " if "rows" in result else ""
    return f"{stage}: {verb}: {rows}{result['seconds']:.1f} s  {result.get('snapshot', '')}".rstrip()


def checked(settings: Settings) -> Settings:
    """The settings. Raises InvalidInput where they name no root."""
    if not settings.root:
        raise InvalidInput("a root is required, found none; give --root FOLDER or --root s3://bucket/prefix")
    return settings
