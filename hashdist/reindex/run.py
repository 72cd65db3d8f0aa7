"""`hashdist reindex`, run by a cron: an index follows its collection; only the difference is encoded, in one commit.

1. find (find.py): names, sizes and stamps by LIST, from an S3 Inventory, or from a list of changes (inventory.py),
   compared by key, size and stamp with the index (difference.py).
2. encode: images that are new, and those whose bytes differ by content digest. Up to a few thousand in this process
   (encode.py), more through the stages on Ray (on_ray.py).
3. commit (commit.py), behind the gate and the drift watch: new rows, tombstones for what changed or is gone, and notes
   about images that get no row. Compaction follows where it is due.

An image whose stamp changed and whose bytes did not is noted with its new stamp (hashdist/index/notes.py); its row
stays where it is. So is one that no code can be made of. Either is left alone from then on, until its stamp changes
again. Ray and torch are imported only where they are needed: a cron that finds nothing new needs neither.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from hashdist.evaluation import drift
from hashdist.ground import exporting, telemetry
from hashdist.ground.errors import Conflict, InvalidInput, Refused
from hashdist.ground.options import ReindexOptions
from hashdist.ground.progress import say
from hashdist.ground.schema import OK
from hashdist.ground.settings import Settings
from hashdist.index import Applied, open_index
from hashdist.index.pins import pinned
from hashdist.index.upkeep import compaction
from hashdist.reindex import commit, encode, find
from hashdist.reindex.costs import FREE, Costs
from hashdist.reindex.encode import Encoded
from hashdist.reindex.find import Increment

if TYPE_CHECKING:
    from hashdist.models.model import Model

_TRIES = 3  # runs from the start, where another writer changed what this one had built upon


def reindex(settings: Settings, options: ReindexOptions | None = None) -> dict[str, Any]:
    """Compare the collection with the index, encode the difference with the index's own model, commit one version.

    Nothing new: no commit. Returns counts, the plan beside the actual figures, and the costs of each phase.

    Raises:
        InvalidInput: the index does not name the model that made it; settings or sources that do not fit.
        Conflict: other writers were always first. Refused: the gate did not pass; the result waits as a candidate.
    """
    options = options or ReindexOptions()
    measured = nullcontext() if options.plan else telemetry.run_of("reindex")
    with exporting.exported(settings.metrics), measured:
        for _ in range(_TRIES - 1):
            try:
                return _Reindex(settings, options).run()
            except Conflict as error:
                say(f"reindex: {error}; starting again")
        return _Reindex(settings, options).run()


class _Reindex:
    """One run upon the newest version."""

    def __init__(self, settings: Settings, options: ReindexOptions) -> None:
        self.settings, self.options = settings, options
        self.started, self.costs, self.encoded = time.perf_counter(), Costs(), Encoded()
        self.index = open_index(settings.index.location(settings.root))
        if not self.index.model_uri:
            raise InvalidInput(
                f"{self.index.uri} does not name the model that made it; build it with `hashdist index build`"
            )
        self.version = self.index.version
        empty = not self.index.manifest["shards"]  # the first rows decide whether features are kept
        self.features = self.index.manifest.get("rerank") is not None or (empty and settings.index.rerank)
        self.result: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """List, diff, encode, commit; or, for a plan, no more than a sample."""
        increment = find.find(self.settings, self.index, self.options, self.costs)
        plan = encode.estimate(increment)
        if self.options.plan:
            with self.costs.of("sample"):
                plan = encode.estimate(increment, self._sample_speed(increment))
            return self._report(increment, plan, None, "the plan; nothing was done")
        if increment.change.nothing:
            return self._report(increment, plan, None, "nothing new")
        with pinned(self.index):  # encoding may take longer than a clean-up waits
            with self.costs.of("encode"):
                plan = self._encode(increment, plan)
            try:
                with self.costs.of("commit"):
                    applied = self._commit(increment)
            except Refused:
                say(f"reindex: {self._count()} images encoded ({self.costs.line()})")
                raise
        if applied.version == self.version:
            return self._report(increment, plan, applied, "nothing new")
        self.result["compacted"] = self._compact()
        summary = f"{applied.added} added, {applied.replaced} changed, {applied.removed} removed"
        return self._report(increment, plan, applied, summary)

    # Encoding

    @cached_property
    def _model(self) -> "Model":
        """The index's own model, with its backbone and its head open."""
        with self.costs.of("model"):
            from hashdist.models.model import load_model

            model = load_model(str(self.index.model_uri))
            model.encode_readable([])  # opens the backbone
            model.encode_features(np.empty((0, model.width), np.float32))  # opens the head
        return model

    def _sample_speed(self, increment: Increment) -> float | None:
        """Images a second of a sample, reading included; nothing is kept of it."""
        scratch = Encoded()
        rows = encode.rows_to_read(increment.change).slice(0, encode.SAMPLE)
        return self._encode_first(encode.pictures(increment, rows, scratch), scratch)

    def _encode_first(self, images: Iterator[tuple[encode.Row, bytes]], encoded: Encoded) -> float | None:
        """Encode the first images; returns how many a second, None if there are none."""
        first = next(images, None)
        if first is None:
            return None
        model = self._model  # loaded before the clock runs
        started = time.perf_counter()
        some = islice(chain([first], images), encode.SAMPLE)
        count = encode.encode(model, some, encoded, features=self.features)
        return count / (time.perf_counter() - started)

    def _encode(self, increment: Increment, plan: dict[str, Any]) -> dict[str, Any]:
        """Codes of the difference; returns the plan with the seconds that its first images foretell."""
        rows = encode.rows_to_read(increment.change)
        if increment.files or len(rows) > self.options.in_process:
            rows = encode.differing(increment, rows, self.encoded)
        if len(rows) > self.options.in_process:
            from hashdist.reindex.on_ray import encode_on_ray

            encode_on_ray(self.settings, self.index, increment, rows, self.encoded, features=self.features)
            return plan
        images = encode.pictures(increment, rows, self.encoded)
        rate = self._encode_first(images, self.encoded)
        if rate is None:
            return plan
        encode.encode(self._model, images, self.encoded, features=self.features)
        return encode.estimate(increment, rate)

    # Commit, and what comes after it

    def _commit(self, increment: Increment) -> Applied:
        from hashdist.evaluation import gate

        codes_NW = np.concatenate([np.empty((0, self.index.bits // 8), np.uint8), *self.encoded.codes])
        measured = drift.measure(self.index.view, codes_NW)
        if measured["retrain_recommended"]:
            say(measured["text"])
        self.result |= {"drift": measured, "retrain_recommended": measured["retrain_recommended"]}
        checks = gate.for_growth(self.settings, self.index, self.encoded.artefact)
        return commit.commit(self.index, increment, self.encoded, gate=checks, drift=measured)

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

    # The result

    def _count(self) -> int:
        return sum(len(codes) for codes in self.encoded.codes)

    def _report(
        self, increment: Increment, plan: dict[str, Any], applied: Applied | None, summary: str
    ) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "listed": increment.listed,
            "added": applied.added if applied else 0,
            "changed": applied.replaced if applied else 0,
            "removed": applied.removed if applied else 0,
            "unchanged": increment.change.unchanged,
            "unreadable": increment.change.failed,
            "encoded": self._count(),
            "failed": self.encoded.failed.total(),
            "reasons": dict(self.encoded.failed),
        }
        actual = None if self.options.plan else self._actual(counts)
        line = f"reindex: {summary}: {increment.uri} has {increment.listed} images -> version {self.index.version}"
        if counts["failed"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.encoded.failed.items()))
            line += f"; {counts['failed']} without a code: {reasons}"
        telemetry.count_images("reindex", counts["encoded"], self.encoded.failed)
        telemetry.STAGE_ROWS.set(self.index.rows, stage="reindex")
        telemetry.STAGE_FAILED.set(counts["failed"] + counts["unreadable"], stage="reindex")
        quiet = not self.options.plan and (applied is None or applied.version == self.version)
        lines = [f"{line} ({self.costs.line()})"] if quiet else [line, *_plan_lines(plan, actual), *self.costs.lines()]
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
            "text": "\n".join(lines),
        }

    def _actual(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The figures of the plan, as they came out."""
        encoding, committing = (self.costs.phases.get(name, FREE) for name in ("encode", "commit"))
        put = Counter(committing["requests"])
        return {
            "new": counts["added"],
            "touched": counts["changed"] + sum(note["status"] == OK for note in self.encoded.notes),
            "removed": counts["removed"],
            "unchanged": counts["unchanged"],
            "read_bytes": encoding["read"],
            "get_requests": encoding["requests"].get("get", 0),
            "put_requests": put["put"] + put["create"],
            "images_per_s": None,
            "seconds": round(encoding["seconds"], 6),
        }


def _plan_lines(plan: dict[str, Any], actual: dict[str, Any] | None) -> list[str]:
    """The plan, and beside it the actual figures."""
    lines = [f"{'':>14}  {'plan':>14}" + (f"  {'actual':>14}" if actual else "")]
    for name, value in plan.items():
        came_to = "" if actual is None else f"  {_text(actual[name]):>14}"
        lines.append(f"{name:>14}  {_text(value):>14}{came_to}")
    return lines


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
