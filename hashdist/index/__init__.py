"""Versions of codes: what one is, how it is searched, how it is looked after. Imports store, nearest, ground.

- `index`: `Index`, to search one version and to commit the next one. Every change goes through `Index.transact`.
- `view`: one version, opened. `manifest`: the record of a version. `change`: adding, changing and removing rows,
  planned again upon a winner. `candidate`, `promotion`: the gate before a commit, and what waits where it refuses.
- `pins`: what a reader keeps from clean-ups. `notes`: images without a row.
- `shards/`: the files of rows. `search/`: filters, engines, two-stage ranking. `upkeep/`: compaction, clean-up,
  verification, erasure.

A version names shards and tombstones. A tombstone (id, version) hides the rows with that id in shards committed
before that version, so a changed image is one commit that holds its new row and a tombstone for its old one. After
any history each key has at most one live row. Results come in (distance, id) order at any number of shards and
threads (docs/decisions.md, S3).

A writer plans against the version it has read, writes its files, and commits. If another writer was first, it reads
the new version and plans again: rows that the winner brought already are dropped, `on_existing` is applied to other
keys that are there now, and the rest is committed, if any. So writers whose keys have nothing in common both succeed.
Two writers that bring codes of different models cannot.
"""

from hashdist.index.change import Applied, OnExisting
from hashdist.index.index import Index, Removed, create_index, open_index
from hashdist.index.pins import pinned
from hashdist.index.search.filters import Filter, column, ids, keys
from hashdist.index.search.hits import Hits, Matches
from hashdist.index.search.where import parse

__all__ = [
    "Applied", "Filter", "Hits", "Index", "Matches", "OnExisting", "Removed", "column", "create_index", "ids", "keys",
    "open_index", "parse", "pinned",
]  # fmt: skip
