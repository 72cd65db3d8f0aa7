"""The commands about an index, a store, a protocol file or a data set: short, and without Ray."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from hashdist.evaluation import datasets, protocols
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.ids import assign_salts, image_ids
from hashdist.ground.options import ConvertOptions, ProtocolCheckOptions, ProtocolOptions
from hashdist.ground.schema import OK
from hashdist.ground.settings import Settings
from hashdist.store.commit import Artefact
from hashdist.store.vectors import read_vectors


def protocol_make(settings: Settings, options: ProtocolOptions) -> dict[str, Any]:
    """Write a protocol file: from lists, or drawn among the images of a data set or of committed features."""
    if not options.out:
        raise InvalidInput("a file to write is required, found none; give --out FILE")
    listed = any(getattr(options.lists, part) for part in protocols.SETS)
    if listed and options.source:
        raise InvalidInput("sets are drawn from --source or given by --lists, found both; leave one out")
    if not listed and not options.protocol:
        raise InvalidInput("a protocol to draw by is required, found none; give --protocol NAME or --lists.query FILE")
    protocol = _from_lists(options) if listed else _draw(settings, options)
    return _result(protocols.write_protocol(options.out, protocol), protocol)


def _from_lists(options: ProtocolOptions) -> protocols.Protocol:
    """The protocol of given lists; without a list of training images they are the database."""
    files = {part: [path for path in getattr(options.lists, part).split(",") if path] for part in protocols.SETS}
    sets = {
        part: [key for path in paths for key in datasets.read_dataset("flags", path).keys]
        for part, paths in files.items()
    }
    source = ", ".join(f"{part}: {Path(path).name}" for part, paths in files.items() for path in paths)
    sets["train"] = sets["train"] or sets["database"]
    return protocols.protocol_of(sets, options.protocol or "lists", options.protocol_seed, source)


def _draw(settings: Settings, options: ProtocolOptions) -> protocols.Protocol:
    """The protocol by a draw."""
    name, seed = options.protocol, options.protocol_seed
    if options.source:
        data = datasets.read_dataset(options.layout, options.source, seed)
        keys, source = data.keys, f"{options.layout}, {len(data.keys)} images"
        ids = image_ids(keys, assign_salts(keys))
        split = protocols.split(name, ids, data.labels(), seed, data.parts)
    else:
        features = _features(settings)
        rows = _with_feature(features, ["key", *protocols.columns(name)])
        keys, source = rows["key"].to_pylist(), f"features {features.name}, {len(rows)} images"
        split = protocols.split_rows(name, rows, seed)
    sets = {part: [keys[row] for row in getattr(split, part)] for part in protocols.SETS}
    return protocols.protocol_of(sets, name, seed, source)


def _features(settings: Settings) -> Artefact:
    """The committed features that the settings name, without making any. Raises NotFound."""
    if not settings.root and not settings.features.snapshot:
        raise InvalidInput(
            "images are required: give a data set (--layout NAME --source FOLDER), lists (--lists.query FILE ...), or "
            "committed features (--root ROOT and the settings they were made with, or --features.snapshot URI)"
        )
    from hashdist.stages.pipeline import Pipeline, upstream  # brings torch and Ray with it, which lists do without

    pipeline = Pipeline(settings)
    for stage in [*upstream("features", settings), "features"]:
        made = pipeline.artefact(stage)
        if not made.exists():
            raise NotFound(f"committed {stage} are required, found none at {made.uri}; run `hashdist {stage}` first")
    return made


def _with_feature(features: Artefact, columns: list[str]) -> pa.Table:
    names = list(dict.fromkeys(["id", "status", *columns]))
    rows = read_vectors(features, names)
    return rows.filter(pa.compute.equal(rows["status"], OK))


def protocol_check(settings: Settings, options: ProtocolCheckOptions) -> dict[str, Any]:
    """Check a protocol file, and that committed features hold its images if the settings name any."""
    if not options.file:
        raise InvalidInput("a protocol file is required, found none; use `hashdist protocol check FILE`")
    protocol = protocols.read_protocol(options.file)
    result = _result(options.file, protocol)
    if settings.root or settings.features.snapshot:
        features = _features(settings)
        protocols.split_rows(f"{protocols.FILE}{options.file}", _with_feature(features, []))
        result |= {"features": features.uri, "text": f"{result['text']}\nall its images are in {features.uri}"}
    return result


def _result(uri: str, protocol: protocols.Protocol) -> dict[str, Any]:
    summary = protocol.summary()
    lines = [f"{uri}: protocol {protocol.name}, seed {protocol.seed}, from {protocol.source}"]
    lines += [f"{part:>10}  {count:>8}  {summary['digests'][part]}" for part, count in summary["counts"].items()]
    return {"file": uri, **summary, "text": "\n".join([*lines, f"{'all':>10}  {'':>8}  {summary['digest']}"])}


def dataset_convert(settings: Settings, options: ConvertOptions) -> dict[str, Any]:  # noqa: ARG001
    """Write a data set in its own layout as a parquet collection."""
    if not options.out:
        raise InvalidInput("a parquet file to write is required, found none; give --out FILE")
    rows, missing = datasets.convert(options.layout, options.source, options.out, options.images, options.seed)
    text = f"{options.out}: {rows} images, {missing} of them without a file; list them with --collection.uri"
    return {"file": options.out, "rows": rows, "missing": missing, "text": text}
