"""`hashdist index purge`: images leave the indexes and the artefacts of a root (docs/erasure.md).

Indexes are purged by hashdist/index/upkeep/erasure.py. Artefacts, by kind:

- Collections, features and codes are tables with a row an image. The files that hold an image are written again; a
  create-only record `rewrites/<8 digits>.json` beside the manifest, which is immutable, says which file stands in
  whose place and which counts are others (`Artefact.manifest` applies it); then the old files are deleted.
- Graphs refer to rows by number, and a training run's checkpoints hold embeddings by row. A graph that holds an image
  is deleted whole, with the runs that trained on it: both are derived, and can be made again. Models are kept: they
  hold weights, and no image.
- Artefacts that are not finished, and such whose manifest itself names an image (only where two keys had one id), are
  deleted whole as well. Let no stage run meanwhile.

Whatever was killed in between is finished by running the same command again: a record says what is still to be
deleted, and so does `erased.json` in the folder of an artefact that is being deleted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from hashdist.ground import telemetry
from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import PurgeOptions
from hashdist.ground.progress import say
from hashdist.ground.settings import Settings
from hashdist.index import open_index
from hashdist.index.change import checked_keys
from hashdist.index.upkeep.artefacts import Artefacts, erase
from hashdist.index.upkeep.erasure import Erased, purge
from hashdist.store import open_store

NOT_COVERED = (
    "not covered: the images themselves where the collection lies; reports, sheets, protocol files and other files "
    "outside the root; caches of other machines (a day there without use, or delete them); backups and old object "
    "versions of a bucket that keeps them"
)


@telemetry.run_of("purge")
def index_purge(settings: Settings, options: PurgeOptions) -> dict[str, Any]:
    """Erase images from every index and artefact under the root."""
    keys = _keys(options)
    purge_id = uuid4().hex
    indexes = {uri: _purge_index(uri, keys, options.reason, purge_id) for uri in _indexes(settings)}
    artefacts = erase(settings.root, keys, options.reason, purge_id) if settings.root else Artefacts(0, 0, 0, 0)
    lines = [
        f"{uri}: version {done.version}; {done.images} of {len(keys)} images were there, in {done.versions} versions; "
        f"{done.rewritten} files written again, {done.deleted} deleted"
        for uri, done in indexes.items()
    ]
    lines.append(
        f"artefacts: {artefacts.rewritten} written again without the images, {artefacts.deleted} deleted whole "
        f"(graphs, unfinished ones), {artefacts.runs} training runs deleted; models hold no image and stay"
        if settings.root
        else "artefacts: none were looked for; name their root with --root URI"
    )
    unnamed = sum(done.unnamed for done in indexes.values())
    if unnamed:
        lines.append(
            f"{unnamed} files that no version names were not looked into (of killed or running writers); "
            "`hashdist index vacuum` collects them"
        )
    lines += [
        NOT_COVERED,
        "an image that is still in its collection may come back with the next `hashdist reindex`: remove it there",
    ]
    return {
        "purge": purge_id,
        "keys": len(keys),
        "indexes": {uri: done._asdict() for uri, done in indexes.items()},
        "artefacts": artefacts._asdict(),
        "text": "\n".join(lines),
    }


def _keys(options: PurgeOptions) -> list[str]:
    keys = list(options.keys)
    if options.keys_file:
        if not Path(options.keys_file).is_file():
            raise InvalidInput(f"--keys_file needs a file with one key a line, found none at {options.keys_file}")
        keys += [line for line in Path(options.keys_file).read_text().splitlines() if line]
    if not keys:
        raise InvalidInput("at least one key is required, found none; give KEY... or --keys_file FILE")
    return list(dict.fromkeys(checked_keys(keys, distinct=False)))


def _indexes(settings: Settings) -> list[str]:
    """URIs of the index that the settings name and of all under the root."""
    if not settings.index.uri and not settings.root:
        raise InvalidInput("an index or a root is required, found neither; give --root URI or --index.uri URI")
    uris = [open_store(settings.index.uri).uri] if settings.index.uri else []
    if settings.root:
        folder = open_store(settings.root).child("indexes")
        names = {entry.name.partition("/manifests/")[0] for entry in folder.list() if "/manifests/" in entry.name}
        uris += [folder.child(name).uri for name in sorted(names)]
    return list(dict.fromkeys(uris))


def _purge_index(uri: str, keys: Sequence[str], reason: str, purge_id: str) -> Erased:
    say(f"purge: {uri}")
    return purge(open_index(uri), keys, reason, purge_id)
