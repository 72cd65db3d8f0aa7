"""Versions that are kept: tags, rollback, pins, and the clean-up that expires versions and deletes files.

A vacuum commits first and deletes second (docs/decisions.md, S14). Its version says which versions are expired (they
cannot be opened, tagged or rolled back to any more) and which attempts are revoked (nothing they wrote can be
committed any more, `manifest.successor` refuses it). Because versions are created one upon the other, this one version
settles it for everybody: a writer that slept proposes again upon it, and fails; a rollback or a tag that came first is
in the version that the vacuum is made upon. So whatever is deleted afterwards can be named by nothing that is yet to
come, and a vacuum that was killed is finished by the next one.

Kept: the newest version with its candidate and its rewrites, tagged versions, pinned versions, versions superseded
less than an age ago, and every file that one of these needs.

Deleted, by reason:
- `expired`: named by versions, the last of which was superseded that long ago (a dropped candidate's too);
- `unfinished`: of attempts that no version names and whose newest file is that old: killed or stalled writers;
- `left over`: of attempts that committed other files: what they wrote before another writer was first;
- `erased`: what a purge has written again without the erased rows, whatever its age and whoever pins it;
- `pins`: pins that are over.

Ages are differences between stamps of the store: a version is superseded when the store stamped the next manifest,
a file is as old as its stamp, and the present is what the store stamps now. No machine's clock is asked. What has no
such age stays. So does everything that is not named like a data file (<folder>/<attempt>/<name>), and every manifest.

A reader without permission to write cannot pin: it relies on the age alone, of which less than an hour must be forced.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hashdist.ground import telemetry
from hashdist.ground.errors import AlreadyExists, Conflict, HashdistError, InvalidInput, NotFound
from hashdist.index.index import Index
from hashdist.index.manifest import (
    CONTENT,
    LISTS,
    apply_rewrites,
    attempt_of,
    content,
    files_of,
    kept_numbers,
    ranges,
    resolve,
    successor,
)
from hashdist.index.pins import Clock, Pins, read_pins, store_time
from hashdist.index.view import View
from hashdist.store.base import Entry, Store
from hashdist.store.commit import Log, Version, named_files

LEAST_AGE_S = 3600.0
"""A vacuum of what is younger than this must be forced."""

EXPIRED, UNFINISHED, LEFT_OVER, ERASED, PINS = "expired", "unfinished", "left over", "erased", "pins"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DATA_FILE = re.compile(r"(?!manifests/|pins/)[^/]+/[0-9a-f]{32}/[^/]+")
_LISTED = {*LISTS, "candidate", "rewrites"}
_AT_ONCE = 16


def seconds(text: str) -> float:
    """A duration such as 90s, 30m, 12h, 7d or 2w. Raises InvalidInput."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if match is None:
        raise InvalidInput(f"a duration must be a number with s, m, h, d or w, such as 7d, found {text!r}")
    return float(match[1]) * _UNITS[match[2]]


# Tags and rollback


def tag(index: Index, name: str, version: int | None = None) -> int:
    """Name a version, which then stays; in one commit, or none where it has that name.

    Args:
        index: opened as the newest version.
        name: not a number, no white space.
        version: None = the one that `index` is at.

    Returns:
        The version that has the name.

    Raises:
        InvalidInput: no such name. NotFound: no such version, or it is expired. AlreadyExists: another version has it.
    """
    if not re.fullmatch(r"[^\s\x00-\x1f]{1,100}", name) or name.isdecimal():
        raise InvalidInput(f"a tag must be 1 to 100 characters without white space, and not a number, found {name!r}")
    wanted = index.version if version is None else version

    def propose(view: View, _tried: int) -> dict[str, Any] | None:
        number, tags = resolve(view.manifest, wanted), view.manifest.get("tags", {})
        if tags.get(name, number) != number:
            raise AlreadyExists(
                f"{view.uri}: the tag {name!r} names version {tags[name]}; delete it first, or choose another name"
            )
        return None if name in tags else successor(view.version, "tag", kept={"tags": {**tags, name: number}}, tag=name)

    index.transact(propose)
    return wanted


