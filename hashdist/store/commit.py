"""The commit: how a result becomes visible, whole and once, on any store. This comment is the specification.

One primitive, `create_record`: a small JSON record is created under a name that nobody has used. Two shapes of it:

- **Artefact**, `ROOT/<kind>/<name>/`: one result, its name the digest of what it is made from.
  `manifest.json` (its existence is the commit), `parts/<8 digits>.json` (one record a finished part),
  `data/<attempt>/<uuid>.<suffix>` (everything the two of them name).
- **Log**, any folder: numbered versions, `manifests/<20 digits>.json`, each naming its parent, plus data files
  `<folder>/<attempt>/<uuid><suffix>` of immutable bytes. Version n + 1 is created by one who has read version n.
  Versions are never deleted, so a number is never used twice and a writer that slept through a clean-up cannot win an
  old number. An attempt is what one writer writes for one version: its files are named by that version, or by none.

What every party does, and what it may assume
- A **writer** writes data files under names of its own attempt (new in every process and object), completely,
  before it creates the record that names them. It never changes or overwrites an object. If it dies, what it wrote
  is named by nothing. It may assume that a version it has created upon another followed that one and nothing
  else, and that everything its record names from the version below is there. It may not assume that its own
  files wait for ever: a clean-up may take it for dead and revoke its attempt, which it learns when it commits.
- A **reader** starts from a record and follows the names in it; it never lists data folders. So it sees all of a
  result or none of it. The newest version stays whole for as long as it is the newest and for an age after; an older
  one as long as the newest does not call it expired. A reader that takes longer **pins**: it first writes a pin, then
  looks whether its version is expired. Bytes that it opens are checksummed, and no file under a name ever changes.
- A **reader without permission to write** cannot pin. It relies on clean-ups leaving alone what was superseded less
  than an age ago, which is an hour at least. Later it may find a file gone (NotFound), never another file in its
  place.
- A **cleaner** commits first and deletes second (hashdist/index/upkeep/retention.py). Its version names the versions it
  expires and the attempts it revokes; since all later versions are created upon it, nothing that it deletes can be
  named again. After the commit it looks for pins, and spares their versions. It never deletes records. Ages are
  differences of the store's own stamps; no clock of a machine counts, and what has no known age stays. It may
  be killed anywhere, and run by several at once.
- A **purger** (erasure) writes files again without the erased rows, and commits a version that names the new file for
  each old one, in older versions too, and what is to be deleted; then it deletes, whatever is pinned. A reader of an
  older version applies the newest version's rewrites. A writer whose content is from before the purge fails.

What another writer's version means for one's own (docs/decisions.md, S13), to be worked out again upon each winner
- Rows to add, change or remove: commute where the keys have nothing in common. A row that the winner brought already
  (same digest and code) is dropped, the rule for existing keys is applied to the others, what remains is committed, or
  nothing. A tombstone hides only rows of shards committed before it, so what a winner added later stays.
- Compaction: conflicts with whatever touched the files it was made from, or planned again from the start. Rows
  that a winner hid do not come back.
- Another model, a build, a rollback: conflict with every change of the content.
- Tags, expiry, candidates: part of what every version carries on from the one below; they commute with changes of the
  content and are worked out again upon the winner's.

What a store must give (hashdist/store/base.py; `hashdist storage check` tries it out)
- A name holds a whole object or none, and an object that was written is seen by every later read and listing.
- `create` on one name succeeds for exactly one caller. Local: a temporary file in the same folder, fsync, link() to
  the final name (EEXIST = refused), fsync of the folder; never O_EXCL on the final name, where a kill would leave an
  empty record for ever. S3: PUT with `If-None-Match: *`; 412 = refused; 409 = not carried out, try again. Some servers
  accept that header and ignore it: `prove_conditional_create` finds out, once per process and bucket, before the
  first record is created there.
- Stamps of objects come from one clock, which may differ from every other.

How `create_record` decides
- Each call has a write id (a UUID), in the record and in the object's metadata; repeats of a call keep it.
- The store says "done": won. Nothing after this turns the success into an error.
- Refused, competing request, time-out, 5xx: the record is read back. Own write id: won (the answer was lost, or the
  request was carried out twice). Another's: lost, the other record stands. Absent: try again, after a growing pause.
- Given up, after the last try or because the store takes no more requests (permissions): OutcomeUnknown once any
  request may have had an effect or a refusal could not be read back (it may still land: read again later, delete
  nothing); else the store's own error, Unavailable or InvalidInput, and nothing is or will be there.

What a caller learns
- Artefact parts and manifests: the record that stands, its own or the first writer's. Both name complete data made
  from the same inputs by the same settings, so either will do.
- Log: the new version, or CommitLost (a Conflict) with the version that stands there: re-read, rebase, commit again.
- Corrupt: bytes that do not match their checksum or are not a record; never retried.
- InvalidInput: a record of a newer format, or a store without conditional create.

A record is canonical JSON (UTF-8, sorted keys, no spaces) with `format_version`, `write_id` and `checksum` (SHA-256 of
the record without `checksum`). Data files are named as {"path", "bytes", "sha256", "rows"}.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hashdist.ground import telemetry
from hashdist.ground.errors import Conflict, Corrupt, HashdistError, InvalidInput, NotFound, OutcomeUnknown, Unavailable
from hashdist.ground.schema import FORMAT_VERSION
from hashdist.ground.version import __version__
from hashdist.store import Store, open_store
from hashdist.store.base import Contended, Exists, checked_name

KINDS = ("collections", "features", "graphs", "models", "codes")
"""Kinds of artefacts, each a folder under the root. Indexes and training runs are logs."""

MANIFEST = "manifest.json"
REWRITES = "rewrites/"
"""Folder of the numbered records by which an erasure says what stands in the place of an artefact's files."""
TRIES = 8
"""Creates of one record before giving up; with the pauses about half a minute."""

