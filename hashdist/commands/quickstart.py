"""`hashdist quickstart`: real images through every stage on this machine, in minutes, without a network.

scikit-learn carries 1,797 handwritten digits of 8 x 8 pixels; they are written out as PNG files and then treated as
any collection would be. The last step is growth: images are added, changed and removed, and the index follows.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from hashdist.commands import report
from hashdist.ground.errors import AlreadyExists
from hashdist.ground.options import QuickstartOptions
from hashdist.ground.progress import say
from hashdist.ground.settings import Settings
from hashdist.index import Index, open_index
from hashdist.reindex import run as reindex_run
from hashdist.stages.cluster import session
from hashdist.stages.pipeline import Pipeline

_MARK = ".made-by-hashdist-quickstart"
_HELD_BACK, _CHANGED, _REMOVED = 60, 20, 20

OPTIONS = {"lr": 1e-3, "lambda_": 1.0, "epochs": 30}
"""DSAH on raw pixels of tiny images, found by trial on this very data set; the paper's values are for a VGG-19."""


def run(settings: Settings, options: QuickstartOptions) -> dict[str, Any]:
    """Images, all stages with DSAH, a search, an evaluation, a growth step and a report; returns the summary."""
    folder = Path(options.folder).resolve()
    _prepare(folder)
    seconds: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        outcome = step()
        seconds[name] = round(time.perf_counter() - started, 2)
        return outcome

    held_back = timed("images", lambda: write_digits(folder / "images"))
    settings = configured(settings, folder, options.seed)
    say("quickstart: no weights can be assumed here, so the features are raw pixels (the built-in `pixels` backbone)")
    started = time.perf_counter()
    with session.session(settings.cluster):
        seconds["ray"] = round(time.perf_counter() - started, 2)
        pipeline = Pipeline(settings)
        result = pipeline.run_all()
        seconds.update({name: round(stage["seconds"], 2) for name, stage in result["stages"].items()})
        evaluation = result["stages"]["evaluate"]
        index = open_index(settings.index.location(settings.root))
        timed("search", lambda: _search(index, "first version"))
        page = timed("report", lambda: report.write_page(pipeline, folder / "report.html", evaluation))
        grown = timed("growth", lambda: _grow(settings, folder / "images", held_back))
    map_all = {name: round(metrics["map_all_ties"], 4) for name, metrics in evaluation["by_method"].items()}
    summary = {
        "map_all": map_all,
        "features": "pixels (no weights)",
        "index": index.uri,
        "version": grown["version"],
        "growth": {name: grown[name] for name in ("added", "changed", "removed", "encoded")},
        "report": str(page),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
    }
    return {**summary, "text": _text(summary, settings)}


def write_digits(folder: Path) -> list[tuple[Path, NDArray[np.uint8]]]:
    """Write the digits as FOLDER/<class>/<number>.png, but for a few that are returned for the growth step."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    paths = [folder / str(label) / f"{number:04d}.png" for number, label in enumerate(digits.target)]
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for path, image in zip(paths[:-_HELD_BACK], pixels[:-_HELD_BACK], strict=True):
        Image.fromarray(image).save(path)
    return list(zip(paths[-_HELD_BACK:], pixels[-_HELD_BACK:], strict=True))


def configured(settings: Settings, folder: Path, seed: int) -> Settings:
    """The settings of the quickstart: 32 bits, the protocol `digits`, raw pixels, two training workers."""
    return replace(
        settings,
        root=(folder / "root").as_uri(),
        collection=replace(settings.collection, uri=(folder / "images").as_uri(), labels=True),
        features=replace(settings.features, backbone="pixels"),
        graph=replace(settings.graph, protocol="digits"),
        train=replace(settings.train, method="dsah", bits=32, seed=seed, workers=2, options=OPTIONS),
        index=replace(settings.index, name="digits"),
        evaluate=replace(settings.evaluate, protocol="digits", baselines=["itq", "lsh"]),
    )


def _prepare(folder: Path) -> None:
    """An empty folder; one that an earlier quickstart made is cleared, any other is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise AlreadyExists(f"the quickstart needs an empty folder, found files in {folder}; give another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _search(index: Index, what: str, key: str = "") -> None:
    """Search for one image by key and show what comes back."""
    key = key or next(iter(index.keys()))
    hits = index.search(index.codes_of([key]), k=5)
    found = ", ".join(f"{k} ({d})" for k, d in zip(hits.keys()[0], hits.distances[0], strict=True))
    say(f"search, {what}: {key} -> {found}")


def _grow(settings: Settings, images: Path, held_back: list[tuple[Path, NDArray[np.uint8]]]) -> dict[str, Any]:
    """Add the images that were held back, change and remove some, index again, search again."""
    there = sorted(images.rglob("*.png"))
    changed, removed = there[:_CHANGED], there[_CHANGED : _CHANGED + _REMOVED]
    for path in changed:
        Image.fromarray(np.roll(np.asarray(Image.open(path)), 1, axis=1)).save(path)
    for path in removed:
        path.unlink()
    for path, image in held_back:
        Image.fromarray(image).save(path)
    result = reindex_run.reindex(settings)
    index = open_index(result["index"])
    key = held_back[0][0].relative_to(images).as_posix()
    _search(index, f"version {index.version}, by an added image", key)
    return result


def _text(summary: dict[str, Any], settings: Settings) -> str:
    scores = "  ".join(f"{name.upper()} {score:.3f}" for name, score in summary["map_all"].items())
    grown = summary["growth"]
    slow = ", ".join(f"{name} {s:.1f}" for name, s in summary["seconds"].items())
    return "\n".join(
        [
            "",
            f"mAP@ALL, {settings.train.bits} bits, features = raw pixels (no weights here): {scores}",
            f"growth: {grown['added']} added, {grown['changed']} changed, {grown['removed']} removed; "
            f"{grown['encoded']} images encoded; the index is at version {summary['version']}",
            f"index:  {summary['index']}",
            f"report: {summary['report']}",
            f"seconds: {slow}",
        ]
    )
