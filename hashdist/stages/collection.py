"""Stage: list a collection, read every image once, and commit the listing with keys, ids, digests and labels."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hashdist.collection.collection import KIND, REVISION, ScanPlan, assemble, plan, write_unit
from hashdist.collection.listing import Listing, list_collection, manifest_fields
from hashdist.collection.vocabulary import extend_vocabulary, label_numbers
from hashdist.ground import telemetry
from hashdist.ground.progress import say
from hashdist.ground.schema import failures
from hashdist.ground.settings import Settings
from hashdist.stages import artefacts
from hashdist.stages.cluster import session, tasks
from hashdist.store.commit import Artefact, open_artefact

__all__ = ["KIND", "REVISION", "Scan", "run", "snapshot"]


def snapshot(settings: Settings, listing: Listing | None = None) -> Artefact:
    """The artefact of the collection as it is now. Lists names; reads no image.

    Args:
        settings: of the run.
        listing: of the collection, where it was listed before.

    Raises InvalidInput for a collection that is missing, empty or of mixed formats.
    """
    if settings.collection.snapshot:
        return open_artefact(settings.collection.snapshot, KIND)
    listing = listing or list_collection(settings.collection)
    identity = {"part_rows": settings.collection.part_rows}  # the listing's digest holds the rest
    inputs = {"uri": listing.uri, "listing": listing.digest}
    return artefacts.target(settings, KIND, REVISION, inputs=inputs, identity=identity)


@dataclass(frozen=True)
class Scan:
    """Work of one task: read the images of a unit and write its rows."""

    target: Artefact
    plan: ScanPlan
    part_rows: int

    def __call__(self, number: int) -> dict[str, Any]:
        """Scan unit `number`; returns its record."""
        unit = self.plan.units[number]
        rows = self.plan.reader.scan(unit)
        failed = failures(rows)
        telemetry.count_images("collection", len(rows) - failed.total(), failed)
        return write_unit(self.target, unit, rows, self.part_rows)


def run(settings: Settings, listing: Listing | None = None) -> dict[str, Any]:
    """Commit the listing, unless it is committed. Needs an open Ray session.

    Args:
        settings: of the run.
        listing: of the collection, where it was listed before.

    Returns: stage, snapshot, rows, failed (images that could not be read), seconds, skipped.
    """
    started = time.perf_counter()
    if settings.collection.snapshot:
        return _result(open_artefact(settings.collection.snapshot, KIND), started, skipped=True)
    listing = listing or list_collection(settings.collection)
    target = snapshot(settings, listing)
    if target.exists():
        return _result(target, started, skipped=True)
    commit_plan(settings, target, plan(listing, settings.collection.part_rows), listing)
    return _result(target, started, skipped=False)


def commit_plan(
    settings: Settings,
    target: Artefact,
    planned: ScanPlan,
    listing: Listing,
    vocabulary: Mapping[str, int] | None = None,
) -> None:
    """Scan what a plan says, part by part, and commit it as `target`.

    Args:
        settings: of the run.
        target: an artefact of this kind that is not committed.
        planned: what to scan.
        listing: what it was planned from.
        vocabulary: numbers that labels given as text have already; others follow.
    """
    part_rows = settings.collection.part_rows
    scan = Scan(target, planned, part_rows)
    numbers = range(len(planned.units))
    records = tasks.run_parts(target, numbers, scan, label="collection", at_once=session.cpus())
    units = [records[number] for number in numbers]
    labels = label_numbers(planned.reader, units)
    if vocabulary is not None:
        labels = labels._replace(vocabulary=extend_vocabulary(vocabulary, labels.vocabulary, planned.reader))
    fields = assemble(target, units, salts=planned.salts, labels=labels, part_rows=part_rows)
    lineage = {
        "stage": "collection",
        "inputs": {"listing": {"uri": listing.uri, "digest": listing.digest}},
        "settings": settings.collection.identity(),
    }
    target.publish({**lineage, **manifest_fields(listing), **fields})


def _result(target: Artefact, started: float, skipped: bool) -> dict[str, Any]:
    manifest = target.manifest()
    if manifest["failed"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["unreadable"].items()))
        say(f"collection: {manifest['failed']} of {manifest['rows']} images cannot be read: {reasons}")
    return artefacts.result("collection", target, started, skipped=skipped)
