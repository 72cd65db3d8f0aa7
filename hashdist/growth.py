"""Growth: bring an index up to date with its collection, encoding only what was added or changed."""

import time
from dataclasses import replace
from typing import Any

from hashdist import distributed
from hashdist.collections import subset
from hashdist.errors import InvalidInput
from hashdist.index import open_index
from hashdist.pipeline import run_metrics
from hashdist.progress import say
from hashdist.settings import Settings
from hashdist.stages import collection, encode, features
from hashdist.stages import reindex as growth
from hashdist.store import open_store
from hashdist.store.commit import open_artefact


def reindex(settings: Settings) -> dict[str, Any]:
    """List the collection, encode the difference to the index with the index's own model, commit one version.

    Nothing new: no commit. Raises InvalidInput if the index does not name the model that made it.
    """
    started = time.perf_counter()
    with distributed.session(settings.cluster), run_metrics(settings):
        index = open_index(settings.index.location(settings.root))
        if not index.model_uri:
            raise InvalidInput(
                f"{index.uri} does not name the model that made it; build it with `hashdist index build`"
            )
        listing = collection.run(settings)
        now = open_artefact(listing["snapshot"], collection.KIND)
        change = growth.difference(index, now)
        result = {"stage": "reindex", "index": index.uri, **change.counts(), "encoded": 0, "failed": 0}
        if change.nothing:
            say(f"reindex: nothing new in {now.manifest()['uri']}; version {index.version} stays")
            return {**result, "version": index.version, "seconds": time.perf_counter() - started}
        model = open_artefact(index.model_uri, "models")
        codes = None
        if change.to_encode:
            part = subset(open_store(settings.root), now, change.to_encode)
            ready = replace(settings, train=replace(settings.train, mode=model.manifest()["mode"]))
            vectors = open_artefact(features.run(ready, part)["snapshot"], features.KIND)
            source = part if model.manifest()["mode"] == "images" else vectors
            encoded = encode.run(ready, model, source)
            codes = open_artefact(encoded["snapshot"], encode.KIND)
            result["encoded"], result["failed"] = encoded["rows"] - encoded["failed"], encoded["failed"]
        index = growth.commit(index, change, codes)
    say(
        f"reindex: {result['added']} added, {result['changed']} changed, {result['removed']} removed -> {index.version}"
    )
    return {**result, "version": index.version, "rows": index.rows, "seconds": time.perf_counter() - started}
