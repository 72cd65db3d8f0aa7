"""Compaction: small shards become one, hidden rows go, tombstones and salts are merged. No search sees a difference.

The manifest alone tells whether a compaction is due (`due`). A plan takes, from one version, the small shards and
those of which too much is hidden, fills new shards with their live rows, and keeps the tombstones that the other
shards need. A tombstone of version v applies to the shards of earlier versions, so two tombstones that apply to the
same shards are one file afterwards.

A new shard joins with the version that was planned upon, since its rows are those that lived in that version: every
tombstone of a later version hides them too. Decision S13 asks for more: if another writer was first, the plan stands
only where that one left alone what it was made from (inputs, tombstones, salts, model) and hid none of the rows.
Otherwise nothing of it is committed, and a new one is made upon the winner. Appends, and deletes elsewhere, commute.

The old files stay for the readers of older versions, until a vacuum.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.ground import telemetry
from hashdist.ground.errors import Conflict
from hashdist.ground.settings import IndexSettings
from hashdist.index.index import Index
from hashdist.index.manifest import stamp, successor
from hashdist.index.shards.merging import Piece, merge, unify
from hashdist.index.shards.shard import files, write_ids, write_salts
from hashdist.index.view import View
from hashdist.nearest import scan
from hashdist.store.commit import Log, Names

_PLANS = 4
"""Plans before giving up: each has cost reading and writing its shards."""


class Compacted(NamedTuple):
    """Outcome of a compaction, or of a dry run.

    Attributes:
        version: the one it committed; the present one where there was nothing to do, and in a dry run.
        reason: why it was due, by the manifest; empty if it was not.
        shards: number of them before and after (after: 0 in a dry run).
        merged: shards that were read and replaced.
        dropped: hidden rows that went.
        tombstones: files before and after (after: 0 in a dry run).
        read: bytes of the files of the replaced shards.
        written: bytes of the files of the new ones.
    """

    version: int
    reason: str
    shards: tuple[int, int]
    merged: int
    dropped: int
    tombstones: tuple[int, int]
    read: int
    written: int


def due(manifest: Mapping[str, Any], settings: IndexSettings) -> str | None:
    """Why a version should be compacted, by its manifest alone; None if it need not be."""
    total = sum(shard["rows"] for shard in manifest["shards"])
    dead, small = total - manifest["rows"], _small(manifest, settings)
    telemetry.INDEX_SMALL_SHARDS.set(small)
    if dead > settings.compact_dead_share * total:
        return f"{dead} of {total} rows are deleted or replaced, more than {settings.compact_dead_share:.0%}"
    many = max(2, settings.compact_small_shards)
    for count, things in (
        (small, f"shards of fewer than {_small_rows(settings)} rows"),
        (len(manifest["tombstones"]), "files of deletions"),
        (len(manifest["salts"]), "files of salts"),
    ):
        if count >= many:
            return f"there are {count} {things}, {many} are too many"
    return None


def compact(
    index: Index, settings: IndexSettings | None = None, *, everything: bool = False, dry_run: bool = False
) -> Compacted:
    """Merge small shards and drop hidden rows, in one commit; in none where there is nothing to gain.

    In memory: the ids of the shards it reads, and about three times one new shard (measured: 36 MB for one of 12).

    Args:
        index: opened as the newest version.
        settings: shard_rows, and what is small or too much; None = the defaults.
        everything: as few shards as possible, without any hidden row.
        dry_run: say what would be done.

    Raises:
        Conflict: other writers touched the inputs of every plan, or committed something else first each time.
    """
    chosen = settings or IndexSettings()
    reason = due(index.manifest, chosen) or ""
    if dry_run:
        return _CompactionPlan.of(index.view, chosen, everything).compacted(index.version, reason)
    before = index.manifest
    work = _Compaction(index.versions, chosen, everything)
    committed = index.transact(work)
    if committed is None:
        sizes = len(before["shards"]), len(before["tombstones"])
        return Compacted(index.version, reason, (sizes[0],) * 2, 0, 0, (sizes[1],) * 2, 0, 0)
    telemetry.COMPACTIONS.inc()
    due(index.manifest, chosen)  # for the metrics
    return work.plan.compacted(committed, reason, work.made)


def _small_rows(settings: IndexSettings) -> int:
    return int(settings.compact_small_share * settings.shard_rows)


def _small(manifest: Mapping[str, Any], settings: IndexSettings) -> int:
    return sum(shard["rows"] < _small_rows(settings) for shard in manifest["shards"])


# Planning


@dataclass(frozen=True)
class _CompactionPlan:
    """A compaction worked out against one version.

    Attributes:
        view: that version.
        bins: shard numbers, joined bin by bin.
        inputs: their live rows, by shard number.
        worth: whether there is anything to gain.
    """

    view: View
    bins: list[list[int]]
    inputs: dict[int, Piece]
    worth: bool

    @classmethod
    def of(cls, view: View, settings: IndexSettings, everything: bool) -> "_CompactionPlan":
        """The plan for `view`."""
        old = view.manifest
        live = {number: _live(view, number) for number in range(len(view.shards))}
        chosen = [piece for number, piece in live.items() if everything or _wanted(piece, settings)]
        numbers = {piece.entry["path"]: number for number, piece in live.items()}
        bins = [
            [numbers[piece.entry["path"]] for piece in pieces]
            for pieces in _bins(chosen, settings.shard_rows)
            if _gains(pieces, settings, everything)
        ]
        many = 2 if everything else max(2, settings.compact_small_shards)
        plan = cls(view, bins, {number: live[number] for bin in bins for number in bin}, worth=True)
        fewer = len(old["tombstones"]) >= many and len(plan.groups) < len(old["tombstones"])
        return replace(plan, worth=bool(bins) or fewer or len(old["salts"]) >= many)

    @cached_property
    def dropped(self) -> int:
        """Hidden rows of the inputs."""
        return sum(piece.entry["rows"] - len(piece.rows) for piece in self.inputs.values())

    @cached_property
    def kept(self) -> list[int]:
        """The shards that stay."""
        return [number for number in range(len(self.view.shards)) if number not in self.inputs]

    @cached_property
    def groups(self) -> list[list[int]]:
        """Tombstones that apply to the same ones of the shards that stay, and to any of them at all."""
        versions = np.sort([self.view.manifest["shards"][number]["version"] for number in self.kept])
        groups: dict[int, list[int]] = {}
        for i, entry in enumerate(self.view.manifest["tombstones"]):
            groups.setdefault(int(np.searchsorted(versions, entry["version"])), []).append(i)
        return [members for applies, members in groups.items() if applies]

    def stands(self, view: View) -> bool:
        """Whether the commits between the planned version and this one left everything alone."""
        planned, now = self.view.manifest, view.manifest
        if now["model"] != planned["model"] or now["bits"] != planned["bits"]:
            return False
        shards = {shard["path"] for shard in now["shards"]}
        if any(shard["path"] not in shards for shard in planned["shards"]):
            return False
        if any(not _paths(planned[name]) <= _paths(now[name]) for name in ("tombstones", "salts")):
            return False
        new = [i for i, entry in enumerate(now["tombstones"]) if entry["path"] not in _paths(planned["tombstones"])]
        return not any(_among(view.tombstones[i][1], piece.ids) for i in new for piece in self.inputs.values())

    def compacted(self, version: int, reason: str, made: "_Made | None" = None) -> Compacted:
        """The outcome, committed as `version`."""
        old = self.view.manifest
        return Compacted(
            version=version,
            reason=reason,
            shards=(len(old["shards"]), len(self.kept) + len(made.shards) if made else 0),
            merged=len(self.inputs),
            dropped=self.dropped,
            tombstones=(len(old["tombstones"]), len(made.tombstones) if made else 0),
            read=sum(file["bytes"] for piece in self.inputs.values() for file in files(piece.entry)),
            written=sum(file["bytes"] for shard in made.shards for file in files(shard)) if made else 0,
        )


def _live(view: View, number: int) -> Piece:
    entry, shard = view.manifest["shards"][number], view.shards[number]
    return Piece(view.log.store, entry, shard, scan.live(view.dead(number), shard.rows))


def _wanted(piece: Piece, settings: IndexSettings) -> bool:
    rows = int(piece.entry["rows"])
    return rows - len(piece.rows) > settings.compact_dead_share * rows or rows < _small_rows(settings)


def _gains(pieces: Sequence[Piece], settings: IndexSettings, everything: bool) -> bool:
    """One shard alone is written again only for what is hidden in it."""
    if len(pieces) > 1:
        return True
    rows = int(pieces[0].entry["rows"])
    return rows - len(pieces[0].rows) > (0 if everything else settings.compact_dead_share * rows)


def _bins(pieces: Sequence[Piece], most_rows: int) -> Iterator[list[Piece]]:
    """Runs of pieces that fit together and into one shard, the smallest first."""
    kinds: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.rows)):
        for bin in kinds:
            if bin[0].kind == piece.kind and unify([bin[0].schema, piece.schema]) is not None:
                bin.append(piece)
                break
        else:
            kinds.append([piece])
    for together in kinds:
        bin, rows, schema = [], 0, together[0].schema
        for piece in together:
            union = unify([schema, piece.schema])
            if bin and (rows + len(piece.rows) > most_rows or union is None):
                yield bin
                bin, rows, union = [], 0, piece.schema
            bin.append(piece)
            rows, schema = rows + len(piece.rows), union if union is not None else piece.schema
        yield bin


def _among(some: NDArray[np.int64], ids: NDArray[np.int64]) -> bool:
    """Whether any of `some` is one of `ids`; both ascend."""
    at = np.searchsorted(ids, some)
    return bool(len(ids)) and bool((ids[at.clip(max=len(ids) - 1)] == some).any())


def _paths(entries: Sequence[Mapping[str, Any]]) -> set[str]:
    return {entry["path"] for entry in entries}


# Writing


class _Made(NamedTuple):
    """The files of a plan, as entries with the version they count from."""

    shards: list[dict[str, Any]]
    tombstones: list[dict[str, Any]]
    salts: list[dict[str, Any]]


class _Compaction:
    """Proposes the compacted version upon one view after the other; plans and writes again only where it must."""

    plan: _CompactionPlan
    made: _Made

    def __init__(self, log: Log, settings: IndexSettings, everything: bool) -> None:
        self._log, self._settings, self._everything = log, settings, everything
        self._plans = 0

    def __call__(self, view: View, _tried: int) -> dict[str, Any] | None:
        if not self._plans or not self.plan.stands(view):
            self._replan(view)
        if not self.plan.worth:
            return None
        planned, now = self.plan.view.manifest, view.manifest
        gone = {piece.entry["path"] for piece in self.plan.inputs.values()}
        changed = {
            "shards": [*(shard for shard in now["shards"] if shard["path"] not in gone), *self.made.shards],
            "tombstones": [*self.made.tombstones, *_since(planned, now, "tombstones")],
            "salts": [*self.made.salts, *_since(planned, now, "salts")],
        }
        merged, dropped = len(self.plan.inputs), self.plan.dropped
        return successor(view.version, "compact", changed, merged=merged, dropped=dropped)

    def _replan(self, view: View) -> None:
        if self._plans == _PLANS:
            raise Conflict(
                f"{view.uri}: other writers changed what was being compacted {_PLANS} times; nothing was committed; "
                "run again when it is quieter"
            )
        self._plans += 1
        self.plan = _CompactionPlan.of(view, self._settings, self._everything)
        if self.plan.worth:
            self.made = _write(self.plan, self._log.new_attempt(), self._settings.shard_rows)


def _since(planned: Mapping[str, Any], now: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Files that joined since the plan was made."""
    return [entry for entry in now[name] if entry["path"] not in _paths(planned[name])]


