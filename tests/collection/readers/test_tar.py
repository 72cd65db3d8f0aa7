"""WebDataset: samples of tars, broken ones, and images that are read together."""

import io
import tarfile
from pathlib import Path

import pytest

from hashdist.collection.collection import (
    Collection,
)
from hashdist.collection.readers import tar
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import CollectionSettings
from tests.worlds.collection import commit, everything, write_tars


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_samples_of_a_tar(tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "n" * 120
    members = {
        "a/0001.seg.png": b"mask",
        "a/0001.jpg": b"image-1",
        "a/0001.cls": b"7\n",
        "./a/0002.JPG": b"image-2",
        "a/0003.txt": b"words",
        "._a/0004.jpg": b"resource fork",
        f"{long}.webp": b"image-5" * 1000,
        "b.mask.png": b"only mask",
    }
    make_tar(tmp_path / "in" / "x.tar", members)
    target = commit(str(tmp_path / "root"), CollectionSettings(uri=str(tmp_path / "in"), part_rows=2))
    found = {image.key: image for image in everything(Collection(target))}
    assert {key: image.data for key, image in found.items()} == {
        "a/0001": b"image-1",
        "a/0002": b"image-2",
        "a/0003": None,
        long: b"image-5" * 1000,
        "b": b"only mask",
    }
    assert found["a/0001"].labels == [7]
    assert found["a/0002"].labels is None
    assert found["a/0003"].reason == "no-image: the sample has only txt"
    assert target.manifest()["classes"] == []


def test_a_truncated_tar_is_named(images: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    write_tars(tmp_path / "in", images)
    path = tmp_path / "in" / "1.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(
        InvalidInput, match=r"1\.tar must be a whole, uncompressed tar; reading it failed after 5 samples"
    ):
        commit(str(tmp_path / "root"), CollectionSettings(uri=str(tmp_path / "in")))


def test_neighbouring_images_are_read_together() -> None:
    megabyte = 1 << 20
    assert tar.spans([0], [5]) == [(0, 0)]
    assert tar.spans([0, 10, 20], [5, 5, 5]) == [(0, 2)]
    assert tar.spans([0, 10, 10 * megabyte], [5, 5, 5]) == [(0, 1), (2, 2)]
    many = [index * megabyte for index in range(20)]
    assert tar.spans(many, [megabyte] * 20) == [(0, 7), (8, 15), (16, 19)]
    assert tar.spans([0, 99 * megabyte], [99 * megabyte, 3]) == [(0, 0), (1, 1)]
