"""Readers of the data sets' own layouts: small files of each, the real lists where they are, and refusals by line."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hashdist.collection.listing import list_collection
from hashdist.evaluation.datasets import convert, read_dataset
from hashdist.ground.errors import AlreadyExists, InvalidInput, NotFound
from hashdist.ground.settings import CollectionSettings

RNG = np.random.default_rng(0)
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# CIFAR-10


@pytest.fixture(params=["binary", "python 2", "python 3"])
def cifar(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder of six batches of 4 images, their labels [24] and pixels [24, 3072]."""
    labels, pixels = RNG.integers(0, 10, 24), RNG.integers(0, 256, (24, 3072), np.uint8)
    for number, name in enumerate(BATCHES):
        rows = slice(4 * number, 4 * number + 4)
        if request.param == "binary":
            both = np.concatenate([labels[rows, None].astype(np.uint8), pixels[rows]], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(both.tobytes())
        else:
            content = {b"batch_label": b"some batch", b"labels": labels[rows].tolist(), b"data": pixels[rows]}
            data = pickle.dumps(content, protocol=3)
            if request.param == "python 2":  # where numpy's modules still had their old names
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            (tmp_path / name).write_bytes(data)
    return tmp_path, labels, pixels


def test_cifar_batches_are_the_same_in_every_version(cifar: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, labels, _ = cifar
    data = read_dataset("cifar10", str(folder))
    assert data.keys[:2] == ["train/00000", "train/00001"]
    assert data.keys[-4:] == [f"test/0000{number}" for number in range(4)]
    assert data.parts == ["train"] * 20 + ["test"] * 4
    assert data.labels() == [[label] for label in labels]
    assert data.classes[3] == "cat"


def test_converted_cifar_is_a_collection_with_every_pixel(cifar: tuple[Path, np.ndarray, np.ndarray]) -> None:
    import pyarrow.parquet as pq

    folder, labels, pixels = cifar
    out = folder / "collection" / "cifar.parquet"
    assert convert("cifar10", str(folder), str(out)) == (24, 0)
    table = pq.read_table(out)
    assert table["labels"].to_pylist() == [[label] for label in labels]
    for image, expected in zip(table["image"].to_pylist(), pixels, strict=True):
        found = np.asarray(Image.open(io.BytesIO(image)))
        np.testing.assert_array_equal(found.transpose(2, 0, 1).ravel(), expected)
    assert list_collection(CollectionSettings(uri=str(out.parent))).format == "parquet"
    with pytest.raises(AlreadyExists):
        convert("cifar10", str(folder), str(out))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps({b"data": Evil()}), "found pathlib"),
        (pickle.dumps(print), "found builtins.print"),
        (pickle.dumps([1]), r"must hold `data` .* found \[\]"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}), "must hold `data` .* found "),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "1 images of 3072 bytes"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "found 10 in record 0"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}), "whole numbers, found str"),
        (b"\x80\x04garbage", "must be a batch of CIFAR-10's python version"),
        (b"", "must be a batch of CIFAR-10's python version"),
    ],
)
def test_a_pickle_can_hold_data_only(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(InvalidInput, match=said) as refused:
        read_dataset("cifar10", str(tmp_path))
    assert "data_batch_1" in str(refused.value)
    assert not Path("ran").exists()


def test_cifar_refusals(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="found neither"):
        read_dataset("cifar10", str(tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(InvalidInput, match="records of 3073 bytes, found 3072"):
        read_dataset("cifar10", str(tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
    with pytest.raises(NotFound, match=r"data_batch_2\.bin"):
        read_dataset("cifar10", str(tmp_path))


# Folders of images


def test_a_folder_names_parts_and_classes(tmp_path: Path) -> None:
    for name in (
        "train/dog/a.png",
        "train/cat/b.JPG",
        "test/dog/a.png",
        "validation/eel/x/c.png",
        "train/.hidden/d.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "README.txt").write_text("not an image")
    data = read_dataset("folder", str(tmp_path))
    assert data.keys == ["test/dog/a.png", "train/cat/b.JPG", "train/dog/a.png", "validation/eel/x/c.png"]
    assert data.parts == ["test", "train", "train", "val"]
    assert data.classes == ["cat", "dog", "eel"]
    assert data.labels() == [[1], [0], [1], [2]]
    (tmp_path / "stray.png").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"stray\.png: images must lie in train/CLASS"):
        read_dataset("folder", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="found none"):
        read_dataset("folder", str(tmp_path / "empty"))


# MIRFlickr


def mirflickr(folder: Path) -> Path:
    """Class c holds the images that c + 2 divides; the first 14 classes have an _r1 file with every second of them."""
    for number in range(24):
        members = list(range(number + 2, 25_001, number + 2))
        write(folder / f"class{number:02d}.txt", members)
        if number < 14:
            write(folder / f"class{number:02d}_r1.txt", members[::2])
    write(folder / "README.txt", ["v080"])
    return folder


def test_mirflickr_annotations(tmp_path: Path) -> None:
    folder = mirflickr(tmp_path)
    data = read_dataset("mirflickr24", str(folder))
    assert (len(data.keys), data.labels_NC.shape) == (25_000, (25_000, 24))
    assert data.keys[11] == "im12.jpg"
    assert data.labels()[11] == [0, 1, 2, 4, 10]  # 12 = 2 * 6 = 3 * 4 = 12
    assert data.labels()[0] == []
    more = read_dataset("mirflickr38", str(folder))
    assert more.labels_NC.shape == (25_000, 38)
    np.testing.assert_array_equal(more.labels_NC[:, :24], data.labels_NC)
    assert more.classes[24] == "class00_r1"
    assert more.labels()[1] == [0, 24]  # 2 is the first of class 0, and so in its _r1 too


def test_mirflickr_refusals(tmp_path: Path) -> None:
    folder = mirflickr(tmp_path)
    write(folder / "class03.txt", [5, 10, "", 25_001])
    with pytest.raises(InvalidInput, match=r"class03\.txt, line 4: an image number from 1 to 25000 .* found '25001'"):
        read_dataset("mirflickr24", str(folder))
    (folder / "class03.txt").unlink()
    with pytest.raises(InvalidInput, match=r"24 files .* 14 files .* found 23 and 14"):
        read_dataset("mirflickr24", str(folder))


# NUS-WIDE


def nuswide(folder: Path, flags_NC: np.ndarray) -> Path:
    names = [f"cat{row % 3}\\{row:04d}_1.jpg" for row in range(len(flags_NC))]
    write(folder / "ImageList" / "Imagelist.txt", names)
    for number, column in enumerate(flags_NC.T):
        write(folder / "Groundtruth" / "AllLabels" / f"Labels_c{number:02d}.txt", column.astype(int).tolist())
    return folder


def test_nuswide_takes_the_most_frequent_classes(tmp_path: Path) -> None:
    flags = RNG.random((60, 25)) < np.linspace(0.02, 0.2, 25)
    folder = nuswide(tmp_path, flags)
    whole, labelled = read_dataset("nuswide", str(folder)), read_dataset("nuswide21", str(folder))
    order = sorted(range(25), key=lambda number: (-flags[:, number].sum(), number))
    chosen = sorted(order[:21])
    assert whole.classes == [f"c{number:02d}" for number in chosen]
    np.testing.assert_array_equal(whole.labels_NC, flags[:, chosen])
    assert whole.keys[4] == "cat1/0004_1.jpg"
    rows = [row for row in range(60) if flags[row][chosen].any()]
    assert 0 < len(rows) < 60
    assert labelled.keys == [whole.keys[row] for row in rows]
    np.testing.assert_array_equal(labelled.labels_NC, flags[rows][:, chosen])


def test_nuswide_refusals(tmp_path: Path) -> None:
    folder = nuswide(tmp_path, np.ones((5, 21)))
    labels = folder / "Groundtruth" / "AllLabels" / "Labels_c20.txt"
    write(labels, [1, 0, 2, 0, 1])
    with pytest.raises(InvalidInput, match=r"Labels_c20\.txt, line 3: 0 or 1 is required, found '2'"):
        read_dataset("nuswide", str(folder))
    write(labels, [1] * 4)
    with pytest.raises(InvalidInput, match=r"Labels_c20\.txt must have a line per image .* 5, found 4"):
        read_dataset("nuswide", str(folder))
    labels.unlink()
    with pytest.raises(InvalidInput, match=r"at least 21 files .* found 20"):
        read_dataset("nuswide", str(folder))
    write(folder / "ImageList" / "Imagelist.txt", ["a.jpg", "a.jpg"])
    with pytest.raises(InvalidInput, match=r"Imagelist\.txt: .* 'a\.jpg' again as image 2"):
        read_dataset("nuswide", str(folder))


# 17 flowers


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    for number in range(1, 1361):
        (tmp_path / f"image_{number:04d}.jpg").write_bytes(b"")
    return tmp_path


def test_flowers_have_eighty_images_a_class(flowers: Path) -> None:
    data = read_dataset("flowers17", str(flowers))
    assert data.labels_NC.sum(0).tolist() == [80] * 17
    assert [data.labels()[row] for row in (0, 79, 80, 1359)] == [[0], [0], [1], [16]]
    assert set(data.parts) == {""}


def test_flowers_take_their_own_splits(flowers: Path) -> None:
    from scipy.io import savemat

    orders = [RNG.permutation(1360) + 1 for _ in range(3)]
    own: dict[str, Any] = {}
    for number, order in enumerate(orders, 1):
        own |= {f"trn{number}": order[:680], f"val{number}": order[680:1020], f"tst{number}": order[1020:]}
    savemat(flowers / "datasplits.mat", own)
    for seed in range(3):
        data = read_dataset("flowers17", str(flowers), seed)
        found = {part: [row + 1 for row, given in enumerate(data.parts) if given == part] for part in set(data.parts)}
        assert found["train"] == sorted(orders[seed][:680])
        assert found["val"] == sorted(orders[seed][680:1020])
        assert found["test"] == sorted(orders[seed][1020:])
    with pytest.raises(InvalidInput, match="seeds 0, 1 and 2, found seed 3"):
        read_dataset("flowers17", str(flowers), 3)
    savemat(flowers / "datasplits.mat", {**own, "val1": own["trn1"][:340]})
    with pytest.raises(InvalidInput, match=r"val1 must hold image numbers .* that no other set has"):
        read_dataset("flowers17", str(flowers))
    savemat(flowers / "datasplits.mat", {**own, "val1": []})
    with pytest.raises(InvalidInput, match="340 are in none"):
        read_dataset("flowers17", str(flowers))
    (flowers / "datasplits.mat").write_bytes(b"no matlab")
    with pytest.raises(InvalidInput, match="must be a MATLAB file"):
        read_dataset("flowers17", str(flowers))
    (flowers / "image_0007.jpg").unlink()
    with pytest.raises(NotFound, match=r"1360 images, found 1359, not image_0007\.jpg"):
        read_dataset("flowers17", str(flowers))


# Flag lists

PATHS = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="\\\x7f\x85\xa0\xad"), min_size=1
)


@given(st.data())
def test_flag_lists_are_read_as_they_are_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    keys = data.draw(st.lists(PATHS, min_size=1, max_size=8, unique=True))
    classes = data.draw(st.integers(0, 5))
    flags = [data.draw(st.lists(st.integers(0, 1), min_size=classes, max_size=classes)) for _ in keys]
    lines = [" ".join(map(str, [key, *row])) for key, row in zip(keys, flags, strict=True)]
    found = read_dataset("flags", str(write(tmp_path_factory.mktemp("flags") / "list.txt", lines)))
    assert found.keys == keys
    assert found.labels_NC.astype(int).tolist() == flags
    assert found.labels() == [[number for number, flag in enumerate(row) if flag] for row in flags]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a.jpg 0 1", "b.jpg 0"], r"list\.txt, line 2: a path and 2 flags, each 0 or 1 is required, found 'b\.jpg 0'"),
        (["a.jpg 0 1", "", "b.jpg 0 2"], "line 3"),
        (["my photo.jpg 0 1"], "line 1: a path and 3 flags"),
        (["a.jpg 1", "a.jpg 1"], "'a.jpg' again as image 2"),
        ([], "at least one line"),
    ],
)
def test_flag_list_refusals(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_dataset("flags", str(write(tmp_path / "list.txt", lines)))


def test_a_flag_list_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="must be a text file"):
        read_dataset("flags", str(tmp_path / "list.txt"))


def test_the_real_lists(shared_data: Path) -> None:
    """Counts of the published splits."""
    lists = {name: read_dataset("flags", str(shared_data / "labels" / f"{name}.txt")) for name in (
        "mirflickr_database", "mirflickr_train", "mirflickr_test", "nuswide21_train", "nuswide21_test")}  # fmt: skip
    assert [len(data.keys) for data in lists.values()] == [20_000, 4000, 1000, 10_500, 2100]
    assert [data.labels_NC.shape[1] for data in lists.values()] == [38, 38, 38, 21, 21]
    flickr = [key for name, data in lists.items() if name.startswith("mir") for key in data.keys]
    assert len(set(flickr)) == 25_000
    assert lists["nuswide21_train"].labels_NC.any(1).all()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"one of cifar10, folder, .* found 'imagenet'"):
        read_dataset("imagenet", str(tmp_path))
    with pytest.raises(NotFound, match="found nothing"):
        read_dataset("cifar10", str(tmp_path / "nowhere"))


def test_converted_lists_keep_labels_and_say_what_is_missing(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    source = write(tmp_path / "list.txt", ["a/1.png 1 0 1", "a/2.png 0 0 0"])
    (tmp_path / "a").mkdir()
    with pytest.raises(InvalidInput, match="found none of 2"):
        convert("flags", str(source), str(tmp_path / "out.parquet"), str(tmp_path))
    (tmp_path / "a" / "1.png").write_bytes(b"picture")
    assert convert("flags", str(source), str(tmp_path / "out.parquet"), str(tmp_path)) == (2, 1)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pydict() == {
        "id": ["a/1.png", "a/2.png"],
        "image": [b"picture", None],
        "labels": [[0, 2], []],
    }
