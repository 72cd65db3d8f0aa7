"""The papers' data sets in their own layouts: which images there are, with their labels and the parts they belong to.

A reader looks at names and lists, not at images, and returns a `Dataset`; keys are the images' paths, so they are
those of a collection made of the same folder. `convert` writes a data set as one parquet collection with its labels,
for layouts that the folder reader of collections cannot take labels from.

| layout | what lies there | labels |
|---|---|---|
| cifar10 | data_batch_1..5 and test_batch, `.bin` or python's | 10, one each |
| folder | train/CLASS/..., test/CLASS/..., maybe val/CLASS/... | folder names, one each |
| mirflickr24, mirflickr38 | annotations CLASS.txt, CLASS_r1.txt: an image number a line | the 24, or all 38 |
| nuswide | ImageList/Imagelist.txt, Groundtruth/AllLabels/Labels_CLASS.txt: a line an image | the 21 most frequent |
| nuswide21 | the same; only images that have one of these labels | the 21 most frequent |
| flowers17 | image_0001.jpg .. image_1360.jpg; maybe datasplits.mat there or one folder up | 17, 80 images each |
| flags | a file: a path a line, then a 0 or 1 for each class | those of the line |

Sources: Krizhevsky 2009 (CIFAR-10); Huiskes and Lew 2008 (MIRFlickr-25K, annotations v080); Chua et al. 2009
(NUS-WIDE); Nilsback and Zisserman 2006 (17 flowers).
"""

import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from hashdist.collection.decode import EXTENSIONS
from hashdist.ground.errors import AlreadyExists, InvalidInput, NotFound

_CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_CIFAR_BATCHES = [*(("train", f"data_batch_{number}") for number in range(1, 6)), ("test", "test_batch")]
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
_MIRFLICKR_IMAGES = 25_000
_MIRFLICKR_CLASSES = (24, 14)  # potential labels, and those of them that were judged again for relevance
_NUS_CLASSES = 21
_FLOWERS, _FLOWERS_PER_CLASS = 17, 80
_PARTS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Dataset:
    """The N images of a data set, as its own files describe them.

    Args:
        keys: [N], paths with `/`, distinct.
        labels_NC: bool [N, C].
        classes: [C], names.
        parts: [N], `train`, `test`, `val`, or empty.
    """

    keys: list[str]
    labels_NC: NDArray[np.bool_]
    classes: list[str]
    parts: list[str]

    def labels(self) -> list[list[int]]:
        """Numbers of each image's labels, ascending."""
        bounds = np.cumsum(self.labels_NC.sum(1))[:-1]
        return [found.tolist() for found in np.split(np.nonzero(self.labels_NC)[1], bounds)]


def read_dataset(layout: str, source: str, seed: int = 0) -> Dataset:
    """The data set at a folder or file in one of the layouts above.

    Args:
        layout: its name.
        source: local path.
        seed: which of a data set's own splits, where it has several (flowers17).

    Raises:
        InvalidInput: an unknown layout, or a file that is not as its layout says: with file, line, what was required
            and what was found. NotFound: a file is missing.
    """
    if layout not in LAYOUTS:
        raise InvalidInput(f"a layout is required, one of {', '.join(LAYOUTS)}, found {layout!r}")
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise NotFound(f"the layout {layout} needs its files, found nothing at {source!r}")
    return LAYOUTS[layout](path, seed)


# CIFAR-10


class _Batch(NamedTuple):
    """One file: labels uint8 [n], pixels uint8 [n, 3, 32, 32]."""

    part: str
    labels_n: NDArray[np.uint8]
    pixels_n3HW: NDArray[np.uint8]


def _cifar10(folder: Path, seed: int) -> Dataset:  # noqa: ARG001
    keys: list[str] = []
    parts: list[str] = []
    labels = []
    for part, labels_n, _ in _cifar_batches(folder):
        keys += _cifar_keys(part, parts.count(part), len(labels_n))
        parts += [part] * len(labels_n)
        labels.append(labels_n)
    return Dataset(keys, np.concatenate(labels)[:, None] == np.arange(10), _CIFAR_CLASSES, parts)


def _cifar_keys(part: str, first: int, count: int) -> list[str]:
    return [f"{part}/{number:05d}" for number in range(first, first + count)]


