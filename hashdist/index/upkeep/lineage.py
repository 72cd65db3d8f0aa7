"""Artefacts that the kept versions of the indexes were made from, and the withdrawal of all others.

Reached, and kept: artefacts that a record of a kept version of any index below the root names (codes, model,
collection, failed codes), what the manifests of those name in turn, what a caller asks to keep, and whatever is
younger than the age with all that it names. An artefact is as young as the youngest of its records and files. While a
stage or a training run is unfinished and young, nobody can tell what it reads: then nothing is withdrawn.

The order of a withdrawal: a mark, the manifest, the part records; the data files follow in a later vacuum, an age
after the mark, and only those that no record names by then.
- The manifest goes first, because readers start there: whoever comes later finds nothing, instead of half.
- Who has read it already reads on for an age, as with an expired version.
- The part records go before the data, because a stage takes its finished parts from them: one that runs at this very
  moment either finds a part with its data, or makes it again under new names. If it commits parts that it found before
  they were withdrawn, its manifest names their files, and the later vacuum leaves them.
- Killed in between, what stands is an artefact without manifest, with some of its parts, all of them whole.

Of training runs only what no resumption needs goes: Ray's own folder, and states that the newest records do not name.
Records of logs are never deleted. An index elsewhere is not seen from here: ask for its artefacts to be kept.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from hashdist.ground.errors import Corrupt, NotFound
from hashdist.ground.progress import say
from hashdist.index.manifest import kept_numbers
from hashdist.index.pins import Clock, store_time
from hashdist.store import Store
from hashdist.store.base import Entry
from hashdist.store.commit import KINDS, MANIFEST, Log, named_files, read_record

RESUMED_FROM = 2
"""Newest records of a training run whose states are kept (hashdist/models/checkpoints.py)."""

_MARKS = "withdrawn/"
_REFERENCE = re.compile(rf"(?:^|/)({'|'.join(KINDS)})/([^/\s]+)/?$")
_RECORD = re.compile(r"(.+)/manifests/(\d{20})\.json")
_ATTEMPT = re.compile(r"data/([^/]+)/[^/]+")
_AT_ONCE = 16

Name = tuple[str, str]
"""Kind and name of an artefact."""


@dataclass
class Withdrawn:
    """Outcome of a vacuum of artefacts, or of a dry run.

    Attributes:
        reached: artefacts that stay because something needs them or they are young.
        withdrawn: names (kind/name) of those that nothing needs: nobody finds them any more, their data goes later.
        waiting: bytes of artefacts withdrawn before that are not an age old yet.
        deleted: [files, bytes] by reason.
        blocked: why nothing was withdrawn; empty: nothing stood against it.
        dry_run: whether it only looked.
    """

    reached: int = 0
    withdrawn: list[str] = field(default_factory=list)
    waiting: int = 0
    deleted: dict[str, list[int]] = field(default_factory=dict)
    blocked: str = ""
    dry_run: bool = False


@dataclass
class _Folder:
    """The objects of an artefact or a training run, by what they are; names as from the root."""

    records: list[Entry] = field(default_factory=list)
    data: list[Entry] = field(default_factory=list)
    marks: list[Entry] = field(default_factory=list)

    @property
    def newest(self) -> float:
        """When anything of it was last written."""
        return max((entry.modified for entry in [*self.records, *self.data]), default=0.0)


class _Step(NamedTuple):
    """A deletion, with its reason."""

    reason: str
    entry: Entry


def vacuum_artefacts(
    root: Store,
    older_than_s: float,
    *,
    keep: Iterable[str] = (),
    also: Iterable[Log] = (),
    dry_run: bool = False,
    clock: Clock = store_time,
) -> Withdrawn:
    """Withdraw the artefacts below `root` that nothing needs, and delete what was withdrawn an age ago.

    Args:
        root: of all artefacts and indexes.
        older_than_s: least age of what goes.
        keep: artefacts to keep nevertheless, by URI or name.
        also: indexes that lie elsewhere.
        dry_run: change nothing.
        clock: the root's present time.

    Raises:
        NotFound: `keep` names what is not there. Corrupt, Unavailable: a record could not be read; nothing was changed.
    """
    look = _RootFiles(root, older_than_s, clock(root))
    reached = look.reached(keep, [*look.indexes(), *also])
    found = Withdrawn(reached=len(reached & set(look.artefacts)), blocked=look.blocked(), dry_run=dry_run)
    steps = look.swept_data() + look.swept_runs()
    steps += [_Step("unfinished", entry) for entry in root.abandoned() if look.is_old(entry.modified)]
    for name, folder in look.artefacts.items():
        if name not in reached and folder.records and look.is_old(folder.newest) and not found.blocked:
            found.withdrawn.append("/".join(name))
            if not dry_run:
                _withdraw(root, name, folder)
    found.waiting = sum(e.size for f in look.artefacts.values() if f.marks and not f.records for e in f.data)
    found.waiting -= sum(step.entry.size for step in steps if step.reason == "withdrawn")
    for reason, entry in steps:
        count = found.deleted.setdefault(reason, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + entry.size
    if not dry_run:
        root.delete_all(step.entry.name for step in steps)
    return found


def _withdraw(root: Store, name: Name, folder: _Folder) -> None:
    """See the order at the head of this module."""
    base = "/".join(name)
    root.put(f"{base}/{_MARKS}{uuid4().hex}", b"")
    root.delete(f"{base}/{MANIFEST}")
    for entry in folder.records:
        root.delete(entry.name)
    say(f"withdrawn: {base}")


class _RootFiles:
    """The objects below a root, listed once."""

    def __init__(self, root: Store, older_than_s: float, now_s: float) -> None:
        self._root, self._older_than_s, self._now_s = root, older_than_s, now_s
        self.artefacts: defaultdict[Name, _Folder] = defaultdict(_Folder)
        self.runs: defaultdict[str, _Folder] = defaultdict(_Folder)
        self._logs: set[str] = set()
        for entry in root.list():
            kind, _, rest = entry.name.partition("/")
            name, _, inner = rest.partition("/")
            if kind in KINDS and inner:
                _sort(entry, inner, self.artefacts[kind, name])
            elif kind == "runs" and inner:
                _sort(entry, inner, self.runs[name])
            elif match := _RECORD.fullmatch(entry.name):
                self._logs.add(match[1])

    def is_old(self, stamp: float) -> bool:
        """Whether that was an age ago; what has no stamp is not old."""
        return stamp > 0 and self._now_s - stamp >= self._older_than_s

    def indexes(self) -> list[Log]:
        """The logs below the root that are no training runs."""
        return [Log(self._root.child(path)) for path in sorted(self._logs)]

    def reached(self, keep: Iterable[str], indexes: Iterable[Log]) -> set[Name]:
        """Everything that is needed, there or not."""
        todo = [name for log in indexes for record in _kept(log) for name in _references(record)]
        todo += [name for name, folder in self.artefacts.items() if not self.is_old(folder.newest)]
        todo += [self._asked(text) for text in keep]
        reached: set[Name] = set()
        while todo:
            name = todo.pop()
            if name not in reached:
                reached.add(name)
                todo += _references(self._manifest(name))
        return reached

    def _asked(self, text: str) -> Name:
        found = [name for name in self.artefacts if text.rstrip("/").endswith(name[1]) and self.artefacts[name].records]
        if len(found) != 1:
            raise NotFound(f"an artefact below {self._root.uri} is to be kept, found {len(found)} named {text}")
        return found[0]

    def _manifest(self, name: Name) -> Mapping[str, Any]:
        path = "/".join((*name, MANIFEST))
        there = name in self.artefacts and any(entry.name == path for entry in self.artefacts[name].records)
        return read_record(self._root, path) if there else {}

    def blocked(self) -> str:
        """Why it cannot be told what is needed; empty where it can."""
        for name, folder in self.artefacts.items():
            unfinished = not any(entry.name.endswith(f"/{MANIFEST}") for entry in folder.records)
            if unfinished and folder.newest and not self.is_old(folder.newest):
                return f"{'/'.join(name)} is being made, or was left unfinished less than the age ago"
        for run, folder in self.runs.items():
            if not self.is_old(folder.newest) and not self._manifest(("models", run)):
                return f"runs/{run} is being trained, or was left unfinished less than the age ago"
        return ""

    def swept_data(self) -> list[_Step]:
        """Data files that no record of their artefact names: of dead attempts, and of what was withdrawn an age ago."""
        steps: list[_Step] = []
        for name, folder in self.artefacts.items():
            if not folder.marks and not any(self.is_old(entry.modified) for entry in folder.data):
                continue
            base = "/".join(name)
            named = _paths(self._manifest(name))
            if any(entry.name.removeprefix(f"{base}/") not in named for entry in folder.data):
                for entry in folder.records:
                    named |= _paths(_plain(self._root, entry))
            unnamed = [e for e in folder.data if e.name.removeprefix(f"{base}/") not in named]
            marked = max((mark.modified for mark in folder.marks), default=None)
            if marked is not None:
                gone = [entry for entry in unnamed if self.is_old(marked) and self.is_old(entry.modified)]
                steps += [_Step("withdrawn", entry) for entry in gone]
                if self.is_old(marked) and len(gone) == len(unnamed):
                    steps += [_Step("withdrawn", mark) for mark in folder.marks]
            else:
                steps += [_Step("unfinished", entry) for entry in self._dead(unnamed, base)]
        return steps

    def _dead(self, unnamed: list[Entry], base: str) -> Iterator[Entry]:
        """Files of attempts whose newest file is old."""
        newest: dict[str, float] = {}
        attempts = {entry.name: _attempt(entry.name.removeprefix(f"{base}/")) for entry in unnamed}
        for entry in unnamed:
            attempt = attempts[entry.name]
            newest[attempt] = max(newest.get(attempt, 0.0), entry.modified)
        return (entry for entry in unnamed if self.is_old(newest[attempts[entry.name]]))

    def swept_runs(self) -> list[_Step]:
        """Files of training runs that have rested for an age, which no resumption needs."""
        steps: list[_Step] = []
        for run, folder in self.runs.items():
            if not folder.records or not self.is_old(folder.newest):
                continue
            newest = sorted(folder.records, key=lambda entry: entry.name)[-RESUMED_FROM:]
            needed = {f"runs/{run}/{path}" for entry in newest for path in _paths(_plain(self._root, entry))}
            left = [e for e in folder.data if e.name.startswith((f"runs/{run}/states/", f"runs/{run}/ray/"))]
            steps += [_Step("training", entry) for entry in left if entry.name not in needed]
        return steps


def _sort(entry: Entry, inner: str, folder: _Folder) -> None:
    if inner.startswith(_MARKS):
        folder.marks.append(entry)
    elif inner.endswith(".json") and not inner.startswith(("data/", "states/", "ray/")):
        folder.records.append(entry)
    else:
        folder.data.append(entry)


def _attempt(inner: str) -> str:
    match = _ATTEMPT.fullmatch(inner)
    return match[1] if match else inner


def _kept(log: Log) -> Iterator[Mapping[str, Any]]:
    """The records of the versions that can be opened."""
    newest = log.latest()
    if newest is not None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from (version.manifest for version in pool.map(log.read, kept_numbers(newest.manifest)))


def _references(value: Any) -> list[Name]:
    """Every artefact whose URI is somewhere in a record, and the codes that an index was built from."""
    found: list[Name] = []
    if isinstance(value, str) and (match := _REFERENCE.search(value)):
        found.append((match[1], match[2]))
    elif isinstance(value, Mapping):
        found += [("codes", value["built_from"])] if isinstance(value.get("built_from"), str) else []
        found += [name for part in value.values() for name in _references(part)]
    elif isinstance(value, list):
        found += [name for part in value for name in _references(part)]
    return found


def _paths(record: Any) -> set[str]:
    return {str(entry["path"]) for entry in named_files(record)}


def _plain(root: Store, entry: Entry) -> Any:
    """A record, whoever's and of whichever format: only the names in it are looked at."""
    try:
        return json.loads(root.get(entry.name))
    except ValueError as error:
        raise Corrupt(f"{root.uri}/{entry.name} must be JSON, found something else: {error}") from error
