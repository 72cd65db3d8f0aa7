"""What is at a URI now: names, sizes and stamps by LIST, the format, and the digest that names the artefact."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, Literal

from hashdist.collection.decode import EXTENSIONS
from hashdist.collection.readers.reader import is_hidden
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings
from hashdist.store import Entry, Store, open_store

Format = Literal["folder", "parquet", "webdataset"]


@dataclass(frozen=True)
class Listing:
    """What a collection consists of now, by name; no image has been read.

    Args:
        uri: canonical.
        format: of the files.
        store: the folder that names are relative to.
        files: the image, parquet or tar files, sorted by name.
        options: the settings that matter for reading: labels, id_column, image_column.
        digest: of all of it.
    """

    uri: str
    format: Format
    store: Store
    files: list[Entry]
    options: dict[str, Any]
    digest: str


# Listing


def list_collection(settings: CollectionSettings) -> Listing:
    """List the collection. Raises InvalidInput for one that is missing, empty, or of mixed formats."""
    whole = named_store(settings)
    store, name = split_file(whole)
    files = [entry for entry in whole.list() if not is_hidden(entry.name)]
    if not files and name:
        files = [entry for entry in store.list(name) if entry.name == name]
    else:
        store = whole
    kinds = kinds_of(files)
    chosen = chosen_format(whole.uri, Counter({kind: len(found) for kind, found in kinds.items()}), files, settings)
    found = kinds[chosen]
    options = reading_options(settings, chosen)
    return Listing(whole.uri, chosen, store, found, options, _listing_digest(chosen, options, found))


def reading_options(settings: CollectionSettings, chosen: Format) -> dict[str, Any]:
    """The settings that matter for reading a format."""
    options: dict[str, Any] = {"labels": settings.labels}
    if chosen == "parquet":
        options |= {"id_column": settings.id_column, "image_column": settings.image_column}
    return options


def named_store(settings: CollectionSettings) -> Store:
    """The store at the collection's URI. Raises InvalidInput where there is none."""
    if not settings.uri:
        raise InvalidInput(
            "a collection is required (a folder of images, parquet files or tars, local or s3://), found none; "
            "give --collection.uri"
        )
    return open_store(settings.uri)


def split_file(store: Store) -> tuple[Store, str]:
    """The folder and the file name, if the URI is one of a single file."""
    base, _, name = store.uri.rpartition("/")
    return (open_store(base), name) if PurePosixPath(name).suffix else (store, "")


def kinds_of(files: Iterable[Entry]) -> dict[Format, list[Entry]]:
    """Files by the format that their extension tells, those of none left out."""
    kinds: dict[Format, list[Entry]] = {"folder": [], "parquet": [], "webdataset": []}
    for entry in files:
        kind = _kind(entry.name)
        if kind:
            kinds[kind].append(entry)
    return kinds


def chosen_format(uri: str, counts: Counter[Format], others: Iterable[Entry], settings: CollectionSettings) -> Format:
    """The format of a collection with so many files of each. Raises InvalidInput unless it is one.

    `others`: some of the files, for the message where none is of a format.
    """
    wanted = settings.format
    present = [kind for kind, count in counts.items() if count and wanted in ("auto", kind)]
    if len(present) == 1:
        return present[0]
    if present:
        raise InvalidInput(
            f"{uri}: files of one format are required, found "
            f"{' and '.join(f'{counts[kind]} for {kind}' for kind in present)}; choose with --collection.format"
        )
    seen = Counter(PurePosixPath(entry.name).suffix.lower() or "no extension" for entry in others)
    met = ", ".join(f"{count} x {suffix}" for suffix, count in seen.most_common(5))
    needed = "images, parquet files or tars" if wanted == "auto" else f"files of the format {wanted!r}"
    advice = "; unpack compressed tars first" if any(s in seen for s in (".gz", ".tgz", ".zst", ".bz2", ".xz")) else ""
    raise InvalidInput(
        f"{uri}: {needed} are required, found {met or 'nothing there'}{advice}; check --collection.uri "
        f"(images are recognised by extension: {' '.join(sorted(EXTENSIONS))})"
    )


def _kind(name: str) -> Format | None:
    suffix = name[name.rfind(".") :].lower() if "." in name else ""  # there may be 10**9 names: no path objects
    if suffix in EXTENSIONS:
        return "folder"
    return {".parquet": "parquet", ".tar": "webdataset"}.get(suffix)  # type: ignore[return-value]


def _listing_digest(chosen: Format, options: dict[str, Any], files: list[Entry]) -> str:
    state = blake2b(repr((chosen, sorted(options.items()))).encode(), digest_size=16)
    for entry in files:
        state.update(f"{entry.name}\0{entry.size}\0{entry.stamp}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def described(listing: Listing) -> dict[str, Any]:
    """The manifest's fields that say where the images lie."""
    files = [] if listing.format == "folder" else listing.files
    return {
        "uri": listing.uri,
        "base": listing.store.uri,
        "format": listing.format,
        "options": listing.options,
        "sources": [entry.name for entry in files] or ["."],
        "stamps": [[entry.size, entry.stamp] for entry in files],
    }