def _write(plan: _CompactionPlan, names: Names, shard_rows: int) -> _Made:
    version = plan.view.number
    shards = []
    for bin in plan.bins:
        pieces = [plan.inputs[number] for number in bin if len(plan.inputs[number].rows)]
        if pieces:
            shards += stamp(merge(pieces, names, shard_rows), version)
    return _Made(shards, list(_tombstones(plan, names)), _salts(plan, names))


def _tombstones(plan: _CompactionPlan, names: Names) -> Iterator[dict[str, Any]]:
    """The tombstones that the remaining shards need, one file for all that apply to the same shards."""
    view, entries = plan.view, plan.view.manifest["tombstones"]
    for members in plan.groups:
        version = max(entries[i]["version"] for i in members)
        ids = np.unique(np.concatenate([view.tombstones[i][1] for i in members]))
        needed = ids[_anywhere(view, [n for n in plan.kept if view.manifest["shards"][n]["version"] < version], ids)]
        if len(members) == 1 and len(needed) == entries[members[0]]["rows"]:
            yield dict(entries[members[0]])
        elif len(needed):
            file = write_ids(view.log.store, names.new("tombstones", ".npy"), needed)
            yield {**file, "version": version}


def _anywhere(view: View, shards: Sequence[int], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the ids are in any of these shards."""
    found = np.zeros(len(ids), np.bool_)
    for number in shards:
        found[view.shards[number].find(ids)[0]] = True
    return found


def _salts(plan: _CompactionPlan, names: Names) -> list[dict[str, Any]]:
    entries = plan.view.manifest["salts"]
    if len(entries) < 2:
        return [dict(entry) for entry in entries]
    file = write_salts(plan.view.log.store, names.new("salts", ".json"), plan.view.salts)
    return stamp([file], plan.view.number)
