"""The engine `folded`: the scan over distinct codes (hashdist/nearest/folds.py); pays from two rows a code.

The live rows of one version are folded in memory when the engine is first asked: as many bytes as the ids, and the
distinct codes; two sorts of all rows.
"""

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from hashdist.index.search import scanning
from hashdist.index.search.engine import Codes, Engine
from hashdist.index.search.filters import Filter
from hashdist.index.shards.shard import opening
from hashdist.index.view import View
from hashdist.nearest import folds, scan
from hashdist.nearest.folds import Fold


@dataclass(frozen=True)
class Folded(Engine):
    """The scan over distinct codes. A search with a filter is left to the scan over rows."""

    def nearest(self, view: View, queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """See Engine."""
        if where is not None:
            return scanning.nearest(view, queries_QW, k, where)
        return self.complete(view, folds.nearest(fold_of(view), queries_QW, k), k, where)

    def within(self, view: View, queries_QW: Codes, radius: int, where: Filter | None) -> scan.Ball:
        """See Engine."""
        if where is not None:
            return scanning.within(view, queries_QW, radius, where)
        return folds.within(fold_of(view), queries_QW, radius)


_folding = threading.Lock()
_folds: WeakKeyDictionary[View, Fold] = WeakKeyDictionary()


def fold_of(view: View) -> Fold:
    """The live rows of a version by their codes: made when first asked for, kept as long as the version is open."""
    with _folding:
        if view not in _folds:
            codes, ids = [np.empty((0, view.manifest["bits"] // 8), np.uint8)], [np.empty(0, np.int64)]
            for number in opening(view.shards):
                shard = view.shards[number]
                rows = scan.live(view.dead(number), shard.rows)
                codes.append(shard.codes[rows])
                ids.append(shard.ids[rows])
            _folds[view] = folds.fold(np.concatenate(codes), np.concatenate(ids))
        return _folds[view]
