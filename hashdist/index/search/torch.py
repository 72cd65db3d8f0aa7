"""The engine `torch`: products of +1 / -1 codes, on a GPU where there is one. Exact."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.index.search.engine import ByShard, Codes, first, hold
from hashdist.index.search.filters import Searchable
from hashdist.index.shards.shard import Shard
from hashdist.nearest import scan


@dataclass(frozen=True)
class Torch(ByShard):
    """Codes as +1 and -1: the distance of two is (bits - product) / 2, exact in float16 and float32.

    Products run on tensor cores of a GPU. Packed codes stay on the device, a block of rows at a time is unpacked.

    Args:
        device: `cuda`, `cpu`, or `auto`.
        rows_at_once: of a shard.
    """

    device: str = "auto"
    rows_at_once: int = 1 << 16

    def nearest_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, k: int) -> scan.Nearest:
        """See ByShard."""
        torch = _torch()
        blocks_of = self._distances(shard, searched, queries_QW)
        best = torch.empty((len(queries_QW), 0), dtype=torch.int64)
        for start, distances_QN in blocks_of:
            best = best.to(distances_QN.device)
            rows_N = torch.arange(start, start + distances_QN.shape[1], device=distances_QN.device)
            # one number in the order of (distance, row)
            both = torch.cat([best, (distances_QN << 40) | rows_N], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1, largest=False, sorted=True).values
        ranked = best.cpu().numpy()
        rows = np.where(ranked >> 40 <= 8 * queries_QW.shape[1], ranked & ((1 << 40) - 1), -1)
        return first((ranked >> 40).astype(np.int32), rows, k)

    def within_in(self, shard: Shard, searched: Searchable, queries_QW: Codes, radius: int) -> scan.Ball:
        """See ByShard."""
        radius = min(radius, 8 * queries_QW.shape[1])
        parts: list[tuple[Any, ...]] = []
        for start, distances_QN in self._distances(shard, searched, queries_QW):
            query, place = (distances_QN <= radius).nonzero(as_tuple=True)
            found = (query, distances_QN[query, place], place + start)
            parts.append(tuple(part.cpu().numpy() for part in found))
        query, distances, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((rows, distances, query))
        counts = np.bincount(query, minlength=len(queries_QW))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return scan.Ball(offsets, rows[order], distances[order].astype(np.int32))

    def _distances(self, shard: Shard, searched: Searchable, queries_QW: Codes) -> Any:
        """(first row, distances int64 [Q, rows]) by blocks; rows that are left out are beyond all distances."""
        torch = _torch()
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        kind = torch.float16 if device != "cpu" else torch.float32
        if searched.codes_NW is shard.codes:
            codes = hold(shard, f"torch-{device}", lambda: torch.from_numpy(np.array(shard.codes)).to(device))
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


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InvalidInput("the engine torch needs torch, which is not installed") from error
