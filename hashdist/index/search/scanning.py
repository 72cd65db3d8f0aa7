"""The engine `scan`: our kernels over the mapped codes (hashdist/nearest/scan.py). Exact, and the default.

The functions are what other engines leave to the scan.
"""

import time
from dataclasses import dataclass

from hashdist.ground import telemetry
from hashdist.index.search.engine import Codes, Engine
from hashdist.index.search.filters import Filter, searchable
from hashdist.index.search.tables import Use, tables_of
from hashdist.index.shards.shard import opening
from hashdist.index.view import View
from hashdist.nearest import scan
from hashdist.nearest.tables import within_of


@dataclass(frozen=True)
class Scan(Engine):
    """Every code is looked at.

    Args:
        tables: whether lookups in tables may stand in for a scan by radius, as in `Index.search_within`.
    """

    tables: Use = "auto"

    def nearest(self, view: View, queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """See Engine."""
        return nearest(view, queries_QW, k, where)

    def within(self, view: View, queries_QW: Codes, radius: int, where: Filter | None) -> scan.Ball:
        """See Engine."""
        return within(view, queries_QW, radius, where, self.tables)


SCAN = Scan()


def nearest(view: View, queries_QW: Codes, k: int, where: Filter | None = None) -> scan.Nearest:
    """The k nearest live rows that match by (distance, id), k of them; "rows" of the result are ids.

    Args:
        view: the version.
        queries_QW: packed codes.
        k: at most `filters.matching(view, where)`.
        where: only rows that match.

    Raises Corrupt, NotFound, Unavailable: a shard's file.
    """
    started = time.perf_counter()
    parts = _parts(view, where)
    loaded = time.perf_counter()
    found = scan.nearest_of(parts, queries_QW, k)
    telemetry.SEARCH_SECONDS.observe(loaded - started, phase="load")
    telemetry.SEARCH_SECONDS.observe(time.perf_counter() - loaded, phase="scan")
    return SCAN.complete(view, found, k, where)


def within(view: View, queries_QW: Codes, radius: int, where: Filter | None = None, tables: Use = "auto") -> scan.Ball:
    """The live rows that match within the radius of each query; "rows" of the result are ids. Raises as `nearest`."""
    parts = _parts(view, where)
    own = [part.codes_NW is shard.codes for part, shard in zip(parts, view.shards, strict=True)]
    have = [tables_of(s, len(queries_QW), tables) if o else None for s, o in zip(view.shards, own, strict=True)]
    return within_of(parts, have, queries_QW, radius)


def _parts(view: View, where: Filter | None) -> list[scan.Part]:
    return [scan.Part(*searchable(view, number, where)) for number in opening(view.shards)]