def _cifar_batches(folder: Path) -> Iterator[_Batch]:
    """The six files in order: binary ones if they are there, else python's."""
    for base in (folder / name for name in _CIFAR_FOLDERS):
        for suffix, read in ((".bin", _binary_batch), ("", _pickled_batch)):
            if (base / f"data_batch_1{suffix}").is_file():
                for part, name in _CIFAR_BATCHES:
                    yield _Batch(part, *read(_existing(base / f"{name}{suffix}")))
                return
    raise NotFound(f"{folder}: CIFAR-10 needs data_batch_1.bin or data_batch_1 (python), found neither")


def _binary_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % _CIFAR_RECORD:
        raise InvalidInput(f"{path} must hold records of {_CIFAR_RECORD} bytes, found {len(raw)} bytes; copy it again")
    records = raw.reshape(-1, _CIFAR_RECORD)
    return _cifar_checked(path, records[:, 0], records[:, 1:])


def _pickled_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        with path.open("rb") as file:
            found = _DataUnpickler(file, encoding="bytes").load()
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    except Exception as error:  # damaged pickles fail in any way
        raise InvalidInput(f"{path} must be a batch of CIFAR-10's python version, found {error!r}") from error
    found = {_text(name): value for name, value in found.items()} if isinstance(found, dict) else {}
    data, labels = found.get("data"), found.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or not isinstance(labels, list):
        raise InvalidInput(f"{path} must hold `data` (uint8 [n, 3072]) and `labels` (a list), found {sorted(found)}")
    if not all(isinstance(label, int) for label in labels):
        raise InvalidInput(f"{path}: labels must be whole numbers, found {next(map(type, labels)).__name__}")
    return _cifar_checked(path, np.array(labels, np.int64), data)


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _cifar_checked(
    path: Path, labels_n: NDArray[Any], pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if pixels.shape != (len(labels_n), _CIFAR_RECORD - 1):
        raise InvalidInput(f"{path} must hold {len(labels_n)} images of 3072 bytes, found an array {pixels.shape}")
    wrong = np.flatnonzero((labels_n < 0) | (labels_n > 9))
    if len(wrong):
        raise InvalidInput(f"{path}: labels must lie between 0 and 9, found {labels_n[wrong[0]]} in record {wrong[0]}")
    return labels_n.astype(np.uint8), pixels.reshape(-1, 3, 32, 32)


class _DataUnpickler(pickle.Unpickler):
    """Numpy arrays, bytes, numbers, lists and dictionaries: nothing else is looked up, so nothing else can run."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
            ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        }
        if (module, name) not in allowed:
            raise InvalidInput(f"a pickle of numpy arrays, lists and dictionaries is required, found {module}.{name}")
        return allowed[module, name]


_RECONSTRUCT = np.empty(0).__reduce__()[0]
"""The function that pickles of numpy call to make an empty array."""


# Folders of images


def _image_folder(folder: Path, seed: int) -> Dataset:  # noqa: ARG001
    """train/CLASS/..., test/CLASS/...: classes numbered by name."""
    keys, names, parts = [], [], []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).parts
        if path.suffix.lower() not in EXTENSIONS or any(name.startswith(".") for name in place):
            continue
        if len(place) < 3 or place[0] not in _PARTS:
            raise InvalidInput(
                f"{path}: images must lie in train/CLASS, test/CLASS or val/CLASS below {folder}, found one in "
                f"{'/'.join(place[:-1]) or 'the folder itself'}; move it there, or give the folder above"
            )
        keys.append("/".join(place))
        names.append(place[1])
        parts.append(_PARTS[place[0]])
    if not keys:
        raise InvalidInput(f"{folder}: images are required in train/CLASS and test/CLASS, found none")
    classes = sorted(set(names))
    return Dataset(keys, np.array(names)[:, None] == np.array(classes), classes, parts)


# MIRFlickr-25K


def _mirflickr(relevant: bool) -> Callable[[Path, int], Dataset]:
    def read(folder: Path, seed: int) -> Dataset:  # noqa: ARG001
        files = {path.stem: path for path in sorted(folder.glob("*.txt")) if path.stem.lower() != "readme"}
        again = [name for name in files if name.endswith("_r1")]
        first = [name for name in files if name not in again]
        if (len(first), len(again)) != _MIRFLICKR_CLASSES:
            raise InvalidInput(
                f"{folder} must hold MIRFlickr's annotations, 24 files CLASS.txt and 14 files CLASS_r1.txt, found "
                f"{len(first)} and {len(again)}"
            )
        classes = first + again if relevant else first
        labels_NC = np.zeros((_MIRFLICKR_IMAGES, len(classes)), np.bool_)
        for number, name in enumerate(classes):
            labels_NC[_image_numbers(files[name]) - 1, number] = True
        keys = [f"im{number}.jpg" for number in range(1, _MIRFLICKR_IMAGES + 1)]
        return Dataset(keys, labels_NC, classes, [""] * len(keys))

    return read


def _image_numbers(path: Path) -> NDArray[np.int64]:
    found = []
    for number, line in _lines(path):
        if not line.isdecimal() or not 1 <= int(line) <= _MIRFLICKR_IMAGES:
            raise _wrong(path, number, f"an image number from 1 to {_MIRFLICKR_IMAGES}", line)
        found.append(int(line))
    return np.array(found, np.int64)


# NUS-WIDE


def _nuswide(labelled: bool) -> Callable[[Path, int], Dataset]:
    def read(folder: Path, seed: int) -> Dataset:  # noqa: ARG001
        names = _existing(folder / "ImageList" / "Imagelist.txt")
        keys = [line.replace("\\", "/") for _, line in _lines(names)]
        _check_distinct(names, keys)
        files = sorted((folder / "Groundtruth" / "AllLabels").glob("Labels_*.txt"))
        if len(files) < _NUS_CLASSES:
            raise InvalidInput(
                f"{folder}: NUS-WIDE needs at least {_NUS_CLASSES} files Groundtruth/AllLabels/Labels_CLASS.txt, found "
                f"{len(files)}"
            )
        columns_CN = np.stack([_flag_column(path, len(keys)) for path in files])
        frequent = np.sort(np.argsort(-columns_CN.sum(1), kind="stable")[:_NUS_CLASSES])
        labels_NC = columns_CN[frequent].T
        keep = np.flatnonzero(labels_NC.any(1)) if labelled else np.arange(len(keys))
        chosen = [keys[row] for row in keep]
        classes = [files[number].stem.removeprefix("Labels_") for number in frequent]
        return Dataset(chosen, np.ascontiguousarray(labels_NC[keep]), classes, [""] * len(chosen))

    return read


def _flag_column(path: Path, rows: int) -> NDArray[np.bool_]:
    words = path.read_bytes().split()
    if len(words) != rows:
        raise InvalidInput(f"{path} must have a line per image of ImageList/Imagelist.txt, {rows}, found {len(words)}")
    if not set(words) <= {b"0", b"1"}:
        line = next(number for number, word in enumerate(words) if word not in (b"0", b"1"))
        raise _wrong(path, line + 1, "0 or 1", _text(words[line]))
    return np.fromiter((word == b"1" for word in words), np.bool_, rows)


# Oxford's 17 flowers


def _flowers17(folder: Path, seed: int) -> Dataset:
    count = _FLOWERS * _FLOWERS_PER_CLASS
    keys = [f"image_{number:04d}.jpg" for number in range(1, count + 1)]
    missing = [key for key in keys if not (folder / key).is_file()]
    if missing:
        raise NotFound(f"{folder}: 17 flowers has {count} images, found {count - len(missing)}, not {missing[0]}")
    labels_NC = np.arange(count)[:, None] // _FLOWERS_PER_CLASS == np.arange(_FLOWERS)
    splits = [path for path in (folder / "datasplits.mat", folder.parent / "datasplits.mat") if path.is_file()]
    parts = _own_flower_split(splits[0], seed, count) if splits else [""] * count
    return Dataset(keys, labels_NC, [f"flower-{number + 1}" for number in range(_FLOWERS)], parts)


def _own_flower_split(path: Path, seed: int, count: int) -> list[str]:
    """Its splits 1, 2 and 3 are those of the seeds 0, 1 and 2."""
    from scipy.io import loadmat

    if not 0 <= seed <= 2:
        raise InvalidInput(f"{path} has the splits of the seeds 0, 1 and 2, found seed {seed}; use one of them")
    try:
        found = loadmat(path, variable_names=[f"{part}{seed + 1}" for part in ("trn", "tst", "val")])
    except Exception as error:  # scipy has no one error for damaged files
        raise InvalidInput(f"{path} must be a MATLAB file, found {error!r}; copy it again") from error
    parts = [""] * count
    for name, part in (("trn", "train"), ("tst", "test"), ("val", "val")):
        numbers = np.asarray(found.get(f"{name}{seed + 1}", ())).ravel()
        for number in numbers.tolist():
            if number != int(number) or not 1 <= number <= count or parts[int(number) - 1]:
                raise InvalidInput(
                    f"{path}: {name}{seed + 1} must hold image numbers from 1 to {count} that no other set has, found "
                    f"{number}"
                )
            parts[int(number) - 1] = part
    if "" in parts:
        raise InvalidInput(
            f"{path}: trn{seed + 1}, tst{seed + 1} and val{seed + 1} must name all {count} images, "
            f"{parts.count('')} are in none of them"
        )
    return parts


# A path, then 0/1 flags


def _flags(path: Path, seed: int = 0) -> Dataset:  # noqa: ARG001
    keys: list[str] = []
    rows: list[list[str]] = []
    for number, line in _lines(path):
        key, *flags = line.split()
        width = len(rows[0]) if rows else len(flags)
        if len(flags) != width or not set(flags) <= {"0", "1"}:
            raise _wrong(path, number, f"a path and {width} flags, each 0 or 1", line)
        keys.append(key.replace("\\", "/"))
        rows.append(flags)
    if not keys:
        raise InvalidInput(f"{path}: at least one line `path 0 1 ...` is required, found none")
    _check_distinct(path, keys)
    labels_NC = np.array(rows, dtype=str).reshape(len(rows), -1) == "1"
    return Dataset(keys, labels_NC, [str(label) for label in range(labels_NC.shape[1])], [""] * len(keys))


LAYOUTS: dict[str, Callable[[Path, int], Dataset]] = {
    "cifar10": _cifar10,
    "folder": _image_folder,
    "mirflickr24": _mirflickr(relevant=False),
    "mirflickr38": _mirflickr(relevant=True),
    "nuswide": _nuswide(labelled=False),
    "nuswide21": _nuswide(labelled=True),
    "flowers17": _flowers17,
    "flags": _flags,
}
"""Readers of each layout: (path, seed) -> Dataset."""


# Files and lines


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NotFound(f"{path} is required, found no such file; copy the data set again")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines that are not empty."""
    try:
        text = _existing(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} must be a text file, found {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _wrong(path: Path, line: int, required: str, found: str) -> InvalidInput:
    shown = found if len(found) <= 80 else f"{found[:77]}..."
    return InvalidInput(f"{path}, line {line}: {required} is required, found {shown!r}")


def _check_distinct(path: Path, keys: list[str]) -> None:
    seen: set[str] = set()
    for number, key in enumerate(keys, 1):
        if key in seen:
            raise InvalidInput(f"{path}: every image must be listed once, found {key!r} again as image {number}")
        seen.add(key)


# Conversion


class Converted(NamedTuple):
    """Images that `convert` wrote, and how many of them have no bytes because their file is missing."""

    rows: int
    missing: int


def convert(layout: str, source: str, out: str, images: str = "", seed: int = 0) -> Converted:
    """Write a data set as a parquet collection: id, image (encoded), labels; class names in the metadata.

    An image whose file is missing is a row without bytes, which a collection lists as unreadable.

    Args:
        layout: see `read_dataset`.
        source: likewise.
        out: parquet file to write, local.
        images: folder that keys are relative to; empty = the source. CIFAR-10 has its images in its batches.
        seed: see `read_dataset`.

    Raises:
        InvalidInput, NotFound: as `read_dataset`; no image at all. AlreadyExists: `out` is there.
    """
    data = read_dataset(layout, source, seed)
    target = Path(out).expanduser()
    if target.exists():
        raise AlreadyExists(f"{target} is there already; choose another name")
    folder = Path(images or source).expanduser()
    encoded = _cifar_images(Path(source)) if layout == "cifar10" else (_bytes(folder / key) for key in data.keys)
    missing = _write_collection(target, data, encoded)
    if missing == len(data.keys):
        target.unlink()
        raise InvalidInput(f"images are required in {folder}, found none of {missing} (the first: {data.keys[0]})")
    return Converted(len(data.keys), missing)


def _write_collection(target: Path, data: Dataset, encoded: Iterable[bytes | None]) -> int:
    keys, labels = data.keys, data.labels()
    kinds = [("id", pa.string()), ("image", pa.binary()), ("labels", pa.list_(pa.int32()))]
    schema = pa.schema(kinds, metadata={"classes": json.dumps(data.classes)})
    stream = iter(encoded)
    missing = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(target, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, len(keys), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(keys))
            batch = [next(stream) for _ in range(start, stop)]
            missing += batch.count(None)
            writer.write_table(pa.table([keys[start:stop], batch, labels[start:stop]], schema=schema))
    return missing


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _cifar_images(folder: Path) -> Iterator[bytes]:
    """Every image as PNG, which loses nothing."""
    for batch in _cifar_batches(folder):
        for pixels_3HW in batch.pixels_n3HW:
            sink = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels_3HW.transpose(1, 2, 0))).save(sink, "PNG")
            yield sink.getvalue()
