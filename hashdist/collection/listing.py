"""A listing of a collection: names, sizes and stamps by LIST, the format, and the digest that names the artefact."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any

from hashdist.collection.decode import EXTENSIONS
from hashdist.collection.readers import FORMATS
from hashdist.collection.readers.reader import is_hidden
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings
from hashdist.store import Entry, Store, open_store


@dataclass(frozen=True)
class Listing:
    """The files of a collection as they are now; no image has been read.

    Args:
        uri: canonical.
        format: of the files, a name in FORMATS.
        store: the folder that names are relative to.
        files: those of the format, sorted by name.
        options: the settings that its reader takes.
        digest: of the format, the options, and the names, sizes and stamps of the files.
    """

    uri: str
    format: str
    store: Store
    files: list[Entry]
    options: dict[str, Any]
    digest: str


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


def reading_options(settings: CollectionSettings, chosen: str) -> dict[str, Any]:
    """The settings that the reader of a format takes."""
    return {name: getattr(settings, name) for name in FORMATS[chosen].options}


def named_store(settings: CollectionSettings) -> Store:
    """The store at the collection's URI. Raises InvalidInput where there is none, or for an unknown format."""
    if not settings.uri:
        raise InvalidInput(
            f"a collection is required (a folder of {_plurals()}, local or s3://), found none; give --collection.uri"
        )
    if settings.format not in ("auto", *FORMATS):
        raise InvalidInput(
            f"the format of a collection must be auto or one of {', '.join(FORMATS)}, found {settings.format!r}; "
            "choose with --collection.format"
        )
    return open_store(settings.uri)


def split_file(store: Store) -> tuple[Store, str]:
    """The folder and the file name, if the URI is one of a single file."""
    folder, name = store.as_file()
    return (folder, name) if PurePosixPath(name).suffix else (store, "")


def kinds_of(files: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Files by the format that their extension tells, those of none left out."""
    kinds: dict[str, list[Entry]] = {name: [] for name in FORMATS}
    by_extension = {extension: kinds[name] for name, reader in FORMATS.items() for extension in reader.extensions}
    for entry in files:
        name = entry.name
        suffix = name[name.rfind(".") :].lower() if "." in name else ""  # there may be 10**9 names: no path objects
        if suffix in by_extension:
            by_extension[suffix].append(entry)
    return kinds


def chosen_format(uri: str, counts: Counter[str], others: Iterable[Entry], settings: CollectionSettings) -> str:
    """The format of a collection, given how many files of each format there are.

    Args:
        uri: of the collection.
        counts: files by format.
        others: some of the files, for the message where none is of a format.
        settings: of the collection.

    Raises InvalidInput unless the files are of one format.
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
    needed = _plurals() if wanted == "auto" else f"files of the format {wanted!r}"
    advice = "; unpack compressed tars first" if any(s in seen for s in (".gz", ".tgz", ".zst", ".bz2", ".xz")) else ""
    raise InvalidInput(
        f"{uri}: {needed} are required, found {met or 'nothing there'}{advice}; check --collection.uri "
        f"(images are recognised by extension: {' '.join(sorted(EXTENSIONS))})"
    )


def _plurals() -> str:
    *others, last = (reader.plural for reader in FORMATS.values())
    return f"{', '.join(others)} or {last}"


def _listing_digest(chosen: str, options: dict[str, Any], files: list[Entry]) -> str:
    state = blake2b(repr((chosen, sorted(options.items()))).encode(), digest_size=16)
    for entry in files:
        state.update(f"{entry.name}\0{entry.size}\0{entry.stamp}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def manifest_fields(listing: Listing) -> dict[str, Any]:
    """Fields of a collection's manifest that say where its images lie."""
    files = [] if FORMATS[listing.format].files_are_images else listing.files
    return {
        "uri": listing.uri,
        "base": listing.store.uri,
        "format": listing.format,
        "options": listing.options,
        "sources": [entry.name for entry in files] or ["."],
        "stamps": [[entry.size, entry.stamp] for entry in files],
    }