_WHOLE_FILE_BYTES = 8 << 20
_READERS = 16
_proved: set[tuple[int, str]] = set()


# Records


def digest(value: Any) -> str:
    """32 hex digits of a JSON value: equal for equal values whatever the order of keys."""
    return hashlib.blake2b(_canonical(value), digest_size=16).hexdigest()


def create_record(
    store: Store, name: str, body: Mapping[str, Any], *, sleep: Callable[[float], None] = time.sleep
) -> tuple[dict[str, Any], bool]:
    """Create a record, unless one stands at `name` already.

    Returns:
        The record that stands now (as a reader would see it, with `write_id`), and whether this call made it.

    Raises:
        Unavailable: not created, nothing is there. OutcomeUnknown: it may have been, or may still be, created.
        Corrupt: what stands there is no record. InvalidInput: not JSON, or the store does not refuse second creates.
    """
    _require_proof(store, sleep)
    write_id = uuid4().hex
    data, record = _encode({"format_version": FORMAT_VERSION, **body, "write_id": write_id})
    failure: HashdistError = Unavailable(f"{store.uri}/{name} could not be created")
    in_doubt = False  # whether a request may have had an effect: a refusal may come of an earlier one's success
    for attempt in range(TRIES):
        if attempt:
            sleep(_pause_s(attempt))
        try:
            store.create(name, data, write_id)
        except (Exists, Unavailable, OutcomeUnknown) as error:
            failure, in_doubt = error, in_doubt or not isinstance(error, Unavailable)
            telemetry.COMMIT_RETRIES.inc(reason=_reason(error))
        except HashdistError as error:
            if not in_doubt:
                raise
            raise _unknown(store, name, attempt + 1, error) from error
        else:
            telemetry.COMMITS.inc(outcome="won")
            return record, True
        try:
            found = store.get(name)
        except (NotFound, Unavailable):
            continue
        except HashdistError as error:  # no permission to read, for example
            raise _unknown(store, name, attempt + 1, error) from error
        standing = _decode(found, f"{store.uri}/{name}")
        won = standing["write_id"] == write_id
        telemetry.COMMITS.inc(outcome="recovered" if won else "lost")
        return standing, won
    if in_doubt:
        raise _unknown(store, name, TRIES, failure) from failure
    raise Unavailable(f"{store.uri}/{name}: not created in {TRIES} tries ({failure}); run again later") from failure


def _unknown(store: Store, name: str, tries: int, failure: HashdistError) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"{store.uri}/{name}: after {tries} tries it is not known whether the record was created ({failure}); "
        "run again when the store answers, and delete nothing"
    )


def read_record(store: Store, name: str) -> dict[str, Any]:
    """The record at `name`, checked. Raises NotFound, Corrupt, Unavailable, or InvalidInput for a newer format."""
    return _decode(store.get(name), f"{store.uri}/{name}")


def _encode(body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """A record's bytes, and the record as a reader will see it."""
    plain = {key: value for key, value in body.items() if key != "checksum"}
    record: dict[str, Any] = json.loads(_canonical(plain))
    return _canonical({**record, "checksum": hashlib.sha256(_canonical(record)).hexdigest()}), record


def _decode(data: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise Corrupt(f"{where} is not JSON ({len(data)} bytes: {error}); restore it from a backup") from error
    if not isinstance(record, dict):
        raise Corrupt(f"{where} must hold a JSON object, found {type(record).__name__}")
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InvalidInput(
            f"{where} has format_version {version}, hashdist {__version__} reads up to {FORMAT_VERSION}; upgrade it"
        )
    checksum = record.pop("checksum", None)
    if checksum != hashlib.sha256(_canonical(record)).hexdigest() or not record.get("write_id"):
        raise Corrupt(f"{where} does not match its checksum; restore it from a backup")
    return record


def _canonical(value: Any) -> bytes:
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
        ).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"a record must be plain JSON with finite numbers: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _pause_s(attempt: int) -> float:
    """Full jitter below 0.1, 0.2, ... 10 s: writers that met once should not meet again."""
    return random.uniform(0.02, min(10.0, 0.1 * 2**attempt))


def _reason(error: HashdistError) -> str:
    for kind, reason in ((Exists, "exists"), (Contended, "contended"), (OutcomeUnknown, "unknown")):
        if isinstance(error, kind):
            return reason
    return "unavailable"


def now() -> str:
    """The present time in UTC, ISO 8601 to the second: `created_at` of manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# Proof of the one condition that everything rests on


def prove_conditional_create(store: Store, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Create one fresh name twice in `store`, and require that the second create is refused.

    The probe object is deleted again where that is allowed. Raises InvalidInput with the way out for a store that
    accepts both; Unavailable when the store does not answer for long enough to tell.
    """
    name = f"hashdist-probe-{uuid4().hex}.json"
    try:
        if not create_until_answered(store, name, sleep):
            return  # refused although fresh: the answer to the first request was lost, and the repeat was refused
        if create_until_answered(store, name, sleep):
            raise InvalidInput(
                f"{store.uri}: a second create of one name must be refused, but this store accepted it (it ignores "
                "If-None-Match), so concurrent writers would overwrite each other. Use a local folder, AWS S3, or an "
                "S3 server that honours conditional PUT (for example Ceph, or a recent MinIO)"
            )
    finally:
        with suppress(HashdistError):
            store.delete(name)


def create_until_answered(store: Store, name: str, sleep: Callable[[float], None], data: bytes = b"{}") -> bool:
    """Whether a create of `name` was carried out (True) or refused (False). Raises Unavailable."""
    failure: HashdistError | None = None
    for attempt in range(TRIES):
        if attempt:
            sleep(_pause_s(attempt))
        try:
            store.create(name, data, "probe")
        except Exists:
            return False
        except (Unavailable, OutcomeUnknown) as error:
            failure = error
        else:
            return True
    raise Unavailable(f"{store.uri}: no answer to {TRIES} creates ({failure}); run again later") from failure


def _require_proof(store: Store, sleep: Callable[[float], None]) -> None:
    scope = store.proof_scope()
    if scope is None or (os.getpid(), scope) in _proved:
        return
    prove_conditional_create(store, sleep=sleep)
    _proved.add((os.getpid(), scope))


# Data files


def write_file(store: Store, name: str, data: bytes | memoryview, rows: int = 0) -> dict[str, Any]:
    """Write a data file; returns the entry by which records name it."""
    store.put(name, data)
    return {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": rows}


def read_file(store: Store, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a data file. Raises Corrupt where they do not match the entry, NotFound, Unavailable."""
    data = store.get(entry["path"])
    found = hashlib.sha256(data).hexdigest()
    if len(data) != entry["bytes"] or found != entry["sha256"]:
        raise Corrupt(
            f"{store.uri}/{entry['path']}: {entry['bytes']} bytes with SHA-256 {entry['sha256']} were committed, "
            f"found {len(data)} bytes with {found}"
        )
    return data


def write_table(store: Store, name: str, table: pa.Table, *, row_group_rows: int = 65_536) -> dict[str, Any]:
    """Write a table as uncompressed parquet with page checksums; returns its entry."""
    words = [field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_list(field.type)]
    ordered = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="none",
        use_dictionary=words,
        write_statistics=ordered,
        write_page_checksum=True,
    )
    return write_file(store, name, memoryview(sink.getvalue()), rows=table.num_rows)


def read_table(
    store: Store, entry: Mapping[str, Any], columns: Sequence[str] | None = None, rows: tuple[int, int] | None = None
) -> pa.Table:
    """A table that `write_table` wrote: all of it, some columns, or rows [start, stop).

    Whole and small files are checked by SHA-256; of large ones only the pages asked for are read, checked by their
    CRC. Raises Corrupt, NotFound, InvalidInput for a column that is not there.
    """
    where = f"{store.uri}/{entry['path']}"
    partial = entry["bytes"] > _WHOLE_FILE_BYTES and (columns is not None or rows is not None)
    try:
        with _open_parquet(store, entry, whole=not partial) as file:
            absent = set(columns or ()) - set(file.schema_arrow.names)
            if absent:
                raise InvalidInput(f"{where} must have the columns {sorted(absent)}, found {file.schema_arrow.names}")
            wanted = None if columns is None else list(columns)
            return file.read(wanted) if rows is None else _read_rows(file, wanted, *rows)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"{where} does not exist") from error
        if isinstance(error, OSError) and store.is_away(error):
            raise Unavailable(f"{where} cannot be read now: {error}") from error
        raise Corrupt(f"{where} is not the parquet file that was committed: {error}") from error


def _open_parquet(store: Store, entry: Mapping[str, Any], whole: bool) -> pq.ParquetFile:
    if whole:
        return pq.ParquetFile(pa.BufferReader(read_file(store, entry)))
    filesystem, base = store.filesystem()
    source = filesystem.open_input_file(f"{base}/{checked_name(entry['path'])}")
    if source.size() != entry["bytes"]:
        raise Corrupt(f"{store.uri}/{entry['path']}: {entry['bytes']} bytes were committed, found {source.size()}")
    return pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)


def _read_rows(file: pq.ParquetFile, columns: list[str] | None, start: int, stop: int) -> pa.Table:
    groups: list[int] = []
    first = offset = 0
    for group in range(file.num_row_groups):
        last = first + file.metadata.row_group(group).num_rows
        if first < stop and last > start:
            if not groups:
                offset = first
            groups.append(group)
        first = last
    return file.read_row_groups(groups, columns).slice(start - offset, stop - start)


def named_files(record: Any) -> Iterator[Mapping[str, Any]]:
    """Every entry of a data file that a record names, wherever in it: in fields that only others know, too."""
    if isinstance(record, Mapping):
        if "path" in record and "sha256" in record:
            yield record
        record = list(record.values())
    if isinstance(record, list):
        for part in record:
            yield from named_files(part)


class Names:
    """Names of data files: new in every process and every copy of an object, so that no two attempts share one."""

    def __init__(self) -> None:
        self._attempt: tuple[int, str] | None = None

    @property
    def attempt(self) -> str:
        """This attempt's id, 32 hex digits."""
        if self._attempt is None or self._attempt[0] != os.getpid():
            self._attempt = (os.getpid(), uuid4().hex)
        return self._attempt[1]

    def new(self, folder: str, suffix: str) -> str:
        """A name that nothing else uses."""
        return f"{folder}/{self.attempt}/{uuid4().hex}{suffix}"

    def __reduce__(self) -> tuple[type["Names"], tuple[()]]:
        return Names, ()


# The two shapes


class Artefact:
    """One result of a stage, committed by its manifest or still being made. Picklable.

    Args:
        root: the root of all artefacts.
        kind: one of KINDS.
        name: digest of what it is made from; see `artefact`.

    Attributes:
        store: the artefact's own folder, root/kind/name.
        uri: of that folder.
    """

    def __init__(self, root: Store, kind: str, name: str) -> None:
        self._open(root.child(f"{kind}/{name}"), kind, name)

    def _open(self, store: Store, kind: str, name: str) -> None:
        if kind not in KINDS:
            raise InvalidInput(f"the kind of an artefact must be one of {', '.join(KINDS)}, found {kind!r}")
        self.kind, self.name, self.store, self.uri = kind, name, store, store.uri
        self._names = Names()
        self._manifest: dict[str, Any] | None = None

    @classmethod
    def at(cls, store: Store, kind: str, name: str) -> "Artefact":
        """The artefact in `store` itself, wherever that lies."""
        made = cls.__new__(cls)
        made._open(store, kind, name)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_manifest": None}

    def __repr__(self) -> str:
        return f"Artefact({self.uri!r})"

    def exists(self) -> bool:
        """Whether its manifest is committed."""
        return self._manifest is not None or self.store.exists(MANIFEST)

    def manifest(self) -> dict[str, Any]:
        """The committed manifest, read once. Raises NotFound, with the job that makes it."""
        if self._manifest is None:
            try:
                self._manifest = _as_rewritten(self.store, read_record(self.store, MANIFEST))
            except NotFound as error:
                raise NotFound(
                    f"{self.uri} is not committed; make it first ({_MAKERS[self.kind]}), or name one that is"
                ) from error
        return self._manifest

    def new_name(self, suffix: str) -> str:
        """A name for a data file, used by no other attempt: data/<attempt>/<uuid><suffix>."""
        return self._names.new("data", suffix)

    def parts(self) -> dict[int, dict[str, Any]]:
        """Records of the finished parts, by part number."""
        names = [entry.name for entry in self.store.list("parts/") if entry.name.endswith(".json")]
        with ThreadPoolExecutor(_READERS) as pool:
            records = pool.map(lambda name: read_record(self.store, name), names)
            return {_number(name): record for name, record in zip(names, records, strict=True)}

    def publish_part(self, part: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """Commit a part; returns the record that stands, which is another's if that came first."""
        return create_record(self.store, f"parts/{part:08d}.json", record)[0]

    def publish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Commit the whole; returns the manifest that stands, which is another's if that came first."""
        own = {"kind": self.kind, "name": self.name, "created_at": now(), "code_version": __version__}
        self._manifest, _ = create_record(self.store, MANIFEST, {**manifest, **own})
        return self._manifest


_MAKERS = {
    "collections": "hashdist collection",
    "features": "hashdist features",
    "graphs": "hashdist graph",
    "models": "hashdist train",
    "codes": "hashdist encode",
}


def artefact(
    root: Store, kind: str, *, inputs: Mapping[str, Any], settings: Mapping[str, Any], revision: int, salt: str = ""
) -> Artefact:
    """The artefact of these inputs and settings, committed or not: its name is their digest.

    Args:
        root: the root of all artefacts.
        kind: one of KINDS.
        inputs: digests of what it is made from.
        settings: the settings that can change it.
        revision: of the stage's code; raised whenever its output changes.
        salt: anything, for a new one beside an old one (`--fresh`).
    """
    made_from = {"inputs": inputs, "settings": settings, "revision": revision, "salt": salt}
    return Artefact(root, kind, digest({"kind": kind, **made_from}))


def open_artefact(uri: str, kind: str) -> Artefact:
    """A committed artefact. Raises NotFound where nothing is committed, InvalidInput for another kind."""
    store = open_store(uri)
    try:
        manifest = read_record(store, MANIFEST)
    except NotFound as error:
        raise NotFound(f"{uri}: a committed artefact is required, found no {MANIFEST} there") from error
    if manifest.get("kind") != kind:
        raise InvalidInput(f"{uri}: an artefact of kind {kind!r} is required, found {manifest.get('kind')!r}")
    found = Artefact.at(store, kind, str(manifest.get("name", "")))
    found._manifest = _as_rewritten(store, manifest)
    return found


def _as_rewritten(store: Store, manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest as it has to be read now: with the records of erasures applied in their order
    (hashdist/commands/purge.py).

    Each names new entries of `files`, by the path of the old ones, and fields that are others since (`changed`).
    """
    for found in store.list(REWRITES):
        record = read_record(store, found.name)
        manifest = {**_replace_files(manifest, record["files"]), **record["changed"]}
    return manifest


def _replace_files(value: Any, files: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and path in files:
            return files[path]
        return {name: _replace_files(item, files) for name, item in value.items()}
    return [_replace_files(item, files) for item in value] if isinstance(value, list) else value


class Version(NamedTuple):
    """One committed version of a log."""

    number: int
    manifest: dict[str, Any]


class CommitLost(Conflict):
    """Another writer committed this version number first; `winner` is the version that stands."""

    def __init__(self, message: str, winner: Version) -> None:
        super().__init__(message)
        self.winner = winner

    def __reduce__(self) -> tuple[type["CommitLost"], tuple[str, Version]]:
        return CommitLost, (str(self), self.winner)


class Log:
    """Numbered versions in a folder, from 1, each naming its parent, never deleted. Picklable.

    Args:
        store: the folder, e.g. root.child("indexes/photos").
    """

    def __init__(self, store: Store) -> None:
        self.store, self.uri = store, store.uri
        self._names = Names()
        self._known = 0

    def new_attempt(self) -> Names:
        """Names for the data files of one change: another attempt than any before."""
        return Names()

    def latest(self) -> Version | None:
        """The newest version; None while there is none."""
        numbers = self._list(max(self._known - 1, 0))
        return self.read(numbers[-1]) if numbers else None

    def read(self, number: int) -> Version:
        """A version. Raises NotFound."""
        try:
            version = Version(number, read_record(self.store, _version_name(number)))
        except NotFound as error:
            raise NotFound(f"{self.uri} has no version {number}") from error
        self._known = max(self._known, number)
        return version

    def numbers(self) -> list[int]:
        """All version numbers, ascending."""
        return self._list(0)

    def _list(self, above: int) -> list[int]:
        after = _version_name(above) if above else ""
        return [_number(e.name) for e in self.store.list("manifests/", after) if e.name.endswith(".json")]

    def commit(
        self, manifest: Mapping[str, Any], parent: int, *, sleep: Callable[[float], None] = time.sleep
    ) -> Version:
        """Commit version parent + 1 (parent 0: the first).

        Raises:
            CommitLost: another write stands there. NotFound: there is no such parent. Else as `create_record`.
        """
        if parent < 0 or (parent > self._known and not self.store.exists(_version_name(parent))):
            raise NotFound(f"{self.uri} has no version {parent} to commit upon")
        number = parent + 1
        own = {"number": number, "parent": parent, "created_at": now(), "code_version": __version__}
        record, ours = create_record(self.store, _version_name(number), {**manifest, **own}, sleep=sleep)
        self._known = max(self._known, number)
        version = Version(number, record)
        if not ours:
            raise CommitLost(
                f"{self.uri}: version {number} was committed by another writer; read it and try again", version
            )
        return version

    def new_name(self, folder: str, suffix: str) -> str:
        """A name for a data file, used by no other attempt: <folder>/<attempt>/<uuid><suffix>."""
        return self._names.new(folder, suffix)


def _version_name(number: int) -> str:
    return f"manifests/{number:020d}.json"


def _number(name: str) -> int:
    return int(name.rpartition("/")[2].removesuffix(".json"))
