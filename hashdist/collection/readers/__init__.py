"""Formats of collections, one a file; a new format is one more file and its line here. Imports store and ground."""

from hashdist.collection.readers.folder import FolderReader
from hashdist.collection.readers.parquet import ParquetReader
from hashdist.collection.readers.reader import Reader
from hashdist.collection.readers.tar import TarReader

FORMATS: dict[str, type[Reader]] = {reader.format: reader for reader in (FolderReader, ParquetReader, TarReader)}
"""Every format by its name; in this order messages name them."""