def untag(index: Index, name: str) -> int:
    """Take a tag away, in one commit; returns the version that had it. Raises NotFound."""
    had = 0

    def propose(view: View, _tried: int) -> dict[str, Any]:
        nonlocal had
        had = resolve(view.manifest, name) if not name.isdecimal() else 0
        if not had:
            raise NotFound(f"{view.uri} has no tag {name!r}")
        left = {other: number for other, number in view.manifest["tags"].items() if other != name}
        return successor(view.version, "untag", kept={"tags": left or None}, tag=name)

    index.transact(propose)
    return had


def rollback(index: Index, to: int | str) -> int:
    """Commit a version with the content of an older one; what is kept about the log stays the newest version's.

    Args:
        index: opened as the newest version.
        to: number or tag of the version whose content is to be served again.

    Returns:
        The new version; the present one where it has that content already.

    Raises:
        NotFound: no such version, or it is expired. Conflict: another writer has changed the content since `index` was
            opened or refreshed: look at what came, then decide again.
    """
    seen, number = content(index.manifest), resolve(index.manifest, to)

    def propose(view: View, _tried: int) -> dict[str, Any] | None:
        if content(view.manifest) != seen:
            raise Conflict(
                f"{view.uri}: version {view.number} ({view.manifest['operation']}) was committed by another writer "
                "meanwhile, and a rollback would undo it too; open the index again, look, and roll back again"
            )
        old = content(apply_rewrites(index.versions.read(resolve(view.manifest, number)).manifest, view.manifest))
        if old == seen:
            return None
        record = successor(view.version, "rollback", old, rolled_back_to=number)
        return {name: value for name, value in record.items() if name in old or name not in CONTENT}

    index.transact(propose)
    return index.version


# The clean-up


@dataclass
class Vacuumed:
    """Outcome of a vacuum, or of a dry run.

    Attributes:
        version: the one it committed; the newest one where nothing was to be expired or revoked.
        expired: versions that it expired.
        revoked: attempts that it revoked.
        deleted: [files, bytes] by reason.
        kept: versions that remain.
        pinned: pinned versions.
        foreign: files below the index that are none of its own; never touched.
        spared: files of expired versions that are left because of pins.
        unfinished: why not everything was deleted; a second run goes on. Empty: all done.
        dry_run: whether it only looked.
    """

    version: int
    expired: list[int]
    revoked: list[str]
    deleted: dict[str, list[int]]
    kept: int
    pinned: list[int]
    foreign: int
    spared: int = 0
    unfinished: str = ""
    dry_run: bool = False


def vacuum(
    index: Index, older_than_s: float, *, dry_run: bool = False, force: bool = False, clock: Clock = store_time
) -> Vacuumed:
    """Expire old versions and delete the files that nothing needs; see the head of this module.

    Args:
        index: opened as the newest version; it moves to the version that is committed.
        older_than_s: least age of what goes.
        dry_run: change nothing.
        force: allow less than LEAST_AGE_S.
        clock: the store's present time; tests put another in its place.

    Raises:
        InvalidInput: an age that must be forced. Conflict, Unavailable, OutcomeUnknown: of the commit; nothing was
            deleted. A failure after the commit is no error; `unfinished` says it.
    """
    if older_than_s < LEAST_AGE_S and not force:
        raise InvalidInput(
            f"an age of at least {LEAST_AGE_S / 3600:g} hour is required, found {older_than_s:g} s: searches without a "
            "pin and writers that are at work rely on it; if there are none, --force takes less"
        )
    look = _IndexFiles(index.versions, older_than_s, clock(index.store))
    if dry_run:
        plan = look.plan(index.versions.latest() or index.view.version)
        return _result(plan, look.deletable(plan, plan.pins.versions), dry_run=True)
    plans: list[_VacuumPlan] = []

    def propose(view: View, _tried: int) -> dict[str, Any] | None:
        plans.append(look.plan(view.version))
        return plans[-1].record()

    committed = index.transact(propose)
    plan, spared = plans[-1], 0
    try:
        # after the commit, again: who has pinned by now is spared, who pins later sees that the version is expired
        deletable = look.deletable(plan, plan.pins.versions | read_pins(index.store, look.now_s).versions)
        spared = len(plan.garbage) - len(deletable)
        done, failure = _delete(index.store, deletable)
    except HashdistError as error:
        done, failure = [], str(error)
    result = _result(plan, done, spared=spared, unfinished=failure)
    telemetry.VERSIONS_KEPT.set(result.kept)
    for reason, (count, size) in result.deleted.items():
        telemetry.VACUUMED_FILES.inc(count, reason=reason)
        telemetry.VACUUMED_BYTES.inc(size, reason=reason)
    return replace(result, version=committed or index.version)


class _Garbage(NamedTuple):
    """A file to delete."""

    reason: str
    entry: Entry


@dataclass(frozen=True)
class _VacuumPlan:
    """A vacuum worked out against one version."""

    head: Version
    keep: list[int]
    expire: list[int]
    revoke: list[str]
    garbage: list[_Garbage]
    pins: Pins
    older_than_s: float
    foreign: int

    def record(self) -> dict[str, Any] | None:
        """The record of the version that says so; None where there is nothing to expire or revoke."""
        if not self.expire and not self.revoke:
            return None
        kept = set(self.keep)
        return successor(
            self.head,
            "vacuum",
            kept={
                "expired": ranges(number for number in range(1, self.head.number) if number not in kept),
                "revoked": sorted({*self.head.manifest.get("revoked", ()), *self.revoke}),
            },
            vacuum={"older_than_s": self.older_than_s, "expired": ranges(self.expire), "revoked": len(self.revoke)},
        )


class _IndexFiles:
    """The files of an index, listed once; plans are made of them upon one version after the other.

    A plan may be made upon a version that is newer than the listing: what that one brought is not in the listing, or
    is named by it.
    """

    def __init__(self, log: Log, older_than_s: float, now_s: float) -> None:
        self.now_s, self._log, self._older_than_s = now_s, log, older_than_s
        self._data: list[Entry] = []
        self._stamps: dict[int, float] = {}
        self._foreign = 0
        self._manifests: dict[int, dict[str, Any]] = {}
        self._known: dict[tuple[str, ...], frozenset[str]] = {}
        for entry in log.store.list():
            if _DATA_FILE.fullmatch(entry.name):
                self._data.append(entry)
            elif match := re.fullmatch(r"manifests/(\d{20})\.json", entry.name):
                self._stamps[int(match[1])] = entry.modified
            elif not entry.name.startswith("pins/"):
                self._foreign += 1

    def plan(self, head: Version) -> _VacuumPlan:
        """The plan upon `head`."""
        numbers, pins = kept_numbers(head.manifest), read_pins(self._log.store, self.now_s)
        manifests = self._read(numbers)
        held = {head.number, *head.manifest.get("tags", {}).values(), *pins.versions}
        expire = [n for n in numbers if n not in held and self._is_old(self._superseded(n))]
        expired = set(expire)
        keep = [number for number in numbers if number not in expired]
        last = {path: number for number in numbers for path in self._named(manifests[number])}
        erased = {path for manifest in manifests.values() for path in manifest.get("purge", {}).get("delete", ())}
        needed = self._named(head.manifest)
        for number in numbers:
            now = self._content(manifests[number], head)
            if head.manifest.get("rewrites"):
                erased |= self._named(content(manifests[number])) - now
            needed |= now if number not in expired else set()
        garbage, unnamed = self._named_once(last, needed, erased)
        revoked = set(head.manifest.get("revoked", ()))
        dead = [a for a, entries in unnamed.items() if a in revoked or all(map(self._is_old_file, entries))]
        garbage += [_Garbage(UNFINISHED, e) for a in dead for e in unnamed[a] if self._is_old_file(e)]
        garbage += [_Garbage(UNFINISHED, e) for e in self._log.store.abandoned() if self._is_old_file(e)]
        garbage += [_Garbage(PINS, entry) for entry in pins.over]
        revoke = sorted(set(dead) - revoked)
        return _VacuumPlan(head, keep, expire, revoke, garbage, pins, self._older_than_s, self._foreign)

    def _named_once(
        self, last: Mapping[str, int], needed: set[str], erased: set[str]
    ) -> tuple[list[_Garbage], dict[str, list[Entry]]]:
        """Garbage among the files of attempts that were committed, and the files of other attempts, by attempt."""
        committed = {attempt_of(path) for path in last if _DATA_FILE.fullmatch(path)}
        garbage, unnamed = [], defaultdict(list)
        for entry in self._data:
            if entry.name in needed:
                continue
            if entry.name in erased:
                garbage.append(_Garbage(ERASED, entry))
            elif entry.name in last:
                if self._is_old(self._superseded(last[entry.name])):
                    garbage.append(_Garbage(EXPIRED, entry))
            elif attempt_of(entry.name) not in committed:
                unnamed[attempt_of(entry.name)].append(entry)
            elif self._is_old_file(entry):
                garbage.append(_Garbage(LEFT_OVER, entry))
        return garbage, unnamed

    def deletable(self, plan: _VacuumPlan, pinned_versions: Iterable[int]) -> list[_Garbage]:
        """The plan's garbage without what pinned versions name, expired or not. A purge goes over pins."""
        read = self._read([number for number in pinned_versions if 1 <= number <= plan.head.number])
        spared = set().union(*(self._content(manifest, plan.head) for manifest in read.values()))
        return [one for one in plan.garbage if one.reason == ERASED or one.entry.name not in spared]

    def _read(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        wanted = list(numbers)
        new = [number for number in wanted if number not in self._manifests]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._manifests.update((version.number, version.manifest) for version in pool.map(self._log.read, new))
        return {number: self._manifests[number] for number in wanted}

    def _named(self, record: Mapping[str, Any]) -> set[str]:
        """Every file that a record names, wherever in it. Entries are worked out once: versions share most of them."""
        parts = [record, record.get("candidate") or {}]
        lists = [entry for part in parts for name in LISTS for entry in part.get(name, ())]
        lists += [entry for entry in record.get("rewrites", {}).values() if entry is not None]
        rest = [value for part in parts for name, value in part.items() if name not in _LISTED]
        return {entry["path"] for entry in named_files(rest)}.union(*map(self._files_of, lists))

    def _files_of(self, entry: Mapping[str, Any]) -> frozenset[str]:
        parts = entry.get("parts", {})
        same = (entry["path"], *parts, *(own for _, _, *more in parts.values() for own in more))
        if same not in self._known:
            self._known[same] = frozenset(file["path"] for file in files_of(entry))
        return self._known[same]

    def _content(self, manifest: Mapping[str, Any], head: Version) -> set[str]:
        """The files that a version's content consists of now."""
        return self._named(content(apply_rewrites(manifest, head.manifest)))

    def _superseded(self, number: int) -> float | None:
        return self._stamps.get(number + 1)

    def _is_old(self, stamp: float | None) -> bool:
        """Whether that was an age ago; what has no stamp is not old."""
        return stamp is not None and stamp > 0 and self.now_s - stamp >= self._older_than_s

    def _is_old_file(self, entry: Entry) -> bool:
        return self._is_old(entry.modified)


def _delete(store: Store, garbage: Sequence[_Garbage]) -> tuple[list[_Garbage], str]:
    """Delete files; returns those that are gone, and why others are not."""
    failed: dict[str, HashdistError] = {}
    store.delete_all((one.entry.name for one in garbage), failed)
    done = [one for one in garbage if one.entry.name not in failed]
    return done, next((str(failed[one.entry.name]) for one in garbage if one.entry.name in failed), "")


def _result(plan: _VacuumPlan, done: Iterable[_Garbage], **more: Any) -> Vacuumed:
    deleted: dict[str, list[int]] = {}
    for reason, entry in done:
        count = deleted.setdefault(reason, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + entry.size
    return Vacuumed(
        version=plan.head.number,
        expired=plan.expire,
        revoked=plan.revoke,
        kept=len(plan.keep),
        pinned=sorted(plan.pins.versions),
        foreign=plan.foreign,
        deleted=deleted,
        **more,
    )
