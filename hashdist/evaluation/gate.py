"""The gate: what a proposed version of an index must show before it is served.

| check | what is required |
|---|---|
| `probes` | images that are encoded again by the model that the version names get the codes that are stored |
| `quality` | mAP where there are labels, else recall@k of exact neighbours, within a tolerance of the last version's; \
in a first version hardly below that of random hyperplanes |
| `bits` | few bits are (nearly) constant |
| `collisions` | two images rarely have equal codes |
| `counts` | hardly fewer rows than are served |

Limits are settings (`gate`). What cannot be checked says why and does not fail: no model, no features, no labels, too
few rows. The gate runs on what will be served, after every rebase, also for increments. Its cost does not grow with
the index, but for finding the probe set in it: `gate.parts` files of features and `gate.probes` images through the
model, `gate.queries` codes against `gate.sample` codes, and one search for `gate.sample` ids in all shards, which are
fetched for it where the store is remote.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from hashdist.collection.collection import Collection
from hashdist.evaluation import measure, ranking
from hashdist.evaluation.probes import Probes, read_probes, smallest, write_probes
from hashdist.ground.bits import pack, unpack
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.progress import say
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import GateSettings, Settings
from hashdist.index import Index
from hashdist.index.candidate import Gate
from hashdist.index.view import Places, View
from hashdist.methods import lsh
from hashdist.models.model import DECISIVE, Model, check_features, load_model
from hashdist.nearest import cosine, scan
from hashdist.store.commit import Artefact, open_artefact, read_table

FARTHEST = 1
"""Bits by which a probe's code may differ from the stored one."""

_CONSTANT = 0.02  # a bit whose mean is nearer to 0 or 1 than this is nearly constant
_ABOVE_CHANCE = 0.02  # of a first version whose features are not at hand, as a share of the way from chance to 1
_ALIVE = 0.5  # share of the probe set that must still be in the index
_PARTS_BEFORE = 2  # of the codes that an increment joins: a cron must stay cheap
_DEPTH = 2  # neighbours kept of each query, as a multiple of k: some of them will be deleted
_SHARE_NEAR = 20  # k is at most the size of the probe set over this

Ids = NDArray[np.int64]
Check = dict[str, Any]


def for_build(settings: Settings, codes: Artefact) -> Gate:
    """The gate of a version that holds exactly these codes."""
    return Checks(settings.gate, [codes])


def for_growth(settings: Settings, index: Index, codes: Artefact | None) -> Gate:
    """The gate of an increment: probes are taken from it and from the codes that the index was built from.

    Args:
        settings: of the run.
        index: what grows.
        codes: committed codes of what was added and changed; None where there is nothing of the kind.
    """
    return Checks(settings.gate, [codes] if codes else [], _built_from(settings, index.manifest))


def for_candidate(settings: Settings, index: Index) -> Gate:
    """The gate for a candidate that waits, by the lineage that it carries."""
    candidate = index.manifest.get("candidate") or {}
    named = candidate.get("about", {}).get("inputs", {}).get("codes")
    sources = [_open(named["uri"], "codes")] if named else []
    base = [] if named and named["digest"] == candidate.get("built_from") else _built_from(settings, candidate)
    return Checks(settings.gate, [source for source in sources if source], base)


def _built_from(settings: Settings, manifest: Any) -> list[Artefact]:
    """The codes that an index was built from, where they are still there."""
    name = manifest.get("built_from")
    found = _open(f"{settings.root.rstrip('/')}/codes/{name}", "codes") if name and settings.root else None
    return [found] if found else []


def _open(uri: str, kind: str) -> Artefact | None:
    try:
        return open_artefact(uri, kind)
    except (NotFound, InvalidInput):
        return None


@dataclass(frozen=True)
class Checks:
    """A gate (hashdist/index/promotion.py).

    Args:
        limits: what is required.
        sources: committed codes that are new; they name what the rows were encoded from.
        before: those that were there, of which less is read: they have been through a gate.
    """

    limits: GateSettings
    sources: Sequence[Artefact]
    before: Sequence[Artefact] = ()

    def __call__(self, served: View, proposed: View) -> dict[str, Any]:
        """Every check, and what was measured on the way."""
        started = time.perf_counter()
        checks = [self._counts(served, proposed), self._probes(proposed)]
        quality = probes = None
        few = proposed.manifest["rows"] < self.limits.fewest
        if few:
            reason = f"the index has {proposed.manifest['rows']} rows, fewer than {self.limits.fewest} (gate.fewest)"
            checks += [_skip(name, reason) for name in ("bits", "collisions", "quality")]
        else:
            probes, at_random = self._probe_set(served, proposed)
            places = _present(proposed.locate(probes.ids))
            codes_SW = proposed.codes(places)
            checks += [self._bits(codes_SW), self._collisions(codes_SW)]
            judged, quality = self._quality(served, proposed, probes, places, codes_SW, at_random)
            checks.append(judged)
        passed = all(check["passed"] for check in checks)
        for check in checks:
            if not check["passed"] or check.get("skipped"):
                say(f"gate: {check['name']}: {check['text']}")
        say(f"gate: {'passed' if passed else 'not passed'} in {time.perf_counter() - started:.1f} s")
        report: dict[str, Any] = {"passed": passed, "checks": checks}
        report |= {"quality": quality} if quality else {}
        return report | ({"probes": dict(probes.entry)} if probes else {})

    # Counts

    def _counts(self, served: View, proposed: View) -> Check:
        before, after = int(served.manifest["rows"]), int(proposed.manifest["rows"])
        least = int(np.ceil((1 - self.limits.lost_rows) * before))
        text = f"{after} rows, {before} are served, and at least {least} are required (gate.lost_rows)"
        return _check("counts", after >= least, after, least, text)

    # Codes made again

    def _probes(self, proposed: View) -> Check:
        name, uri = "probes", proposed.manifest["model_uri"]
        if not proposed.manifest["rows"]:
            return _skip(name, "there are no rows")
        if not uri:
            return _skip(name, "the index does not name the model that made its codes")
        artefact = _open(uri, "models")
        if artefact is None:
            return _skip(name, f"no model is committed at {uri}")
        gpu = artefact.manifest()["mode"] == "images" and torch.cuda.is_available()
        model = load_model(uri, device="cuda" if gpu else "cpu")
        if model.digest != proposed.manifest["model"]:
            return _check(name, False, 0.0, self.limits.agreement, f"{uri} is not the model that the version names")
        sources = [(codes, self.limits.parts) for codes in self.sources]
        # an increment reads and encodes no image that is not of it
        before = [codes for codes in self.before if "features" in codes.manifest()["inputs"]]
        sources += [(codes, min(_PARTS_BEFORE, self.limits.parts)) for codes in before]
        share = -(-self.limits.probes // max(1, len(sources)))
        try:
            made = [_encode_again(codes, model, proposed, share, parts) for codes, parts in sources]
        except InvalidInput as error:
            return _check(name, False, 0.0, self.limits.agreement, f"the model cannot encode what it should: {error}")
        ids = np.concatenate([np.empty(0, np.int64), *(again.ids for again in made)])
        if not len(ids):
            return _skip(name, "no features of indexed rows are at hand, nor images that were encoded just now")
        codes_NW = np.concatenate([again.codes_NW for again in made])
        stored_NW = proposed.codes(proposed.locate(ids))
        distances = np.bitwise_count(codes_NW ^ stored_NW).sum(1)
        equal = float((distances == 0).mean())
        text = (
            f"{int((distances == 0).sum())} of {len(ids)} images encoded again have the stored code ({equal:.2%}, at "
            f"least {self.limits.agreement:.1%}), the farthest differs by {distances.max()} bits (at most {FARTHEST})"
        )
        passed = equal >= self.limits.agreement and distances.max() <= FARTHEST
        return _check(name, bool(passed), equal, self.limits.agreement, text, farthest=int(distances.max()))

    # The probe set

    def _probe_set(self, served: View, proposed: View) -> tuple[Probes, NDArray[np.uint8] | None]:
        """The one that the index keeps, or a new one where there is none, too little of it is left, or the features
        are now another network's; of a new one also the codes that random hyperplanes give its features.

        Cosines are taken about the mean: features behind a ReLU all point one way, and heads are trained on centred
        ones (decision H6).
        """
        features = next((found for found in map(_features_of, [*self.before, *self.sources]) if found), None)
        entry, store = served.manifest.get("probes"), proposed.log.store
        made_by = {name: features.manifest().get(name) for name in DECISIVE} if features else None
        if entry and made_by in (None, entry["made_by"]):
            kept = read_probes(store, entry)
            if proposed.locate(kept.ids).present.mean() >= _ALIVE:
                return kept, None
        name = proposed.log.new_attempt().new("probes", ".parquet")
        nothing = np.empty((0, 0), np.int64)
        if features is None:
            return write_probes(store, name, smallest(proposed, self.limits.sample).ids, nothing, {}), None
        rows = _rows_of(features, proposed, self.limits.sample, self.limits.parts)
        if len(rows) < self.limits.fewest:
            return write_probes(store, name, smallest(proposed, self.limits.sample).ids, nothing, {}), None
        ids, features_SD = _features(features, rows)
        centred_SD = features_SD - features_SD.mean(0, dtype=np.float64).astype(np.float32)
        depth = _DEPTH * min(self.limits.recall_at, -(-len(ids) // _SHARE_NEAR))
        queries = min(self.limits.queries, len(ids))
        found_QK = cosine.nearest(centred_SD[:queries], centred_SD, depth + 1, threads=1)
        others = found_QK != np.arange(queries)[:, None]
        others[others.all(1), -1] = False
        near_QK = ids[found_QK[others].reshape(queries, depth)]
        at_random = pack(lsh.fit(centred_SD, int(proposed.manifest["bits"]), 0)(centred_SD))
        return write_probes(store, name, ids, near_QK, made_by or {}), at_random

    # Statistics of the codes

    def _bits(self, codes_SW: NDArray[np.uint8]) -> Check:
        means_L = unpack(codes_SW).mean(0)
        constant = float((np.minimum(means_L, 1 - means_L) < _CONSTANT).mean())
        most = self.limits.constant_bits
        text = f"{constant:.1%} of the bits are equal in {1 - _CONSTANT:.0%} of the images, at most {most:.0%} may be"
        return _check("bits", constant <= most, constant, most, text)

    def _collisions(self, codes_SW: NDArray[np.uint8]) -> Check:
        n = len(codes_SW)
        counts = np.unique(codes_SW, axis=0, return_counts=True)[1].astype(np.float64)
        rate = float((counts * (counts - 1)).sum() / max(1, n * (n - 1)))
        text = f"two images have equal codes with probability {rate:.4f}, at most {self.limits.collisions} is allowed"
        return _check("collisions", rate <= self.limits.collisions, rate, self.limits.collisions, text)

    # Quality

    def _quality(
        self,
        served: View,
        proposed: View,
        probes: Probes,
        places: Places,
        codes_SW: NDArray[np.uint8],
        at_random: NDArray[np.uint8] | None,
    ) -> tuple[Check, dict[str, Any] | None]:
        """Judged is how far a value stands above chance, that of the same codes given to other images."""
        labels = pa.array(proposed.column(places, "labels"), pa.list_(pa.int32()))
        labelled = pc.greater(pc.fill_null(pc.list_value_length(labels), 0), 0).to_numpy(zero_copy_only=False)
        task = _Task(places.ids, _masks(labels) if labelled.mean() >= _ALIVE else None, probes, self.limits)
        if not task.queries:
            return _skip("quality", "there are neither labels nor features of the indexed images"), None
        value = task.measure(codes_SW)
        found = {
            "measure": task.name,
            "value": value,
            "queries": task.queries,
            "sample": len(places.ids),
            "probes": probes.entry["sha256"],
        }
        chance = task.measure(np.roll(codes_SW, len(codes_SW) // 2, axis=0))
        last, origin = self._last(served, task, probes)
        if last is not None:
            least = chance + (1 - self.limits.tolerance) * max(0.0, last - chance)
        elif at_random is not None and len(at_random) == len(codes_SW):
            floor = task.measure(at_random)
            least = chance + self.limits.floor * max(0.0, floor - chance)
            origin = f"there is no earlier value; random hyperplanes reach {floor:.4f} on the same features"
        else:
            least, origin = chance + _ABOVE_CHANCE * (1 - chance), "there is no earlier value"
        text = f"{task.name} is {value:.4f}, at least {least:.4f} is required ({origin}; chance gives {chance:.4f})"
        return _check("quality", value >= least, value, least, text, measure=task.name), found

    def _last(self, served: View, task: "_Task", probes: Probes) -> tuple[float | None, str]:
        """The value that the served version reached, and where it is known from."""
        quality = served.manifest.get("quality") or {}
        if quality.get("measure") == task.name:
            same = "" if quality["probes"] == probes.entry["sha256"] else ", on another probe set"
            return quality["value"], f"version {served.number} has {quality['value']:.4f}{same}"
        places = served.locate(task.ids)
        if not served.manifest["rows"] or places.present.mean() < _ALIVE:
            return None, ""
        among = task.among(places.present)
        if not among.queries:
            return None, ""
        value = among.measure(served.codes(_present(places)))
        return value, f"the codes of version {served.number} reach {value:.4f} on the same images"


@dataclass(frozen=True)
class _Task:
    """A measurement within the probe set.

    Attributes:
        ids: int64 [S], ascending: what of the set is there.
        masks: label masks uint64 [S, M]; None = by neighbours.
        probes: the whole set.
        limits: how many queries, and k.
    """

    ids: Ids
    masks: NDArray[np.uint64] | None
    probes: Probes
    limits: GateSettings

    @property
    def name(self) -> str:
        return f"recall@{self.k}" if self.masks is None else "map"

    @property
    def k(self) -> int:
        """Of recall@k: half of the neighbours that the set keeps."""
        return int(self.probes.neighbours_QK.shape[1]) // _DEPTH

    @property
    def queries(self) -> int:
        """How many of the ids are queries: the first."""
        if self.masks is not None:
            return min(self.limits.queries, len(self.ids))
        return int(np.isin(self.ids, self.probes.ids[: len(self.probes.neighbours_QK)]).sum())

    def among(self, present: NDArray[np.bool_]) -> "_Task":
        """The same where only these are there."""
        return _Task(self.ids[present], None if self.masks is None else self.masks[present], self.probes, self.limits)

    def measure(self, codes_SW: NDArray[np.uint8]) -> float:
        """The mean over the queries, each left out of its own results."""
        return self._recall(codes_SW) if self.masks is None else self._map(codes_SW, self.masks)

    def _map(self, codes_SW: NDArray[np.uint8], masks: NDArray[np.uint64]) -> float:
        q = self.queries
        histograms = scan.histograms(codes_SW, codes_SW[:q], masks, masks[:q])
        others = measure.without_own(histograms, masks[:q], np.ones(q, np.bool_))
        return float(ranking.tie_expected_ap(others).mean())

    def _recall(self, codes_SW: NDArray[np.uint8]) -> float:
        q = self.queries
        k = min(self.k, len(self.ids) - 1)
        wanted = self.probes.neighbours_QK[np.searchsorted(self.probes.ids, self.ids[:q])]
        found = self.ids[scan.nearest(codes_SW, codes_SW[:q], k + 1).rows_QK]
        near = [exact[np.isin(exact, self.ids)][:k] for exact in wanted]
        others = [got[got != own][: len(exact)] for own, exact, got in zip(self.ids[:q], near, found, strict=True)]
        known = [row for row, exact in enumerate(near) if len(exact)]
        recall = ranking.recall_at([others[row] for row in known], [near[row] for row in known])
        return float(recall.mean()) if known else 0.0


def _masks(labels: pa.Array) -> NDArray[np.uint64]:
    return ranking.label_masks(labels, int(pc.max(pc.list_flatten(labels)).as_py()) + 1)


def _present(places: Places) -> Places:
    return places.take(np.flatnonzero(places.present))


def _check(name: str, passed: bool, value: float, limit: float, text: str, **more: Any) -> Check:
    return {"name": name, "passed": bool(passed), "value": value, "limit": limit, "text": text, **more}


def _skip(name: str, reason: str) -> Check:
    text = f"not checked: {reason}"
    return {"name": name, "passed": True, "skipped": True, "value": None, "limit": None, "text": text}


# What rows were encoded from


class _Reencoded(NamedTuple):
    ids: Ids
    codes_NW: NDArray[np.uint8]


def _encode_again(codes: Artefact, model: Model, view: View, count: int, parts: int) -> _Reencoded:
    """Some of the rows of `view` that came from these codes, encoded again from what these were encoded from."""
    none = _Reencoded(np.empty(0, np.int64), np.empty((0, model.bits // 8), np.uint8))
    source = _source_of(codes)
    if source is None:
        return none
    rows = _rows_of(source, view, count, parts)
    if not len(rows):
        return none
    if source.kind == "features":
        check_features(model.manifest, source.manifest(), model.uri, source.uri)
        ids, features_ND = _features(source, rows)
        return _Reencoded(ids, model.encode_features(features_ND))
    ids, pictures = _images(Collection(source), rows)
    encoded = model.encode_readable(pictures)
    good = np.array([reason is None for reason in encoded.reasons], np.bool_)
    return _Reencoded(ids[good], encoded.codes[good])


def _source_of(codes: Artefact) -> Artefact | None:
    inputs = codes.manifest()["inputs"]
    for kind in ("features", "collections"):
        if kind in inputs:
            return _open(inputs[kind]["uri"], kind)
    return None


def _features_of(codes: Artefact) -> Artefact | None:
    """The features that the codes were made from, or that the model's graph was made from."""
    source = _source_of(codes)
    if source is None or source.kind == "features":
        return source
    model = _open(codes.manifest()["model"], "models")
    graph = model.manifest().get("inputs", {}).get("graphs") if model else None
    made = _open(graph["uri"], "graphs") if graph else None
    features = made.manifest().get("inputs", {}).get("features") if made else None
    return _open(features["uri"], "features") if features else None


class _PartRows(NamedTuple):
    """Rows of an artefact: which part each is in."""

    ids: Ids
    parts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


def _rows_of(source: Artefact, view: View, count: int, parts: int) -> _PartRows:
    """The rows of smallest ids that are live in `view` with the same content, of evenly spaced parts of the source."""
    total = Collection(source).parts if source.kind == "collections" else len(source.manifest()["files"])
    chosen = np.unique(np.linspace(0, max(0, total - 1), min(total, parts)).astype(np.int64))
    tables = [(part, _rows_in_part(source, int(part))) for part in chosen]
    ids = np.concatenate([np.empty(0, np.int64), *(table["id"].to_numpy() for _, table in tables)])
    where = np.concatenate([np.empty(0, np.int64), *(np.full(len(table), part) for part, table in tables)])
    digests = [digest for _, table in tables for digest in table["digest"].to_pylist()]
    order = np.argsort(ids, kind="stable")
    places = view.locate(ids[order])
    order, places = order[places.present], _present(places)
    kept: list[int] = []
    for start in range(0, len(order), 2 * count):
        rows = np.arange(start, min(start + 2 * count, len(order)))
        stored = view.column(places.take(rows), "digest")
        kept += [int(order[r]) for r, digest in zip(rows, stored, strict=True) if digest == digests[order[r]]]
        if len(kept) >= count:
            break
    return _PartRows(ids[kept[:count]], where[kept[:count]])


def _rows_in_part(source: Artefact, part: int) -> pa.Table:
    if source.kind == "collections":
        table = Collection(source).table(part)
    else:
        table = read_table(source.store, source.manifest()["files"][part], ["id", "digest", "status"])
    return table.filter(pc.equal(table["status"], OK)).select(["id", "digest"])


def _features(source: Artefact, rows: _PartRows) -> tuple[Ids, NDArray[Any]]:
    """Ids, ascending, and the features of rows."""
    ids, vectors = [], []
    for part in np.unique(rows.parts):
        table = read_table(source.store, source.manifest()["files"][part], ["id", "feature"])
        table = table.filter(pc.is_in(table["id"], pa.array(rows.ids[rows.parts == part])))
        ids.append(table["id"].to_numpy())
        vectors.append(from_vectors(table["feature"], table.schema))
    order = np.argsort(np.concatenate(ids))
    return np.concatenate(ids)[order], np.ascontiguousarray(np.concatenate(vectors)[order])


def _images(collection: Collection, rows: _PartRows) -> tuple[Ids, Iterator[bytes]]:
    """Ids and encoded bytes of the rows that can still be read."""
    found = {
        image.id: image.data
        for part in np.unique(rows.parts)
        for image in collection.read(int(part), rows.ids[rows.parts == part])
        if image.data is not None
    }
    return np.array(list(found), np.int64), iter(list(found.values()))
