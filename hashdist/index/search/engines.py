"""Engines: what looks at the codes. The scan (hashdist/nearest/scan.py) is the default; these stand beside it.

| engine | what it is | answers |
|---|---|---|
| `scan` | our kernels over the mapped codes | exact |
| `folded` | the scan over distinct codes (hashdist/index/search/folded.py); pays from two rows a code | exact |
| `faiss` | `IndexBinaryFlat` on the shard files themselves, mapped | exact: the scan's reference |
| `torch` | products of +1 / -1 codes, on a GPU where there is one | exact |
| `ivf` | `IndexBinaryIVF` (Sivic and Zisserman 2003) of each shard | approximate |
| `multihash` | `IndexBinaryMultiHash` of each shard (Norouzi et al. 2012) | approximate; exact within a radius |

All of them answer in (distance, id) order, honour tombstones and filters, and give k results or as many as there are.
faiss keeps arbitrary ones of the rows at the last distance, so where that distance is tied the exact engine asks for
all rows at it. An approximate engine that finds fewer than k rows for a query leaves this query to the scan.

What `ivf` and `multihash` need is built for a shard when it is first asked for, and kept in the local cache under the
checksum of the shard's codes.
"""

import hashlib
import importlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.progress import say
from hashdist.ground.ranges import blocks
from hashdist.index.search.filters import Filter, Searched
from hashdist.index.search.folded import Folded
from hashdist.index.shards.shard import Shard, opening
from hashdist.nearest import scan
from hashdist.store.cache import cache_folder

if TYPE_CHECKING:
    from hashdist.index.view import View

Codes = NDArray[np.uint8]

_RANGE_RESULTS = 1 << 25  # rows that one call of faiss's range search may return
_SAMPLE_PER_LIST = 64
_SEED = 1234
_WORST_SHARE = 0.5  # of a shard's rows left out, from which an approximate engine has nothing to gain
_DIGEST = 16  # hexadecimal digits of a cached file's own checksum, in its name


