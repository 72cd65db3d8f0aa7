"""The commands that look at an index or a store: short, and without Ray."""

import base64
import html
import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashdist.collections import open_collection
from hashdist.errors import InvalidInput, NotFound
from hashdist.searcher import Hits, Index, open_index
from hashdist.settings import SearchOptions, Settings
from hashdist.store import open_store
from hashdist.store.commit import prove_conditional_create

_HIT = "<figure>{picture}<figcaption>{key}<br>{distance}</figcaption></figure>"
_SHEET = """<!doctype html><meta charset="utf-8"><title>hashdist search</title>
<style>body{{font:14px sans-serif;margin:2em}}figure{{display:inline-block;margin:.5em;text-align:center}}
img{{height:96px;image-rendering:auto}}figcaption{{max-width:12em;overflow-wrap:anywhere}}</style>
<h1>Search in {index}, version {version}</h1>{figures}
"""


def index_of(settings: Settings, version: int = 0) -> Index:
    """The index that the settings name, at `version` (0 = the newest). Raises InvalidInput if they name none."""
    if not settings.index.uri and not settings.root:
        raise InvalidInput(
            "an index is required, found none; give --index.uri URI, or --root URI and --index.name NAME"
        )
    return open_index(settings.index.location(settings.root), version=version or None)


def index_log(settings: Settings) -> dict[str, Any]:
    """Every version of an index: number, time, rows, shards, what made it."""
    index = index_of(settings)
    versions = index.log()
    lines = [
        f"{v['version']:>6}  {v['created_at']}  {v['rows']:>12} rows  {v['shards']:>5} shards  {v['operation']}"
        for v in versions
    ]
    return {"index": index.uri, "versions": versions, "text": "\n".join([index.uri, *lines])}


def search(settings: Settings, options: SearchOptions) -> dict[str, Any]:
    """Search by image file, by key or by code: results in (distance, id) order, as a table and as a sheet."""
    index = index_of(settings, options.version)
    code = _query(index, options)
    hits = index.search(code, k=options.k)
    rows = [
        {"key": key, "id": str(number), "distance": int(distance)}
        for key, number, distance in zip(hits.keys()[0], hits.ids[0], hits.distances[0], strict=True)
    ]
    result: dict[str, Any] = {
        "index": index.uri,
        "version": index.version,
        "code": code[0].tobytes().hex(),
        "hits": rows,
    }
    if options.html:
        Path(options.html).write_text(_sheet(index, hits))
        result["html"] = options.html
    lines = [f"{row['distance']:>5}  {row['key']}" for row in rows]
    return {**result, "text": "\n".join([f"{index.uri} version {index.version}", " bits  key", *lines])}


def _query(index: Index, options: SearchOptions) -> NDArray[np.uint8]:
    given = [name for name in ("image", "key", "code") if getattr(options, name)]
    if len(given) != 1:
        raise InvalidInput(f"one of --image, --key or --code is required, found {' and '.join(given) or 'none'}")
    if options.key:
        return index.codes_of([options.key])
    if options.code:
        return _code(options.code, index.bits)
    path = Path(options.image)
    if not path.is_file():
        raise NotFound(f"--image needs a file, found none at {path}")
    uri = options.model or index.model_uri
    if not uri:
        raise InvalidInput("this index does not say which model made it; name one with --model URI")
    # brings torch with it, which a search by key or code does without
    model = importlib.import_module("hashdist.model").load_model(uri)
    codes: NDArray[np.uint8] = model.encode([path])
    return codes


def _code(text: str, bits: int) -> NDArray[np.uint8]:
    try:
        code = np.frombuffer(bytes.fromhex(text), np.uint8)
    except ValueError as error:
        raise InvalidInput(f"--code needs hexadecimal bytes, found {text!r}") from error
    if len(code) * 8 != bits:
        raise InvalidInput(f"the index has codes of {bits} bits, found {len(code) * 8} in --code")
    return code[None]


def _sheet(index: Index, hits: Hits) -> str:
    """The results as one HTML page with the pictures in it."""
    keys = hits.keys()[0]
    pictures = open_collection(index.collection_uri).fetch(keys) if index.collection_uri else {}
    figures = [
        _HIT.format(picture=picture_tag(pictures.get(key)), key=html.escape(key), distance=int(distance))
        for key, distance in zip(keys, hits.distances[0], strict=True)
    ]
    return _SHEET.format(index=html.escape(index.uri), version=index.version, figures="".join(figures))


def picture_tag(data: bytes | None, side: int = 96) -> str:
    """An <img> with the picture inside it, at most `side` pixels; empty where there is no picture."""
    if data is None:
        return ""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def storage_check(settings: Settings) -> dict[str, Any]:
    """Prove that the store refuses a second create of one name."""
    if not settings.root:
        raise InvalidInput("a store is required, found none; give --root FOLDER or --root s3://bucket/prefix")
    store = open_store(settings.root)
    prove_conditional_create(store)
    return {"store": store.uri, "conditional_create": True, "text": f"{store.uri}: refuses a second create"}
