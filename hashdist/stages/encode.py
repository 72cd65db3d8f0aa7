"""codes: every image of a collection as `bits` bits, by a committed model.

Frozen mode encodes committed features, images mode the collection itself. Work goes by the parts of what is read; a
finished part is committed at once, so a second run encodes only what is missing.
"""

import os
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hashdist.collection.collection import Collection
from hashdist.collection.collection import Image as Listed
from hashdist.collection.decode import BadImage
from hashdist.ground import telemetry
from hashdist.ground.bits import BIT_ORDER
from hashdist.ground.errors import InvalidInput
from hashdist.ground.schema import OK, UNREADABLE, UNUSABLE, failures, from_vectors, to_vectors, vector_schema
from hashdist.ground.settings import Settings
from hashdist.models.model import NOT_FINITE, Model, check_features, load_model
from hashdist.stages import artefacts
from hashdist.stages.cluster import session, tasks
from hashdist.store.commit import Artefact, read_table, write_table

KIND = "codes"
REVISION = 1

_ROWS_WORTH_A_PROCESS = {"features": 50_000, "collections": 1_000}
"""Rows that take about as long as a process needs to start and import."""

_ROW = ["id", "key", "digest", "labels", "status", "reason"]


def snapshot(settings: Settings, model: Artefact, source: Artefact) -> Artefact:
    """Where the codes live: named by the model's digest and by what is encoded.

    Args:
        settings: of the run.
        model: a committed model.
        source: committed features (frozen mode) or a committed collection (images mode).
    """
    inputs = {"model": model.manifest()["model_digest"], source.kind: source.name}
    return artefacts.target(settings, KIND, REVISION, inputs=inputs, identity=settings.encode.identity())


def run(settings: Settings, model: Artefact, source: Artefact) -> dict[str, Any]:
    """Encode every part that has no record yet and commit the codes.

    Raises:
        InvalidInput: features of another backbone than the model's, or a source that does not fit its mode.
    """
    started = time.perf_counter()
    codes = snapshot(settings, model, source)
    if codes.exists():
        return _result(codes, started, skipped=True)
    check_source(model, source)
    of_images = source.kind == "collections"
    gpu = of_images and session.gpus() > 0
    work = partial(_encode_images if of_images else _encode_features, codes, model, source, "cuda" if gpu else "cpu")
    parts = range(Collection(source).parts if of_images else len(source.manifest()["files"]))
    at_once = settings.encode.workers or (session.gpus() if gpu else _tasks(source))
    records = tasks.run_parts(codes, parts, work, label="encode", at_once=at_once, num_cpus=1, num_gpus=1 if gpu else 0)
    codes.publish(_manifest(settings, model, source, [records[part] for part in parts]))
    return _result(codes, started, skipped=False)


def _tasks(source: Artefact) -> int:
    """One a core, but not more than pay for what starting a process costs."""
    worth = -(-int(source.manifest()["rows"]) // _ROWS_WORTH_A_PROCESS[source.kind])
    # a Ray of one machine may have been given more logical CPUs than the machine has
    cores = min(session.cpus(), os.cpu_count() or 1) if session.nodes() == 1 else session.cpus()
    return max(1, min(worth, cores))


def check_source(model: Artefact, source: Artefact) -> None:
    """InvalidInput unless `source` is what the model encodes: a collection, or features of its own backbone."""
    manifest = model.manifest()
    wanted = "collections" if manifest["mode"] == "images" else "features"
    if source.kind != wanted:
        raise InvalidInput(
            f"{model.uri} was trained in mode {manifest['mode']!r} and encodes an artefact of kind {wanted!r}, found "
            f"{source.uri}; set --train.mode as it was when the model was trained"
        )
    if wanted == "features":
        check_features(manifest, source.manifest(), model.uri, source.uri)


def _manifest(settings: Settings, model: Artefact, source: Artefact, records: list[dict[str, Any]]) -> dict[str, Any]:
    made_by = model.manifest()
    return {
        "stage": "encode",
        "inputs": {
            "model": {"uri": model.uri, "digest": made_by["model_digest"]},
            source.kind: {"uri": source.uri, "digest": source.name},
        },
        "settings": settings.encode.identity(),
        "rows": sum(record["rows"] for record in records),
        "failed": sum(record["failed"] for record in records),
        "files": [record["file"] for record in records],
        "bits": made_by["bits"],
        "bit_order": BIT_ORDER,
        "model": model.uri,
        "model_digest": made_by["model_digest"],
    }


def _result(codes: Artefact, started: float, *, skipped: bool) -> dict[str, Any]:
    return artefacts.result("encode", codes, started, skipped=skipped, bits=codes.manifest()["bits"])


@lru_cache(maxsize=1)
def _model(uri: str, device: str) -> Model:
    """The model, opened once a process: Ray gives the next part to a process that has worked before."""
    return load_model(uri, device=device)


def _encode_features(codes: Artefact, model: Artefact, source: Artefact, device: str, part: int) -> dict[str, Any]:
    """One part of the features as one part of the codes."""
    table = read_table(source.store, source.manifest()["files"][part])
    present_N = np.asarray(table["status"].to_numpy(zero_copy_only=False) == OK)
    features_ND = from_vectors(table["feature"], table.schema)
    codes_NW = np.zeros((len(table), model.manifest()["bits"] // 8), np.uint8)
    codes_NW[present_N] = _model(model.uri, device).encode_features(features_ND[present_N])
    return _write(codes, table.select(_ROW), codes_NW, present_N)


def _encode_images(codes: Artefact, model: Artefact, source: Artefact, device: str, part: int) -> dict[str, Any]:
    """One part of the collection as one part of the codes, with a row and a reason for every unreadable image."""
    rows: list[Listed] = []

    def pictures() -> Iterator[bytes | BadImage]:
        for image in Collection(source).read(part):
            rows.append(image._replace(data=None))
            yield image.data if image.data is not None else _bad(image.reason or UNREADABLE)

    codes_NW, reasons, _ = _model(model.uri, device).encode_readable(pictures())
    present_N = np.array([reason is None for reason in reasons], np.bool_)
    table = pa.table(
        {
            "id": pa.array([row.id for row in rows], pa.int64()),
            "key": pa.array([row.key for row in rows], pa.string()),
            "digest": pa.array([row.digest for row in rows], pa.string()),
            "labels": pa.array([row.labels for row in rows], pa.list_(pa.int32())),
            "status": pa.array([_status(reason) for reason in reasons], pa.string()),
            "reason": pa.array(reasons, pa.string()),
        }
    )
    return _write(codes, table, codes_NW, present_N)


def _bad(reason: str) -> BadImage:
    slug, _, detail = reason.partition(": ")
    return BadImage(slug, detail)


def _status(reason: str | None) -> str:
    if reason is None:
        return OK
    return UNUSABLE if reason == NOT_FINITE else UNREADABLE


def _write(
    codes: Artefact, rows: pa.Table, codes_NW: NDArray[np.uint8], present_N: NDArray[np.bool_]
) -> dict[str, Any]:
    schema = vector_schema("code", "uint8", codes_NW.shape[1])
    table = pa.table([*rows.columns, to_vectors(codes_NW, present_N)], schema=schema)
    file = write_table(codes.store, codes.new_name(".parquet"), table)
    telemetry.count_images("encode", int(present_N.sum()), failures(table))
    return {"rows": len(table), "failed": int((~present_N).sum()), "file": file}
