"""Growth: `hashdist reindex`, what a cron runs. An index follows its collection, and only the difference is encoded.

The four steps are in hashdist/reindex/find.py. Here stands what surrounds them: the plan, the way of encoding (in
this process, or through Ray for many images), the gate and the drift watch before the commit, compaction after it, and
what is printed. Ray and torch are imported only where they are needed: a cron that finds nothing new needs neither.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashdist.collection.collection import KIND, subset
from hashdist.evaluation import drift
from hashdist.ground import exporting, telemetry
from hashdist.ground.errors import Conflict, InvalidInput, Refused
from hashdist.ground.options import ReindexOptions
from hashdist.ground.progress import say
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import Settings
from hashdist.index import Applied, open_index
from hashdist.index.pins import pinned
from hashdist.index.upkeep import compaction
from hashdist.reindex import commit, encode, find
from hashdist.reindex.costs import Costs
from hashdist.reindex.encode import Outcome
from hashdist.reindex.find import Found
from hashdist.store import open_store
from hashdist.store.commit import Artefact, artefact, open_artefact, read_table
from hashdist.store.vectors import read_vectors, vectors

if TYPE_CHECKING:
    from hashdist.models.model import Model

_TRIES = 3  # runs from the start, where another writer changed what this one had built upon


def reindex(settings: Settings, options: ReindexOptions | None = None) -> dict[str, Any]:
    """Compare the collection with the index, encode the difference with the index's own model, commit one version.

    Nothing new: no commit. Returns counts, the plan beside what it came to, and what each phase cost.

    Raises:
        InvalidInput: the index does not name the model that made it; settings or sources that do not fit.
        Conflict: other writers were always first. Refused: the gate did not pass; the result waits as a candidate.
    """
    measured = nullcontext() if options and options.plan else telemetry.run_of("reindex")
    with exporting.exported(settings.metrics), measured:
        for left in reversed(range(_TRIES)):
            try:
                return _Run(settings, options or ReindexOptions()).go()
            except Conflict as error:
                if not left:
                    raise
                say(f"reindex: {error}; starting again")
    raise AssertionError


class _Run:
    """One run upon the newest version."""

    def __init__(self, settings: Settings, options: ReindexOptions) -> None:
        self.settings, self.options = settings, options
        self.started, self.costs, self.outcome = time.perf_counter(), Costs(), Outcome()
        self.index = open_index(settings.index.location(settings.root))
        if not self.index.model_uri:
            raise InvalidInput(
                f"{self.index.uri} does not name the model that made it; build it with `hashdist index build`"
            )
        self.version = self.index.version
        empty = not self.index.manifest["shards"]  # the first rows decide whether features are kept
        self.features = self.index.manifest.get("rerank") is not None or (empty and settings.index.rerank)
        self.vocabulary: dict[str, int] | None = None
        self.model: Model
        self.codes: Artefact | None = None
        self.result: dict[str, Any] = {}

    def go(self) -> dict[str, Any]:
        """List, diff, encode, commit; or, for a plan, no more than a sample."""
        found = find.find(self.settings, self.index, self.options, self.costs)
        plan = encode.estimate(found)
        if self.options.plan:
            with self.costs.of("sample"):
                plan = encode.estimate(found, self._sampled(found))
            return self._said(found, plan, None, "the plan; nothing was done")
        if found.change.nothing:
            return self._said(found, plan, None, "nothing new")
        with pinned(self.index):  # encoding may take longer than a clean-up waits
            with self.costs.of("encode"):
                plan = self._encode(found, plan)
            try:
                with self.costs.of("commit"):
                    applied = self._commit(found)
            except Refused:
                say(f"reindex: {self._counted()} images encoded ({self.costs.line()})")
                raise
        if applied.version == self.version:
            return self._said(found, plan, applied, "nothing new")
        self.result["compacted"] = self._compact()
        return self._said(
            found, plan, applied, f"{applied.added} added, {applied.replaced} changed, {applied.removed} removed"
        )

    # Encoding

    def _sampled(self, found: Found) -> float | None:
        """Images a second of a sample, reading included; nothing is kept of it."""
        scratch = Outcome()
        rows = encode.to_look_at(found.change).slice(0, encode.SAMPLE)
        return self._first(encode.pictures(found, rows, scratch), scratch)

    def _first(self, images: Iterator[tuple[encode.Row, bytes]], outcome: Outcome) -> float | None:
        """Encode the first images; returns how many a second, None if there are none. The model is loaded before."""
        first = next(images, None)
        if first is None:
            return None
        with self.costs.of("model"):
            from hashdist.models.model import load_model

            self.model = load_model(str(self.index.model_uri))
            self.model.encode_readable([])  # opens the backbone
            self.model.encode_features(np.empty((0, self.model.width), np.float32))  # opens the head
        started = time.perf_counter()
        count = encode.encode(
            self.model, islice(chain([first], images), encode.SAMPLE), outcome, features=self.features
        )
        return count / (time.perf_counter() - started)

    def _encode(self, found: Found, plan: dict[str, Any]) -> dict[str, Any]:
        """Codes of the difference; returns the plan with the seconds that its first images foretell."""
        rows = encode.to_look_at(found.change)
        if found.files or len(rows) > self.options.in_process:
            rows = encode.differing(found, rows, self.outcome)
        if len(rows) > self.options.in_process:
            self._encode_on_ray(found, rows)
            return plan
        images = encode.pictures(found, rows, self.outcome)
        rate = self._first(images, self.outcome)
        if rate is None:
            return plan
        encode.encode(self.model, images, self.outcome, features=self.features)
        return encode.estimate(found, rate)

    def _encode_on_ray(self, found: Found, rows: pa.Table) -> None:
        """Through the stages, as a collection of its own: what is committed on the way is found by a later run."""
        from hashdist.stages import collection, features  # these bring Ray along
        from hashdist.stages import encode as encode_stage
        from hashdist.stages.cluster.session import session

        index, root, part_rows = self.index, open_store(self.settings.root), self.settings.collection.part_rows
        model = open_artefact(str(index.model_uri), "models")
        ready = replace(self.settings, train=replace(self.settings.train, mode=model.manifest()["mode"]))
        with session(self.settings.cluster):
            listing = found.listing(rows)
            inputs = {"uri": listing.uri, "listing": listing.digest}
            whole = artefact(root, KIND, inputs=inputs, settings={"part_rows": part_rows}, revision=collection.REVISION)
            if not whole.exists():
                planned = found.plan(rows, part_rows, index.view.salts)
                collection.commit_plan(ready, whole, planned, listing, commit.base_vocabulary(index))
            part = subset(root, whole, rows["id"].to_pylist()) if found.files else whole
            # the features stage also in images mode where features are kept, so that all rows have the same ones
            of_images = model.manifest()["mode"] == "images"
            made = None if of_images else open_artefact(features.run(ready, part)["snapshot"], "features")
            codes = open_artefact(encode_stage.run(ready, model, made or part)["snapshot"], "codes")
        self.vocabulary = dict(whole.manifest()["vocabulary"])
        self.codes = codes
        self._take(part, codes, made)

    def _take(self, part: Artefact, codes: Artefact, features: Artefact | None) -> None:
        """Committed codes into the outcome, with size and stamp as they were listed."""
        listed = pa.concat_tables(
            read_table(part.store, file, ["id", "size", "stamp"]) for file in part.manifest()["files"]
        )
        rows = pa.concat_tables(vectors(codes, "code")).sort_by("id")
        places = pa.array(np.searchsorted(listed["id"].to_numpy(), rows["id"].to_numpy()))
        for name in ("size", "stamp"):
            rows = rows.append_column(name, listed[name].take(places))
        good = pc.equal(rows["status"], OK)
        for row in rows.filter(pc.invert(good)).drop_columns("code").to_pylist():
            self.outcome.bad(row, row["digest"], row["reason"])
        kept = rows.filter(good)
        self.outcome.codes.append(np.asarray(from_vectors(kept["code"], kept.schema), np.uint8))
        kept = kept.append_column("names", pa.nulls(len(kept), pa.list_(pa.string())))
        self.outcome.rows.append(kept.select(encode.ENCODED.names).cast(encode.ENCODED))
        if self.features and features is not None:
            found = read_vectors(features, ["feature"], kept["id"].to_numpy())
            self.outcome.features.append(from_vectors(found["feature"], found.schema))

    # Commit, and what comes after it

    def _commit(self, found: Found) -> Applied:
        codes_NW = np.concatenate([np.empty((0, self.index.bits // 8), np.uint8), *self.outcome.codes])
        found_drift = drift.measure(self.index.view, codes_NW)
        if found_drift["retrain_recommended"]:
            say(found_drift["text"])
        self.result |= {"drift": found_drift, "retrain_recommended": found_drift["retrain_recommended"]}
        from hashdist.evaluation import gate

        checks = gate.for_growth(self.settings, self.index, self.codes)
        return commit.commit(
            self.index,
            found,
            self.outcome,
            vocabulary=self.vocabulary,
            gate=checks,
            codes=self.codes,
            drift=found_drift,
        )

    def _compact(self) -> str | None:
        """Merge shards and drop hidden rows when it is due; returns why it was."""
        reason = compaction.due(self.index.manifest, self.settings.index)
        if reason:
            try:
                with self.costs.of("compact"):
                    compaction.compact(self.index, self.settings.index)
            except Conflict as error:  # what was committed stays committed
                say(f"reindex: not compacted: {error}; the next run tries again")
        return reason

    # What is said

    def _counted(self) -> int:
        return sum(len(codes) for codes in self.outcome.codes)

    def _said(self, found: Found, plan: dict[str, Any], applied: Applied | None, summary: str) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "listed": found.listed,
            "added": applied.added if applied else 0,
            "changed": applied.replaced if applied else 0,
            "removed": applied.removed if applied else 0,
            "unchanged": found.change.unchanged,
            "unreadable": found.change.failed,
            "encoded": self._counted(),
            "failed": self.outcome.failed.total(),
            "reasons": dict(self.outcome.failed),
        }
        actual = None if self.options.plan else self._actual(counts)
        line = f"reindex: {summary}: {found.uri} has {found.listed} images -> version {self.index.version}"
        if counts["failed"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.outcome.failed.items()))
            line += f"; {counts['failed']} without a code: {reasons}"
        telemetry.count_images("reindex", counts["encoded"], self.outcome.failed)
        telemetry.STAGE_ROWS.set(self.index.rows, stage="reindex")
        telemetry.STAGE_FAILED.set(counts["failed"] + counts["unreadable"], stage="reindex")
        quiet = not self.options.plan and (applied is None or applied.version == self.version)
        text = (
            f"{line} ({self.costs.line()})" if quiet else "\n".join([line, *_beside(plan, actual), *self.costs.lines()])
        )
        return {
            "stage": "reindex",
            "index": self.index.uri,
            "version": self.index.version,
            "rows": self.index.rows,
            **counts,
            "plan": plan,
            "actual": actual,
            "costs": self.costs.phases,
            **self.result,
            "seconds": time.perf_counter() - self.started,
            "text": text,
        }

    def _actual(self, counts: dict[str, Any]) -> dict[str, Any]:
        """What the plan foretold, as it came out."""
        encode, commit = (self.costs.phases.get(name, _FREE) for name in ("encode", "commit"))
        put = Counter(commit["requests"])
        return {
            "new": counts["added"],
            "touched": counts["changed"] + sum(note["status"] == OK for note in self.outcome.notes),
            "removed": counts["removed"],
            "unchanged": counts["unchanged"],
            "read_bytes": encode["read"],
            "get_requests": encode["requests"].get("get", 0),
            "put_requests": put["put"] + put["create"],
            "images_per_s": None,
            "seconds": round(encode["seconds"], 6),
        }


_FREE: dict[str, Any] = {"seconds": 0.0, "requests": {}, "read": 0, "written": 0}


def _beside(plan: dict[str, Any], actual: dict[str, Any] | None) -> list[str]:
    """The plan, and beside it what it came to."""
    lines = [f"{'':>14}  {'plan':>14}" + (f"  {'actual':>14}" if actual else "")]
    for name, value in plan.items():
        came_to = "" if actual is None else f"  {_shown(actual[name]):>14}"
        lines.append(f"{name:>14}  {_shown(value):>14}{came_to}")
    return lines


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