class Engine(Protocol):
    """What can answer a search of a version. Hashable and picklable."""

    exact: ClassVar[bool]
    by_radius: ClassVar[bool]

    def nearest(self, view: "View", queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """The k nearest live rows that match; "rows" are ids. There are k of them."""

    def within(self, view: "View", queries_QW: Codes, radius: int, where: Filter | None) -> scan.Ball:
        """The live rows that match within the radius; "rows" are ids."""


class _ByShard(ABC):
    """Engines that answer shard by shard."""

    exact: ClassVar[bool] = True
    by_radius: ClassVar[bool] = True

    def nearest(self, view: "View", queries_QW: Codes, k: int, where: Filter | None) -> scan.Nearest:
        """See Engine."""
        best = _nothing(len(queries_QW))
        for number in opening(view.shards):
            shard, searched = view.shards[number], view.searched(number, where)
            if len(searched.ids_N):
                found = self._nearest(shard, searched, queries_QW, k)
                found = found._replace(rows_QK=searched.ids_N[found.rows_QK.clip(min=0)])
                best = scan.merge(best, found, k)
        return best if self.exact else self._completed(view, queries_QW, k, where, best)

    def within(self, view: "View", queries_QW: Codes, radius: int, where: Filter | None) -> scan.Ball:
        """See Engine."""
        found = []
        for number in opening(view.shards):
            shard, searched = view.shards[number], view.searched(number, where)
            if len(searched.ids_N):
                ball = self._within(shard, searched, queries_QW, radius)
                found.append(ball._replace(rows=searched.ids_N[ball.rows]))
        return joined(found, len(queries_QW))

    def _completed(
        self, view: "View", queries_QW: Codes, k: int, where: Filter | None, best: scan.Nearest
    ) -> scan.Nearest:
        """Queries without k results are answered by the scan."""
        short = np.flatnonzero(best.counts_Q < k)
        if not len(short):
            return best
        width, shape = best.rows_QK.shape[1], (len(queries_QW), k)
        distances, ids = np.empty(shape, np.int32), np.empty(shape, np.int64)
        distances[:, :width], ids[:, :width] = best.distances_QK, best.rows_QK
        exact = view.nearest(queries_QW[short], k, where)
        distances[short], ids[short] = exact.distances_QK, exact.rows_QK
        return scan.Nearest(distances, ids, np.full(len(queries_QW), k))

    @abstractmethod
    def _nearest(self, shard: Shard, searched: Searched, queries_QW: Codes, k: int) -> scan.Nearest:
        """The k nearest rows of a shard; "rows" are its rows."""

    def _within(self, shard: Shard, searched: Searched, queries_QW: Codes, radius: int) -> scan.Ball:  # noqa: ARG002
        """The rows of a shard within the radius, for engines that search by radius."""
        raise InvalidInput(f"{self} does not search by radius; use another engine")


# faiss


@dataclass(frozen=True)
class Faiss(_ByShard):
    """`IndexBinaryFlat` on the shard files, with its arbitrary choice at the last distance put right."""

    def _nearest(self, shard: Shard, searched: Searched, queries_QW: Codes, k: int) -> scan.Nearest:
        if searched.codes_NW is not shard.codes:
            return scan.nearest(searched.codes_NW, queries_QW, k, dead=searched.dead)  # a few rows, copied out
        index, parameters = _flat(shard), _selector(searched)
        live = shard.rows - _left_out(searched)
        # one more than k shows whether the last distance is tied
        distances, rows = index.search(queries_QW, min(k + 1, max(live, 1)), params=parameters)
        found = _sorted(distances, rows, k)
        tied = np.flatnonzero((distances[:, k:] == distances[:, k - 1 : k]).any(1))
        for q, ball in self._balls(index, parameters, queries_QW, {int(q): int(distances[q, k]) for q in tied}):
            order = np.lexsort((ball[1], ball[0]))[:k]
            found.distances_QK[q], found.rows_QK[q] = ball[0][order], ball[1][order]
        return found

    @staticmethod
    def _balls(index: Any, parameters: Any, queries_QW: Codes, radii: dict[int, int]) -> Any:
        """(query, (distances, rows)) of everything within the radius of each of these queries."""
        for radius in sorted(set(radii.values())):
            which = np.array([q for q, own in radii.items() if own == radius])
            for start, stop in blocks(len(which), max(1, _RANGE_RESULTS // index.ntotal)):
                part = which[start:stop]
                offsets, distances, rows = index.range_search(queries_QW[part], radius + 1, params=parameters)
                for place, q in enumerate(part.tolist()):
                    span = slice(int(offsets[place]), int(offsets[place + 1]))
                    yield q, (distances[span].astype(np.int32), rows[span])

    def _within(self, shard: Shard, searched: Searched, queries_QW: Codes, radius: int) -> scan.Ball:
        if searched.codes_NW is not shard.codes:
            return scan.within(searched.codes_NW, queries_QW, radius, dead=searched.dead)
        radii = dict.fromkeys(range(len(queries_QW)), radius)
        parts = self._balls(_flat(shard), _selector(searched), queries_QW, radii)
        return _ball([ball for _, ball in parts])


def _flat(shard: Shard) -> Any:
    def opened() -> Any:
        faiss = _faiss()
        return faiss.read_index_binary(str(shard.file("codes")), faiss.IO_FLAG_MMAP_IFC)

    return _opened(shard, "faiss", opened)


def _selector(searched: Searched) -> Any:
    """faiss's search parameters that leave out what is left out."""
    if searched.dead is None:
        return None
    faiss = _faiss()
    return faiss.SearchParameters(sel=faiss.IDSelectorBitmap(~searched.dead))


@dataclass(frozen=True)
class Ivf(_ByShard):
    """`IndexBinaryIVF` per shard.

    Args:
        probes: lists looked at per query and shard.
        lists: number of lists of a shard; 0 = about the square root of its rows.
    """

    probes: int = 16
    lists: int = 0
    exact: ClassVar[bool] = False
    by_radius: ClassVar[bool] = False  # faiss takes no number of probes there

    def __post_init__(self) -> None:
        if self.probes < 1 or self.lists < 0:
            raise InvalidInput(f"probes must be at least 1 and lists at least 0, found {self.probes} and {self.lists}")

    def _nearest(self, shard: Shard, searched: Searched, queries_QW: Codes, k: int) -> scan.Nearest:
        lists = self.lists or max(1, isqrt(shard.rows))
        if shard.rows < 2 * lists or not _worth(shard, searched):
            return scan.nearest(searched.codes_NW, queries_QW, k, dead=searched.dead)
        index = _opened(shard, f"ivf-{lists}", lambda: _cached(shard, f"ivf-{lists}", lambda: _ivf(shard.codes, lists)))
        parameters = _faiss().SearchParametersIVF(nprobe=min(self.probes, lists))
        return _more_and_more(
            lambda queries, ask: index.search(queries, ask, params=parameters), searched, queries_QW, k
        )


def _ivf(codes_NW: Codes, lists: int) -> Any:
    """Trained on rows drawn evenly; rows are sorted by id, which is a hash."""
    faiss = _faiss()
    bits = 8 * codes_NW.shape[1]
    quantizer = faiss.IndexBinaryFlat(bits)
    index = faiss.IndexBinaryIVF(quantizer, bits, lists)
    index.cp.seed, index.cp.min_points_per_centroid = _SEED, 1
    index.train(np.ascontiguousarray(codes_NW[:: max(1, len(codes_NW) // (_SAMPLE_PER_LIST * lists))]))
    index.add(np.ascontiguousarray(codes_NW))
    return index


@dataclass(frozen=True)
class MultiHash(_ByShard):
    """`IndexBinaryMultiHash` per shard: a hash table on each of several pieces of the code.

    A code within radius r differs in at most r // tables bits of some piece, so with as many flips (which is what a
    radius search takes) nothing within r is missed.

    Args:
        flips: bits of each piece that may differ, for the k nearest.
        piece: bits of a piece; 0 = about log2 of the shard's rows.
    """

    flips: int = 1
    piece: int = 0
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.flips < 0 or self.piece < 0:
            raise InvalidInput(f"flips and piece must be at least 0, found {self.flips} and {self.piece}")

    def _nearest(self, shard: Shard, searched: Searched, queries_QW: Codes, k: int) -> scan.Nearest:
        if not _worth(shard, searched):
            return scan.nearest(searched.codes_NW, queries_QW, k, dead=searched.dead)
        index = self._index(shard, self.flips)
        return _more_and_more(lambda queries, ask: index.search(queries, ask), searched, queries_QW, k)

    def _within(self, shard: Shard, searched: Searched, queries_QW: Codes, radius: int) -> scan.Ball:
        tables, piece = self._shape(shard)
        if not _worth(shard, searched) or radius // tables >= piece:
            return scan.within(searched.codes_NW, queries_QW, radius, dead=searched.dead)
        offsets, distances, rows = self._index(shard, radius // tables).range_search(queries_QW, radius + 1)
        live = _alive(searched, rows)
        return _ball(
            [
                (distances[a:b][live[a:b]].astype(np.int32), rows[a:b][live[a:b]])
                for a, b in zip(offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64), strict=True)
            ]
        )

    def _shape(self, shard: Shard) -> tuple[int, int]:
        bits = 8 * shard.codes.shape[1]
        piece = min(self.piece or max(4, shard.rows.bit_length() - 1), bits, 60)
        return bits // piece, piece

    def _index(self, shard: Shard, flips: int) -> Any:
        tables, piece = self._shape(shard)
        flips = min(flips, piece)
        name = f"multihash-{tables}x{piece}"

        def opened() -> Any:
            index = _cached(shard, name, lambda: _multihash(shard.codes, tables, piece))
            index.nflip = flips
            return index

        return _opened(shard, f"{name}-{flips}", opened)


def _multihash(codes_NW: Codes, tables: int, piece: int) -> Any:
    index = _faiss().IndexBinaryMultiHash(8 * codes_NW.shape[1], tables, piece)
    index.add(np.ascontiguousarray(codes_NW))
    return index


def _more_and_more(
    search: Callable[[Codes, int], tuple[NDArray[np.int32], NDArray[np.int64]]],
    searched: Searched,
    queries_QW: Codes,
    k: int,
) -> scan.Nearest:
    """Ask for more until k live rows are found, or the engine has no more."""
    rows = len(searched.ids_N)
    ask = min(k if searched.dead is None else 2 * k, rows)
    while True:
        distances, found = search(queries_QW, ask)
        keep = _alive(searched, found)
        ended = (found < 0).any(1) | (ask == rows)
        if ((keep.sum(1) >= k) | ended).all():
            return _sorted(distances, np.where(keep, found, -1), k)
        ask = min(4 * ask, rows)


def _worth(shard: Shard, searched: Searched) -> bool:
    return searched.codes_NW is shard.codes and _left_out(searched) < _WORST_SHARE * shard.rows


# torch


@dataclass(frozen=True)
class Torch(_ByShard):
    """Codes as +1 and -1: the distance of two is (bits - product) / 2, exact in float16 and float32.

    Products run on tensor cores of a GPU. Packed codes stay on the device, a block of rows at a time is unpacked.

    Args:
        device: `cuda`, `cpu`, or `auto`.
        rows_at_once: of a shard.
    """

    device: str = "auto"
    rows_at_once: int = 1 << 16

    def _nearest(self, shard: Shard, searched: Searched, queries_QW: Codes, k: int) -> scan.Nearest:
        torch = _torch()
        blocks_of = self._distances(shard, searched, queries_QW)
        best = torch.empty((len(queries_QW), 0), dtype=torch.int64)
        for first, distances_QN in blocks_of:
            best = best.to(distances_QN.device)
            rows_N = torch.arange(first, first + distances_QN.shape[1], device=distances_QN.device)
            # one number in the order of (distance, row)
            both = torch.cat([best, (distances_QN << 40) | rows_N], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1, largest=False, sorted=True).values
        ranked = best.cpu().numpy()
        rows = np.where(ranked >> 40 <= 8 * queries_QW.shape[1], ranked & ((1 << 40) - 1), -1)
        return _sorted((ranked >> 40).astype(np.int32), rows, k)

    def _within(self, shard: Shard, searched: Searched, queries_QW: Codes, radius: int) -> scan.Ball:
        radius = min(radius, 8 * queries_QW.shape[1])
        parts: list[tuple[Any, ...]] = []
        for first, distances_QN in self._distances(shard, searched, queries_QW):
            query, place = (distances_QN <= radius).nonzero(as_tuple=True)
            found = (query, distances_QN[query, place], place + first)
            parts.append(tuple(part.cpu().numpy() for part in found))
        query, distances, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((rows, distances, query))
        counts = np.bincount(query, minlength=len(queries_QW))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return scan.Ball(offsets, rows[order], distances[order].astype(np.int32))

    def _distances(self, shard: Shard, searched: Searched, queries_QW: Codes) -> Any:
        """(first row, distances int64 [Q, rows]) by blocks; rows that are left out are beyond all distances."""
        torch = _torch()
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        kind = torch.float16 if device != "cpu" else torch.float32
        if searched.codes_NW is shard.codes:
            codes = _opened(shard, f"torch-{device}", lambda: torch.from_numpy(np.array(shard.codes)).to(device))
        else:
            codes = torch.from_numpy(np.array(searched.codes_NW)).to(device)
        bits = 8 * queries_QW.shape[1]
        queries_QL = _signs(torch, torch.from_numpy(np.array(queries_QW)).to(device), kind)
        alive = None
        if searched.dead is not None:
            flags = np.unpackbits(searched.dead, count=len(searched.ids_N), bitorder="little") == 0
            alive = torch.from_numpy(flags).to(device)
        for start, stop in blocks(len(codes), self.rows_at_once):
            product = queries_QL @ _signs(torch, codes[start:stop], kind).T
            distances = (bits - product.to(torch.int64)) // 2
            if alive is not None:
                distances = distances.masked_fill(~alive[start:stop], bits + 1)
            yield start, distances


def _signs(torch: Any, codes_NW: Any, kind: Any) -> Any:
    """[N, L] of +1 and -1."""
    places = torch.arange(8, dtype=torch.uint8, device=codes_NW.device)
    bits = (codes_NW[:, :, None] >> places) & 1
    return bits.reshape(len(codes_NW), -1).to(kind) * 2 - 1


# What engines have in common

ENGINES: dict[str, Callable[[], Engine]] = {
    "folded": Folded, "faiss": Faiss, "ivf": Ivf, "multihash": MultiHash, "torch": Torch,
}  # fmt: skip
"""By name, beside `scan`."""


def find_engine(engine: "str | Engine") -> Engine | None:
    """The engine of that name; None for the scan. Raises InvalidInput."""
    if not isinstance(engine, str):
        return engine
    if engine != "scan" and engine not in ENGINES:
        raise InvalidInput(f"the engine must be one of {', '.join(['scan', *ENGINES])}, found {engine!r}")
    return None if engine == "scan" else ENGINES[engine]()


def recall(found_QK: NDArray[np.int32], exact_QK: NDArray[np.int32]) -> NDArray[np.float64]:
    """Recall of each query [Q], by distances: the share of its results that are no farther than the exact k-th one.

    Which of several rows at the last distance are found does not matter: none of them is nearer than another.
    """
    if not exact_QK.shape[1]:
        return np.ones(len(exact_QK))
    share: NDArray[np.float64] = (found_QK <= exact_QK[:, -1:]).mean(1)
    return share


def joined(balls: Sequence[scan.Ball], queries: int) -> scan.Ball:
    """What several parts hold around each query, in (distance, row) order."""
    if not balls:
        return scan.Ball(np.zeros(queries + 1, np.int64), np.empty(0, np.int64), np.empty(0, np.int32))
    query = np.concatenate([np.repeat(np.arange(queries), np.diff(ball.offsets)) for ball in balls])
    rows, distances = (np.concatenate([getattr(ball, part) for ball in balls]) for part in ("rows", "distances"))
    order = np.lexsort((rows, distances, query))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=queries))]).astype(np.int64)
    return scan.Ball(offsets, rows[order], distances[order])


_lock = threading.RLock()
_open: WeakKeyDictionary[Shard, dict[str, Any]] = WeakKeyDictionary()


def _opened(shard: Shard, name: str, make: Callable[[], Any]) -> Any:
    """What an engine holds of a shard, made at the first call and kept as long as the shard is open."""
    with _lock:
        held = _open.setdefault(shard, {})
        if name not in held:
            held[name] = make()
        return held[name]


def _cached(shard: Shard, name: str, build: Callable[[], Any]) -> Any:
    """A faiss index of a shard from the local cache; built, and put there, where it is not or is damaged.

    The file is named by the checksum of the codes and ends in its own.
    """
    faiss, stem = _faiss(), f"{shard.digest('codes')}-{name}-"
    folder = cache_folder() / "engines"
    for path in sorted(folder.glob(f"{stem}*.faiss")) if folder.is_dir() else []:
        if path.stem.removeprefix(stem) == _checksum(path):
            return faiss.read_index_binary(str(path))
    index = build()
    fresh = folder / f"{stem}{uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index_binary(index, str(fresh))
        os.replace(fresh, folder / f"{stem}{_checksum(fresh)}.faiss")
    except (OSError, RuntimeError) as error:
        say(f"search: {name} of a shard is kept in memory only, {folder} cannot be written: {error}")
        fresh.unlink(missing_ok=True) if folder.is_dir() else None
    return index


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]


def _left_out(searched: Searched) -> int:
    return 0 if searched.dead is None else int(np.bitwise_count(searched.dead[: -(-len(searched.ids_N) // 8)]).sum())


def _alive(searched: Searched, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these rows (-1: none) are not left out."""
    alive = rows >= 0
    if searched.dead is not None:
        at = rows.clip(min=0)
        alive &= (searched.dead[at >> 3] >> (at & 7).astype(np.uint8)) & 1 == 0
    return alive


def _sorted(distances_QK: NDArray[Any], rows_QK: NDArray[np.int64], k: int) -> scan.Nearest:
    """The first k by (distance, row) of each query; rows of -1 are none."""
    none = rows_QK < 0
    far = np.where(none, np.iinfo(np.int32).max, distances_QK)
    order = np.lexsort((rows_QK, far), axis=1)[:, :k]
    rows = np.take_along_axis(rows_QK, order, axis=1)
    distances = np.take_along_axis(distances_QK, order, axis=1).astype(np.int32)
    return scan.Nearest(
        np.ascontiguousarray(distances), np.ascontiguousarray(rows), (rows >= 0).sum(1).astype(np.int64)
    )


def _ball(parts: list[tuple[NDArray[np.int32], NDArray[np.int64]]]) -> scan.Ball:
    """One query's (distances, rows) after the other, each put in order."""
    orders = [np.lexsort((rows, distances)) for distances, rows in parts]
    offsets = np.cumsum([0, *(len(rows) for _, rows in parts)]).astype(np.int64)
    rows = np.concatenate([rows[order] for (_, rows), order in zip(parts, orders, strict=True)] or [np.empty(0, int)])
    distances = [distances[order] for (distances, _), order in zip(parts, orders, strict=True)]
    return scan.Ball(offsets, rows, np.concatenate(distances or [np.empty(0, np.int32)]))


def _nothing(queries: int) -> scan.Nearest:
    return scan.Nearest(np.empty((queries, 0), np.int32), np.empty((queries, 0), np.int64), np.zeros(queries, np.int64))


def _faiss() -> Any:
    return importlib.import_module("faiss")


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InvalidInput("the engine torch needs torch, which is not installed") from error
