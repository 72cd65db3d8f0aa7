"""Collections of every format, written, committed and read as the stage does it, without Ray."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Picture

from hashdist.collection.collection import (
    Collection,
    Image,
    assemble,
    plan,
    write_unit,
)
from hashdist.collection.listing import list_collection, manifest_fields
from hashdist.collection.vocabulary import label_numbers
from hashdist.ground.settings import CollectionSettings
from hashdist.store import open_store
from hashdist.store.commit import Artefact, artefact, read_table


def jpeg(shade: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Picture.new("RGB", (size, size), (shade % 256, shade // 256 % 256, 7)).save(file, "JPEG")
    return file.getvalue()


def commit(root: str, settings: CollectionSettings) -> Artefact:
    """What the stage does, without Ray."""
    listing = list_collection(settings)
    target = artefact(
        open_store(root), "collections", inputs={"l": listing.digest}, settings={"rows": settings.part_rows}, revision=1
    )
    planned = plan(listing, settings.part_rows)
    units = [write_unit(target, unit, planned.reader.scan(unit), settings.part_rows) for unit in planned.units]
    labels = label_numbers(planned.reader, units)
    fields = assemble(target, units, salts=planned.salts, labels=labels, part_rows=settings.part_rows)
    target.publish({**manifest_fields(listing), **fields, "settings": settings.identity()})
    return target


def everything(collection: Collection) -> list[Image]:
    return [image for part in range(collection.parts) for image in collection.read(part)]


def listed(target: Artefact) -> pa.Table:
    return pa.concat_tables(read_table(target.store, entry) for entry in target.manifest()["files"])


Writer = Callable[[Path, dict[str, tuple[bytes, str]]], str]


def write_folder(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    for key, (data, label) in images.items():
        path = base / label / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(base)


def write_parquet(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    base.mkdir()
    keys = list(images)
    for number, some in enumerate([keys[:7], keys[7:]]):
        table = pa.table(
            {"id": some, "image": [images[key][0] for key in some], "label": [images[key][1] for key in some]}
        )
        pq.write_table(table, base / f"{number}.parquet", row_group_size=5)
    return str(base)


def write_tars(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    base.mkdir()
    keys = list(images)
    for number, some in enumerate([keys[:7], keys[7:]]):
        with tarfile.open(base / f"{number}.tar", "w") as tar:
            for key in some:
                for extension, data in (("json", b"{}"), ("jpg", images[key][0]), ("cls", images[key][1].encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(base)


def write_zip(base: Path, images: dict[str, tuple[bytes, str]]) -> str:
    base.mkdir()
    with zipfile.ZipFile(base / "0.zip", "w") as archive:
        for key, (data, label) in images.items():
            archive.writestr(f"{label}/{key}.jpg", data)
    return str(base)


WRITERS: dict[str, Writer] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_tars,
    "zip": write_zip,
}
"""Every format of the package, and the one that docs/extend.md shows."""


def expected_key(form: str, key: str, label: str) -> str:
    return f"{label}/{key}.jpg" if form in ("folder", "zip") else key
