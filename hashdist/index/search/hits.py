"""Results of a search: ids and distances at once, keys when they are asked for."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hashdist.index.view import View


@dataclass(frozen=True)
class Hits:
    """The nearest images of every query, in (distance, id) order.

    Attributes:
        ids: int64 [Q, k'], k' = min(k, rows of the index).
        distances: int32 [Q, k'].
        scores: float64 [Q, k'] cosines, where they decided the order (two-stage ranking); else None.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.int32]
    _view: View = field(repr=False)
    scores: NDArray[np.float64] | None = None

    def keys(self) -> list[list[str]]:
        """The keys: for each of the Q queries a list of k'. Reads only these rows."""
        flat = self._view.keys_of(self.ids.ravel())
        width = self.ids.shape[1]
        return [flat[q * width : (q + 1) * width] for q in range(len(self.ids))]


@dataclass(frozen=True)
class Matches:
    """Every image within a radius of each query, in (distance, id) order.

    Attributes:
        offsets: int64 [Q + 1]; query q owns [offsets[q], offsets[q + 1]) of the other two.
        ids: int64 [matches].
        distances: int32 [matches].
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    distances: NDArray[np.int32]
    _view: View = field(repr=False)

    def keys(self) -> list[list[str]]:
        """The keys of every query's matches; reads only these rows."""
        flat = self._view.keys_of(self.ids)
        return [flat[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
