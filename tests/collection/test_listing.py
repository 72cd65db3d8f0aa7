"""What a listing finds, refuses and is named by."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hashdist.collection.listing import list_collection
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings
from tests.worlds.collection import jpeg


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: None, "found nothing there"),
        (lambda base: base.mkdir(), "found nothing there"),
        (lambda base: (base.mkdir(), (base / "a.txt").write_text("x")), r"found 1 x \.txt"),
        (lambda base: (base.mkdir(), (base / "a.tar.gz").write_text("x")), "unpack compressed tars first"),
        (
            lambda base: (base.mkdir(), (base / "a.jpg").write_text("x"), (base / "a.tar").write_text("x")),
            "found 1 for folder and 1 for webdataset; choose with --collection.format",
        ),
    ],
)
def test_missing_empty_and_mixed_collections_are_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "in")
    with pytest.raises(InvalidInput, match=message):
        list_collection(CollectionSettings(uri=str(tmp_path / "in")))


def test_no_uri_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"give --collection\.uri"):
        list_collection(CollectionSettings())


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", ".thumbnails/a.jpg", "__MACOSX/a.jpg", "x/B.JPEG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    listing = list_collection(CollectionSettings(uri=str(tmp_path)))
    assert [entry.name for entry in listing.files] == ["a.jpg", "x/B.JPEG"]


def test_listing_digest_follows_content_stamps_and_options(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    settings = CollectionSettings(uri=str(tmp_path))
    digest = list_collection(settings).digest
    assert list_collection(CollectionSettings(uri=tmp_path.as_uri())).digest == digest
    assert list_collection(CollectionSettings(uri=str(tmp_path), labels=False)).digest != digest
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert list_collection(settings).digest != digest
