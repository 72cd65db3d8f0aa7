"""The index: a log of versions over immutable shards, searched exactly, by any number of readers and writers.

A version names shards and tombstones. A tombstone (id, version) hides the rows with that id in shards committed
before that version, so a changed image is one commit that holds its new row and a tombstone for its old one. After
any history each key has at most one live row.

A writer plans against the version it has read, writes its files, and commits. If another writer was first, it reads
the new version and plans again: rows that the winner brought already are dropped, what `on_existing` says is applied
to other keys that are there now, and what remains is committed, or nothing. Writers whose keys have nothing in
common thus both succeed. Two writers that bring codes of different models cannot.

Results come in (distance, id) order at any number of shards and threads (docs/decisions.md, S3).

- `searcher`: `Index`, to search one version and to commit the next one. Everything that changes an index goes
  through `Index.transact`.
- `view`: one version, opened. `change`: adding, changing and removing rows, planned again upon a winner.
- `manifest`: what the record of a version says.
- `promotion`: the gate before a commit, and candidates. `drift`: whether new rows are like the old ones. `probes`: the
  sample by which versions are compared (docs/promotion.md).
- `filters`, `engines` (`folding`, `radius`), `rerank`: which rows may answer, what looks at the codes, ranking by
  features (docs/search.md). `duplicates`: which rows are near each other.
- `retention`: tags, rollback, pins (`pins`), and the vacuum that expires versions. `verification`: every byte read.
  `compaction`, `erasure`: shards written again (`merging`), without hidden rows, or without certain images.
  `seen`: images without a row. `lineage`: what the versions were made from, and the withdrawal of the rest
  (docs/retention.md).
"""

from hashdist.index.change import Applied, OnExisting
from hashdist.index.index import Index, Removed, create_index, open_index
from hashdist.index.view import Hits, Matches

__all__ = ["Applied", "Hits", "Index", "Matches", "OnExisting", "Removed", "create_index", "open_index"]
