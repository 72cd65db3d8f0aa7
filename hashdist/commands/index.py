"""The commands that look after an index and a store: tags, rollback, compact, verify, vacuum, storage check.

Without Ray.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import (
    CompactOptions,
    PromoteOptions,
    RollbackOptions,
    TagOptions,
    VacuumOptions,
)
from hashdist.ground.settings import Settings
from hashdist.ground.tables import table
from hashdist.index import Index, open_index
from hashdist.index.manifest import ranges
from hashdist.index.promotion import discard, promote
from hashdist.index.upkeep import lineage, retention, verification
from hashdist.index.upkeep.compaction import compact
from hashdist.store import open_store

_SHOWN_FAULTS = 50


def index_tag(settings: Settings, options: TagOptions) -> dict[str, Any]:
    """Name a version of an index, or take the name away."""
    if not options.name:
        raise InvalidInput("a name is required, found none; use `hashdist index tag NAME [--version N]`")
    index = index_of(settings)
    if options.delete:
        version = retention.untag(index, options.name)
        text = f"{index.uri}: version {version} has the tag {options.name} no more"
    else:
        version = retention.tag(index, options.name, options.version or None)
        text = f"{index.uri}: version {version} has the tag {options.name}, and stays while it has one"
    return {"index": index.uri, "tag": options.name, "version": version, "deleted": options.delete, "text": text}


def index_rollback(settings: Settings, options: RollbackOptions) -> dict[str, Any]:
    """Commit a version with the content of an older one."""
    if not options.to:
        raise InvalidInput("a version or tag is required, found none; use `hashdist index rollback --to N`")
    index = index_of(settings)
    before = index.version
    version = retention.rollback(index, options.to)
    same = version == before or index.manifest["operation"] != "rollback"
    text = f"{index.uri}: version {version} {'has' if same else 'was committed with'} the content of {options.to}"
    return {"index": index.uri, "version": version, "to": options.to, "rows": index.rows, "text": text}


@telemetry.run_of("compact")
def index_compact(settings: Settings, options: CompactOptions) -> dict[str, Any]:
    """Merge small shards and drop deleted rows, whether it is due or not."""
    index = index_of(settings)
    done = compact(index, settings.index, everything=options.all, dry_run=options.dry_run)
    before, after = done.shards
    if not done.merged and done.tombstones[0] == done.tombstones[1] and not options.dry_run:
        text = f"{index.uri}: version {done.version} has nothing to compact"
    elif options.dry_run:
        text = f"{index.uri}: {done.merged} of {before} shards would be merged, {done.dropped} deleted rows would go"
    else:
        text = (
            f"{index.uri}: version {done.version} has {after} shards instead of {before}; {done.dropped} deleted rows "
            f"are gone; {done.read} bytes were read, {done.written} written; `hashdist index vacuum` frees the old ones"
        )
    reason = f"\nit was due: {done.reason}" if done.reason else ""
    return {"index": index.uri, **done._asdict(), "rows": index.rows, "text": text + reason}


@telemetry.run_of("verify")
def index_verify(settings: Settings) -> dict[str, Any]:
    """Read and check every byte of every version that can be opened; exit code 1 where anything is wrong."""
    index = index_of(settings)
    found = verification.verify(index)
    faults = [fault._asdict() for fault in found.faults]
    counts = {"versions": found.versions, "files": found.files, "bytes": found.bytes, "rows": found.rows}
    lines = [
        f"{index.uri}: {found.versions} versions, {found.files} files, {found.bytes} bytes, {found.rows} rows: "
        f"{len(faults) or 'no'} faults",
        *(f"  {f.file or 'rows'} (version {', '.join(f.versions)}): {f.fault}" for f in found.faults[:_SHOWN_FAULTS]),
    ]
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f"  and {len(faults) - _SHOWN_FAULTS} more; --json lists all")
    if faults:
        lines.append("restore what is damaged from a backup, or roll back to a version without faults")
    return {"index": index.uri, **counts, "faults": faults, "exit_code": int(bool(faults)), "text": "\n".join(lines)}


@telemetry.run_of("vacuum")
def index_vacuum(settings: Settings, options: VacuumOptions) -> dict[str, Any]:
    """Expire old versions and delete what nothing needs; with --dry-run only tell."""
    if options.artefacts and not settings.root:
        raise InvalidInput("--artefacts looks at everything below a root, found none; give --root URI")
    index = index_of(settings)
    age_s = retention.seconds(options.older_than)
    done = retention.vacuum(index, age_s, dry_run=options.dry_run, force=options.force)
    verb = "would be" if done.dry_run else "were"
    lines = [
        f"{index.uri}: {len(done.expired)} versions {verb} expired{_ranges_text(done.expired)}, {done.kept} remain",
        *(f"  {files} files, {size} bytes {verb} deleted: {reason}" for reason, (files, size) in done.deleted.items()),
    ]
    if done.revoked:
        lines.append(f"  {len(done.revoked)} attempts {verb} revoked: nothing they wrote can be committed any more")
    if done.pinned:
        lines.append(f"  pinned by readers: version{_ranges_text(done.pinned)}; {done.spared} files are left for them")
    if done.foreign:
        lines.append(f"  {done.foreign} files are none of the index's, and were left alone")
    if done.unfinished:
        lines.append(f"  not everything could be deleted ({done.unfinished}); run again")
    if options.artefacts:
        more, artefacts = _vacuum_artefacts(settings, options, index, age_s)
        lines += more
    result: dict[str, Any] = {
        "index": index.uri,
        "version": done.version,
        "dry_run": done.dry_run,
        "expired": ranges(done.expired),
        "revoked": done.revoked,
        "kept": done.kept,
        "deleted": {reason: {"files": files, "bytes": size} for reason, (files, size) in done.deleted.items()},
        "pinned": done.pinned,
        "spared": done.spared,
        "foreign": done.foreign,
        "unfinished": done.unfinished,
        **({"artefacts": artefacts} if options.artefacts else {}),
    }
    return {**result, "exit_code": int(bool(done.unfinished)), "text": "\n".join(lines)}


def _vacuum_artefacts(
    settings: Settings, options: VacuumOptions, index: Index, age_s: float
) -> tuple[list[str], dict[str, Any]]:
    """Lines and fields of the vacuum of artefacts."""
    root = open_store(settings.root)
    done = lineage.vacuum_artefacts(root, age_s, keep=options.keep, also=[index.versions], dry_run=options.dry_run)
    verb = "would be" if done.dry_run else "were"
    lines = [f"{root.uri}: {len(done.withdrawn)} artefacts {verb} withdrawn, {done.reached} are needed or young"]
    lines += [f"  {name}" for name in done.withdrawn]
    lines += [f"  {files} files, {size} bytes {verb} deleted: {why}" for why, (files, size) in done.deleted.items()]
    if done.blocked:
        lines.append(f"  nothing is withdrawn while it cannot be told what is needed: {done.blocked}")
    if done.waiting or (done.withdrawn and not done.dry_run):
        lines.append(f"  the data of what was withdrawn goes with a vacuum that comes {options.older_than} later")
    deleted = {reason: {"files": files, "bytes": size} for reason, (files, size) in done.deleted.items()}
    return lines, {**asdict(done), "deleted": deleted}


def _ranges_text(numbers: Iterable[int]) -> str:
    runs = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ranges(numbers))
    return f" {runs}" if runs else ""


def index_of(settings: Settings, version: int | str = 0, *, candidate: bool = False) -> Index:
    """The index that the settings name, at `version` (a number or tag; 0 = the newest), or its candidate.

    Raises InvalidInput where they name none.
    """
    if not settings.index.uri and not settings.root:
        raise InvalidInput(
            "an index is required, found none; give --index.uri URI, or --root URI and --index.name NAME"
        )
    return open_index(settings.index.location(settings.root), version=version or None, candidate=candidate)


def index_log(settings: Settings) -> dict[str, Any]:
    """Every version of an index: number, time, rows, shards, what made it, tags, whether it is expired."""
    index = index_of(settings)
    versions = index.log()
    head = ["version", "committed", "rows", "shards", "by", "tags"]
    rows = [
        (
            *(v[name] for name in ("version", "created_at", "rows", "shards", "operation")),
            " ".join([*(f"[{tag}]" for tag in v["tags"]), *(["(vacuumed)"] if v["expired"] else [])]),
        )
        for v in versions
    ]
    return {"index": index.uri, "versions": versions, "text": f"{index.uri}\n{table(head, rows)}"}


def index_promote(settings: Settings, options: PromoteOptions) -> dict[str, Any]:
    """Serve the candidate that waits: if it passes the gate by the limits of these settings, or by force."""
    index = index_of(settings)
    checks = None
    if not options.force:
        from hashdist.evaluation import gate  # brings torch with it, which a promotion by force does without

        checks = gate.for_candidate(settings, index)
    version = promote(index, checks, force=options.force, reason=options.reason)
    forced = index.manifest.get("forced")
    how = f"by force, without {', '.join(forced['failed'])}" if forced else "the gate has passed"
    text = f"{index.uri}: version {version} serves the candidate: {how}; `hashdist index rollback` undoes it"
    return {"index": index.uri, "version": version, "rows": index.rows, "forced": forced, "text": text}


def index_discard(settings: Settings) -> dict[str, Any]:
    """Drop the candidate that waits; what is served stays."""
    index = index_of(settings)
    version = discard(index)
    return {"index": index.uri, "version": version, "text": f"{index.uri}: version {version} has no candidate"}
