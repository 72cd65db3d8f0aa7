"""The record of a version of an index: its content, its fields about the log, and how one record follows another.

A search answers from the content; a rollback restores it, and a candidate is one. Fields about the log go from every
version to the next. Everything else says how this one version came about.

Content: `bits`, `bit_order`, `model`, `model_uri`, `collection`, `built_from`, `failed_in`, `rows` (live ones),
`shards`, `tombstones`, `salts` (the last three are entries of files, each with the `version` it joined the index in),
`seen` (likewise: hashdist/index/notes.py), `sources` (entry of the stamps of the files whose images it has all),
`listed_at` (unix seconds: images that the collection had then are in it), `vocabulary` (numbers of labels given as
text), `quality` (as the last gate measured it), `rerank` (the features that the shards keep:
hashdist/index/search/rerank.py).

Kept: `tags` (name: version), `expired` (ranges of version numbers whose files may be gone), `revoked` (attempts whose
files may be gone: nothing of theirs can be committed any more), `candidate` (content that waits for promotion; absent
if there is none), `rewrites` (files of older versions that a purge wrote again, by the `path` of the entry: the new
entry, or null where nothing is left), `erased` ([first, last, rows]: versions that have that many rows fewer than
their records say), `probes` (entry of the gate's probe set).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hashdist.ground.bits import BIT_ORDER
from hashdist.ground.errors import Conflict, NotFound
from hashdist.index.shards.shard import files as shard_files
from hashdist.store.commit import Version

CONTENT = (
    "bits", "bit_order", "model", "model_uri", "collection", "built_from", "failed_in",
    "vocabulary", "rows", "shards", "tombstones", "salts", "seen", "sources", "listed_at", "quality", "rerank",
)  # fmt: skip
KEPT = ("tags", "expired", "revoked", "candidate", "rewrites", "erased", "probes")
LISTS = ("shards", "tombstones", "salts", "seen")
"""Fields of the content that hold entries, each with `path` and `version`."""

Manifest = Mapping[str, Any]
Entry = Mapping[str, Any]


def first(bits: int, model: str | None, model_uri: str | None) -> dict[str, Any]:
    """The record of version 1: no rows."""
    content = {"bits": bits, "bit_order": BIT_ORDER, "model": model, "model_uri": model_uri, "rows": 0}
    return {"kind": "index", "operation": "create", **content, "shards": [], "tombstones": [], "salts": []}


def content(manifest: Manifest) -> dict[str, Any]:
    """The fields that a search answers from."""
    return {name: manifest[name] for name in CONTENT if name in manifest}


def successor(
    head: Version, operation: str, changed: Manifest | None = None, kept: Manifest | None = None, **about: Any
) -> dict[str, Any]:
    """The record of the version after `head`.

    Args:
        head: the version it is committed upon.
        operation: its name in the log.
        changed: fields of the content that differ from the head's.
        kept: fields of KEPT that differ; None as a value leaves the field out.
        about: how this version came about.

    Raises:
        Conflict: it names a file whose attempt the head has revoked: the writer has slept too long, and its files may
            be gone.
    """
    now = {**content(head.manifest), **(changed or {})}
    log = {name: head.manifest[name] for name in KEPT if name in head.manifest} | dict(kept or {})
    log = {name: value for name, value in log.items() if value is not None}
    record = {"kind": "index", **about, "operation": operation, **now, **log}
    revoked = set(log.get("revoked", ())) & {attempt_of(entry["path"]) for entry in files(record)}
    if revoked:
        raise Conflict(
            f"a clean-up after version {head.number} took this writer for dead and may have deleted what it wrote "
            f"(attempt {min(revoked)}); nothing was committed; run again"
        )
    if any(entry["path"] in log.get("rewrites", {}) for _, entry in entries_of(record)):
        raise Conflict(
            f"images were erased from all versions up to {head.number}, and the content to be committed is from before "
            "that; nothing was committed; run again"
        )
    return record


def apply_rewrites(record: Manifest, head: Manifest) -> Manifest:
    """The record of an older version as it has to be read now: without what a purge has erased since.

    Args:
        record: of a committed version.
        head: record of the newest version.
    """
    rewrites = head.get("rewrites", {})
    if not rewrites:
        return record
    lists = {name: list(_rewritten(record[name], rewrites)) for name in LISTS if name in record}
    fewer = sum(rows for start, stop, rows in head.get("erased", ()) if start <= record["number"] <= stop)
    return {**record, **lists, "rows": record["rows"] - fewer}


def _rewritten(entries: Iterable[Entry], rewrites: Mapping[str, Entry | None]) -> Iterator[Entry]:
    for entry in entries:
        now = rewrites.get(entry["path"], entry)
        if now is not None:
            yield {**now, "version": entry["version"]}


def stamp(entries: Iterable[Entry], number: int) -> list[dict[str, Any]]:
    """New shards or tombstones, as members of version `number`."""
    return [{**entry, "version": number} for entry in entries]


def entries_of(content: Manifest) -> Iterator[tuple[str, Entry]]:
    """The entries of the lists of a record's content, each with the name of its list."""
    return ((name, entry) for name in LISTS for entry in content.get(name) or ())


def with_candidate(manifest: Manifest) -> list[Manifest]:
    """A record, and the candidate that waits in it, if there is one."""
    return [manifest, *([manifest["candidate"]] if manifest.get("candidate") else [])]


def files_of(entry: Entry) -> Iterable[Entry]:
    """The files of an entry: a shard has several."""
    return shard_files(entry) if "parts" in entry else (entry,)


def files(manifest: Manifest) -> Iterator[Entry]:
    """Every data file that a record names, of its candidate and its rewrites too."""
    for part in with_candidate(manifest):
        for _, entry in entries_of(part):
            yield from files_of(entry)
        if part.get("sources"):
            yield part["sources"]
    if manifest.get("probes"):
        yield manifest["probes"]
    for rewritten_entry in filter(None, manifest.get("rewrites", {}).values()):
        yield from files_of(rewritten_entry)


def attempt_of(path: str) -> str:
    """The attempt that wrote a data file: <folder>/<attempt>/<name>."""
    return path.split("/")[1]


def is_expired(head: Manifest, number: int) -> bool:
    """Whether the files of a version may be gone, by the newest version's record."""
    return any(start <= number <= stop for start, stop in head.get("expired", ()))


def resolve(head: Manifest, wanted: int | str) -> int:
    """The number of a version that can be opened.

    Args:
        head: record of the newest version.
        wanted: a number, or the name of a tag.

    Raises:
        NotFound: there is no such version or tag, or it was vacuumed.
    """
    tags = head.get("tags", {})
    if isinstance(wanted, str) and not wanted.isdecimal():
        if wanted not in tags:
            known = f"the tags are {', '.join(sorted(tags))}" if tags else "there are no tags; use a number"
            raise NotFound(f"the index has no tag {wanted!r}; {known} (`hashdist index log` shows all)")
        wanted = tags[wanted]
    number, newest = int(wanted), int(head["number"])
    if not 1 <= number <= newest:
        raise NotFound(f"the index has no version {number}; the versions are 1 to {newest}")
    if is_expired(head, number):
        left = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ranges(kept_numbers(head)))
        raise NotFound(f"version {number} was vacuumed, its files may be gone; the versions that remain are {left}")
    return number


def kept_numbers(head: Manifest) -> list[int]:
    """The versions that are not expired, ascending."""
    return [number for number in range(1, int(head["number"]) + 1) if not is_expired(head, number)]


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Distinct numbers as [first, last] runs, ascending."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs
