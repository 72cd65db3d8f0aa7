"""`hashdist search`: one query or many, by image, key or code; nearest images or all within a radius."""

import difflib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashdist.collection.collection import Collection
from hashdist.commands.index import index_of
from hashdist.commands.pictures import Picture, open_pictures, page, side_by_side
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.options import SearchOptions
from hashdist.ground.settings import Settings
from hashdist.ground.tables import table
from hashdist.index import Index
from hashdist.index.search.engine import Engine, recall
from hashdist.index.search.engines import find_engine
from hashdist.index.search.where import parse

Codes = NDArray[np.uint8]

_NEAR_ROWS, _CLOSE_ROWS = 200_000, 5_000  # whose keys are looked at for one that is like another


class Query(NamedTuple):
    """One query: how it was given, its code uint8 [W], and its features [D] where there are any."""

    given: dict[str, str]
    code: Codes
    features: NDArray[np.floating[Any]] | None = None

    @property
    def key(self) -> str | None:
        """The image of the index that it is."""
        return self.given.get("key")


def run(settings: Settings, options: SearchOptions) -> dict[str, Any]:
    """Search an index.

    Returns:
        index, version, engine, and either code and hits (of one query) or queries, a list of them (--queries). A hit
        is key, id, distance, uri, and score where features decided the order. With --recall also recall.

    Raises InvalidInput, NotFound for what cannot be asked.
    """
    with _open(settings, options) as index:
        engine = _engine(options)
        queries = _queries(index, options)
        if not queries and not options.recall:
            raise InvalidInput("one of --image, --key, --code or --queries is required, found none")
        collection = open_pictures(index)
        found = [
            {**query.given, "code": query.code.tobytes().hex(), "hits": hits}
            for query, hits in zip(queries, _answers(index, options, engine, queries, collection), strict=True)
        ]
        result: dict[str, Any] = {"index": index.uri, "version": index.version, "engine": options.engine}
        if options.recall:
            result["recall"] = measure_recall(index, engine, options)
        if options.html:
            Path(options.html).write_text(_sheet(index, found, options, collection))
            result["html"] = options.html
        result |= {"queries": found} if options.queries else (found or [{}])[0]
        return {**result, "text": _text(result, found, options)}


@contextmanager
def _open(settings: Settings, options: SearchOptions) -> Iterator[Index]:
    """The index to search: in this process, or spread over actors."""
    index = index_of(settings, options.version, candidate=options.candidate)
    if not options.actors:
        yield index
        return
    # bring Ray with them, which a search in one process does without
    from hashdist.stages.cluster.peers import SpreadIndex
    from hashdist.stages.cluster.session import session

    with session(settings.cluster), SpreadIndex(index, options.actors) as made:
        yield made


def _engine(options: SearchOptions) -> Engine:
    """The engine, with the knobs among the options that are not as they are by default."""
    default = vars(SearchOptions())
    return find_engine(options.engine, **{name: v for name, v in vars(options).items() if v != default[name]})


# What is asked


def _queries(index: Index, options: SearchOptions) -> list[Query]:
    given = [name for name in ("image", "key", "code", "queries") if getattr(options, name)]
    if len(given) > 1:
        raise InvalidInput(f"one of --image, --key, --code or --queries is required, found {' and '.join(given)}")
    if options.image:
        return [_by_image(index, options)]
    if options.key:
        return _by_key(index, options)
    if options.code:
        return [_by_code(options.code, index.bits, "--code", options.rerank)]
    return _from_file(index, options) if options.queries else []


def _by_image(index: Index, options: SearchOptions) -> Query:
    path = Path(options.image)
    if not path.is_file():
        raise NotFound(f"--image needs a file, found none at {path}")
    uri = options.model or index.model_uri
    if not uri:
        raise InvalidInput("this index does not say which model made it; name one with --model URI")
    from hashdist.models.model import load_model  # brings torch with it, which a search by key or code does without

    model = load_model(uri)
    encoded = model.encode_readable([path], keep_features=options.rerank)
    if encoded.reasons[0]:
        raise InvalidInput(f"--image needs a picture that can be read, {path} cannot: {encoded.reasons[0]}")
    return Query({"image": str(path)}, encoded.codes[0], None if encoded.features is None else encoded.features[0])


def _by_key(index: Index, options: SearchOptions) -> list[Query]:
    """The image of --key. Raises NotFound with keys that are like it."""
    try:
        return _by_keys(index, [options.key], options.rerank)
    except NotFound as error:
        like = near_keys(index, options.key)
        near = f"; keys like it: {', '.join(map(repr, like))}" if like else ""
        file = "; a file has that name: --image searches with it" if Path(options.key).is_file() else ""
        raise NotFound(f"{error}{near}{file}") from error


def near_keys(index: Index, key: str, most: int = 3) -> list[str]:
    """Keys of live rows that end with a key that is not there, or with its file name; else those most like it.

    Only the first 200,000 rows are looked at, so that a typing error costs no more than a search.
    """
    keys, left = list[str](), _NEAR_ROWS
    for shard in index.view.shards:
        keys += shard.keys(np.arange(min(shard.rows, left)))
        left -= min(shard.rows, left)
    name = key.rpartition("/")[2].casefold()
    like = [one for one in keys if one.casefold().endswith((key.casefold(), f"/{name}"))]
    like = like or difflib.get_close_matches(key, keys[:_CLOSE_ROWS], most)
    return [one for one, there in zip(like, index.view.find(like).present, strict=True) if there][:most]


def _by_keys(index: Index, keys: Sequence[str], rerank: bool) -> list[Query]:
    codes_QW = index.codes_of(keys)
    if not rerank or not index.manifest.get("rerank"):
        return [Query({"key": key}, code) for key, code in zip(keys, codes_QW, strict=True)]
    features_QD = index.view.features(index.view.find(keys).ids)
    return [Query({"key": key}, *both) for key, *both in zip(keys, codes_QW, features_QD, strict=True)]


def _by_code(text: str, bits: int, where: str, rerank: bool) -> Query:
    if rerank:
        raise InvalidInput(
            f"{where}: --rerank needs the features of a query, which a code has not; give images or keys"
        )
    try:
        code = np.frombuffer(bytes.fromhex(text), np.uint8)
    except ValueError as error:
        raise InvalidInput(f"{where} needs hexadecimal bytes, found {text!r}") from error
    if len(code) * 8 != bits:
        raise InvalidInput(f"the index has codes of {bits} bits, found {len(code) * 8} in {where}")
    return Query({}, code)


def _from_file(index: Index, options: SearchOptions) -> list[Query]:
    """One query a line: a key of the index, else a code. Empty lines are passed over."""
    if options.queries != "-" and not Path(options.queries).is_file():
        raise NotFound(f"--queries needs a file, found none at {options.queries}")
    text = sys.stdin.read() if options.queries == "-" else Path(options.queries).read_text()
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    known = index.view.find([line for _, line in lines]).present
    keys = [line for (_, line), there in zip(lines, known, strict=True) if there]
    by_key = iter(_by_keys(index, keys, options.rerank))
    queries = []
    for (number, line), there in zip(lines, known, strict=True):
        if there:
            queries.append(next(by_key))
            continue
        name = f"{options.queries}, line {number} (no key of {index.uri}, so a code)"
        queries.append(_by_code(line, index.bits, name, options.rerank)._replace(given={}))
    if not queries:
        raise InvalidInput(f"--queries needs one key or code a line, found none in {options.queries}")
    return queries


# Answers


def _answers(
    index: Index,
    options: SearchOptions,
    engine: Engine,
    queries: Sequence[Query],
    collection: Collection | None,
) -> list[list[dict[str, Any]]]:
    """The hits of every query."""
    if not queries:
        return []
    if options.exclude_self and not any(query.key for query in queries):
        raise InvalidInput("--exclude-self is for searches by --key (or keys in --queries)")
    codes_QW = np.stack([query.code for query in queries])
    where = parse(options.where) if options.where else None
    if options.radius >= 0:
        if options.rerank:
            raise InvalidInput("--rerank orders the nearest images; leave --radius or --rerank out")
        near = index.search_within(codes_QW, options.radius, where, engine=engine)
        spans = [slice(a, b) for a, b in zip(near.offsets[:-1], near.offsets[1:], strict=True)]
        found = [(near.ids[s], near.distances[s], keys, None) for s, keys in zip(spans, near.keys(), strict=True)]
        return [_rows(query, *hits, options, collection) for query, hits in zip(queries, found, strict=True)]
    features = None
    if options.rerank:
        known = [query.features for query in queries if query.features is not None]
        features = np.stack(known) if known else np.empty((len(queries), 0), np.float32)
    k = options.k + options.exclude_self  # the image itself may be among them
    candidates = max(options.candidates, k) if options.candidates >= options.k else options.candidates
    hits = index.search(codes_QW, k, where, engine=engine, rerank=features, candidates=candidates)
    scores = [None] * len(queries) if hits.scores is None else list(hits.scores)
    every = zip(queries, hits.ids, hits.distances, hits.keys(), scores, strict=True)
    return [_rows(*one, options, collection)[: options.k] for one in every]


def _rows(
    query: Query,
    ids: NDArray[np.int64],
    distances: NDArray[np.int32],
    keys: Sequence[str],
    scores: NDArray[np.float64] | None,
    options: SearchOptions,
    collection: Collection | None,
) -> list[dict[str, Any]]:
    rows = []
    for place, (key, id_, distance) in enumerate(zip(keys, ids.tolist(), distances.tolist(), strict=True)):
        if options.exclude_self and key == query.key:
            continue
        hit = {"key": key, "id": str(id_), "distance": distance, "uri": collection and collection.picture_uri(key)}
        rows.append(hit if scores is None else {**hit, "score": float(scores[place])})
    return rows


def measure_recall(index: Index, engine: Engine, options: SearchOptions) -> dict[str, Any]:
    """Recall@k of an engine against the scan (`engine.recall`), over images of the index drawn evenly, and times.

    Shards are opened and the engine's own files built before the clock runs.
    """
    codes_QW = _even_sample(index, options.recall)
    k = min(options.k, index.rows)
    seconds, found = {}, {}
    for name, looked_at in (("engine", engine), ("scan", "scan")):
        index.search(codes_QW[:1], k, engine=looked_at)
        started = time.perf_counter()
        found[name] = index.search(codes_QW, k, engine=looked_at).distances
        seconds[name] = time.perf_counter() - started
    share = float(recall(found["engine"], found["scan"]).mean()) if len(codes_QW) else 1.0
    times = {"seconds": seconds["engine"], "scan_seconds": seconds["scan"]}
    return {"engine": options.engine, "k": k, "queries": len(codes_QW), f"recall@{k}": share, **times}


def _even_sample(index: Index, count: int) -> Codes:
    """Codes of about `count` live rows at even distances: rows are sorted by id, which is a hash."""
    view, rows = index.view, sum(shard.rows for shard in index.view.shards)
    wanted = np.unique(np.linspace(0, max(rows - 1, 0), min(count, rows)).astype(np.int64))
    codes, first = [np.empty((0, index.bits // 8), np.uint8)], 0
    for number, shard in enumerate(view.shards):
        here = wanted[(wanted >= first) & (wanted < first + shard.rows)] - first
        codes.append(shard.codes[np.setdiff1d(here, view.dead_rows(number))])
        first += shard.rows
    return np.concatenate(codes)


def _sheet(index: Index, found: Sequence[dict[str, Any]], options: SearchOptions, collection: Collection | None) -> str:
    """The results as one HTML page with the pictures in it."""
    keys = {hit["key"] for one in found for hit in one["hits"]} | {one["key"] for one in found if "key" in one}
    pictures = collection.fetch(sorted(keys)) if collection else {}
    rows = []
    for one in found:
        own = Path(options.image).read_bytes() if "image" in one else pictures.get(one.get("key", ""))
        query = Picture(own, [one.get("key") or one.get("image") or one["code"]], "query")
        hits = [Picture(pictures.get(hit["key"]), [hit["key"], _distance(hit)]) for hit in one["hits"]]
        rows.append(side_by_side([query, *hits]))
    return page(f"Search in {index.uri}, version {index.version}", "".join(rows))


def _distance(hit: dict[str, Any]) -> str:
    return f"{hit['distance']}" + (f" ({hit['score']:.4f})" if "score" in hit else "")


def _text(result: dict[str, Any], found: Sequence[dict[str, Any]], options: SearchOptions) -> str:
    """One JSON line a query for --queries, else a table."""
    if options.queries:
        return "\n".join(json.dumps({"number": number, **one}) for number, one in enumerate(found))
    lines = [f"{result['index']} version {result['version']}"]
    if options.recall:
        lines.append(", ".join(f"{name} {value}" for name, value in result["recall"].items()))
    head = ["bits", *(["cosine"] if options.rerank else []), "key", "uri"]
    for one in found:
        rows = [
            (hit["distance"], *([f"{hit['score']:.4f}"] if options.rerank else []), hit["key"], hit["uri"] or "")
            for hit in one["hits"]
        ]
        lines.append(table(head, rows))
    return "\n".join(lines)
