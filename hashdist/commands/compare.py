"""compare: methods x code lengths x seeds on one protocol, a committed record per cell, tables and figures of them all.

A cell is a pure function of (features, protocol, method, its settings, bits, seed), and its record carries the digest
of these as its name: a comparison that was stopped, or one that asks for more, computes only what is missing, and
several processes may share the work (`--part`). With one worker everything runs in this process (experiment.py); with
more, and in images mode, deep methods go through the same stages as `hashdist pipeline`, on Ray Train.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from hashdist.evaluation import classification, figures, measure
from hashdist.evaluation.experiment import Corpus, Experiment, Fitted, Recipe, read_corpus
from hashdist.evaluation.measure import Cuts
from hashdist.evaluation.protocols import identity as protocol_identity
from hashdist.evaluation.protocols import needs_labels
from hashdist.ground.bits import check_bits
from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import CompareOptions
from hashdist.ground.progress import say
from hashdist.ground.schema import from_vectors
from hashdist.ground.settings import Settings
from hashdist.methods.contract import find_method, settings_text
from hashdist.models.checkpoints import finite
from hashdist.stages.cluster import session
from hashdist.stages.features import KIND as FEATURES
from hashdist.stages.pipeline import Pipeline, upstream
from hashdist.store import open_store
from hashdist.store.commit import create_record, digest, open_artefact, read_record
from hashdist.store.vectors import read_vectors

REVISION = 1

_KEYS = ("name", "bits", "seed")
_LONG = ("curves", "history", "rounds", "watched")  # what fills curves.json, apart from the cells
_VARIANT = {"method", "preset", "options", "graph"}


def run(settings: Settings, options: CompareOptions) -> dict[str, Any]:
    """Compute the cells that have no record yet, then write the tables and figures of all.

    Raises:
        InvalidInput: an unknown method, preset, option, protocol, published table or code length, or no features;
            all of it before the first cell.
    """
    entries = read_entries(options, settings.train.mode)
    _check(settings, options, entries)
    settings = _with_features(settings)
    corpus = read_corpus(open_artefact(settings.features.snapshot, FEATURES), options.drop_labels)
    cells = list(_cells(settings, options, entries, corpus))
    store = open_store(settings.root).child("compare")
    share, of = _part(options.part)
    missing = list({cell.record: cell for cell in cells if not store.exists(cell.record)}.values())
    say(f"compare: {len(cells)} cells, {len(missing)} to compute" + (f", part {options.part}" if options.part else ""))
    lab, todo = _Lab(settings, options, corpus), missing[share::of]
    on_ray = _on_ray(settings) and any(cell.entry.deep for cell in todo)
    with session.session(settings.cluster) if on_ray else nullcontext():  # one session for all cells
        for number, cell in enumerate(todo):
            row = lab.compute(cell)
            create_record(store, cell.record, finite(row))
            say(f"compare: {number + 1}/{len(todo)} {_line(settings, row)}")
    done = [cell for cell in cells if store.exists(cell.record)]
    rows = [{**read_record(store, cell.record), "name": cell.entry.name} for cell in done]
    return _write(settings, options, rows, len(cells))


# What is compared


def read_entries(options: CompareOptions, mode: str = "frozen") -> list[Recipe]:
    """The rows of a comparison, methods first, then variants. Raises InvalidInput.

    A method is written `name` or `name:preset`; without a preset it is `frozen` in frozen mode where the method has
    that one, else `paper`. A variant is a mapping with `method` and any of `preset`, `options` and `graph`.
    """
    found = []
    for text in options.methods:
        name, _, preset = text.partition(":")
        found.append(Recipe(text, name, preset or _preset(name, mode)))
    for name, given in options.variants.items():
        if not isinstance(given, Mapping) or "method" not in given or set(given) - _VARIANT:
            raise InvalidInput(
                f"variant {name} must be a mapping with `method` and any of preset, options and graph, found {given}"
            )
        preset = given.get("preset") or _preset(given["method"], mode)
        found.append(Recipe(name, given["method"], preset, given.get("options", {}), given.get("graph", {})))
    names = [entry.name for entry in found]
    if not found or len(set(names)) < len(names):
        raise InvalidInput(f"a comparison needs methods or variants of different names, found {', '.join(names) or 0}")
    for entry in found:
        entry.settings()
    return found


def _preset(method: str, mode: str) -> str:
    presets = getattr(find_method(method), "PRESETS", {})
    return "frozen" if mode == "frozen" and "frozen" in presets else "paper"


@cache
def published() -> dict[str, dict[str, Any]]:
    """The papers' own tables, by name."""
    text = resources.files("hashdist.commands").joinpath("published.yaml").read_text()
    tables: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return tables


@dataclass(frozen=True)
class Cell:
    """One cell: what is fitted, with how many bits, under which split."""

    entry: Recipe
    bits: int
    seed: int
    record: str


def _cells(settings: Settings, options: CompareOptions, entries: list[Recipe], corpus: Corpus) -> Iterator[Cell]:
    """Seed by seed, so that a split and its graphs are made once."""
    wanted = settings.evaluate
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for bits in options.bits:
            for entry in entries:
                graph = replace(settings.graph, **entry.graph).identity() if entry.rule() != "none" else {}
                identity = {
                    "revision": REVISION,
                    "corpus": corpus.name,
                    "protocol": protocol_identity(wanted.protocol),
                    "cuts": [wanted.cut, wanted.precision_at, wanted.recall_at],
                    "method": entry.method,
                    "settings": settings_text(entry.settings()) if entry.deep else "",
                    "graph": graph,
                    "mode": settings.train.mode if entry.deep else "frozen",
                    "bits": bits,
                    "seed": seed,
                    "watch": options.watch if entry.deep else 0,
                    **({"svm": True} if options.svm else {}),
                    "salt": settings.fresh,
                }
                yield Cell(entry, bits, seed, f"cells/{digest(identity)}.json")


def _check(settings: Settings, options: CompareOptions, entries: list[Recipe]) -> None:
    for bits in options.bits:
        check_bits(bits)
    if not options.bits or options.seeds < 1:
        raise InvalidInput(f"at least one code length and one seed are needed, found {options.bits}, {options.seeds}")
    if not settings.evaluate.protocol:
        raise InvalidInput("a comparison needs a protocol, found none; give --evaluate.protocol, as uniform:1000:4000")
    needs_labels(settings.evaluate.protocol)  # an unknown one is refused here
    unknown = sorted(set(options.published) - set(published()))
    if unknown:
        raise InvalidInput(f"no published table {', '.join(unknown)}; there are {', '.join(published())}")
    if options.drop_labels and _on_ray(settings) and any(entry.deep for entry in entries):
        raise InvalidInput(
            "drop_labels works in process only, found more than one worker or images mode; use one worker"
        )
    _part(options.part)


def _part(text: str) -> tuple[int, int]:
    """Which of the missing cells are this process's: (first, step)."""
    if not text:
        return 0, 1
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return int(number) - 1, int(of)
    raise InvalidInput(f"part must be written I/N with 1 <= I <= N, found {text!r}")


def _with_features(settings: Settings) -> Settings:
    """The settings with collection and features named by URI, so that no cell looks for them again.

    Features that are not committed yet are extracted.
    """
    if not settings.root:
        raise InvalidInput("a root is required, found none; give --root FOLDER or --root s3://bucket/prefix")
    pipeline = Pipeline(settings)
    needed = [*upstream("features", settings), "features"]
    if not all(pipeline.artefact(stage).exists() for stage in needed):  # a later one is named by the earlier
        with session.observed_session(settings):
            pipeline.run("features")
    for stage in needed:
        named = replace(getattr(settings, stage), snapshot=pipeline.artefact(stage).uri)
        settings = replace(settings, **{stage: named})
    return settings


# How a cell is computed


class _Lab:
    """Computes cells, keeping the split and graphs of the seed at hand."""

    def __init__(self, settings: Settings, options: CompareOptions, corpus: Corpus) -> None:
        self._settings, self._options, self._corpus = settings, options, corpus
        self._current: Experiment | None = None

    def compute(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell."""
        experiment = self._experiment(cell.seed)
        entry = cell.entry
        on_ray = entry.deep and _on_ray(self._settings)
        fitted = self._on_ray(cell) if on_ray else experiment.fit(entry, cell.bits, self._options.watch)
        graph = {} if on_ray or not entry.deep else experiment.graph(entry)[1]
        measured = experiment.measure(fitted.codes)
        if self._options.svm:
            measured["metrics"] |= experiment.classify(fitted.codes)
        return {
            "name": entry.name,
            "method": entry.method,
            "preset": entry.preset if entry.deep else "",
            "settings": asdict(entry.settings()) if entry.deep else {},
            "options": dict(entry.options),
            "graph": graph,
            "bits": cell.bits,
            "seed": cell.seed,
            "protocol": self._settings.evaluate.protocol,
            "split": experiment.split.digest(),
            "sizes": [len(experiment.split.query), len(experiment.split.train), len(experiment.split.database)],
            "features": self._corpus.name,
            **measured,
            "seconds": fitted.seconds,
            "threads": self._settings.train.threads,
            "workers": self._settings.train.workers if on_ray else 1,
            "history": _by_term(fitted.history),
            "rounds": fitted.rounds,
            "watched": fitted.curve,
        }

    def _experiment(self, seed: int) -> Experiment:
        if self._current is None or self._current.seed != seed:
            wanted = self._settings.evaluate
            self._current = Experiment(
                self._corpus,
                wanted.protocol,
                seed,
                self._settings.graph,
                cuts=Cuts.of(wanted),
                threads=self._settings.train.threads,
            )
        return self._current

    def _on_ray(self, cell: Cell) -> Fitted:
        """Graph, training and codes by the stages, on Ray Train."""
        entry, settings = cell.entry, self._settings
        protocol = settings.evaluate.protocol
        settings = replace(
            settings,
            graph=replace(settings.graph, **{**entry.graph, "protocol": protocol, "protocol_seed": cell.seed}),
            train=replace(
                settings.train,
                method=entry.method,
                preset=entry.preset,
                options=dict(entry.options),
                bits=cell.bits,
                seed=cell.seed,
            ),
        )
        if find_method(entry.method).USES == "labels":
            settings = replace(settings, graph=replace(settings.graph, labelled=True))
        pipeline = Pipeline(settings)
        with session.observed_session(settings):
            results = {stage: pipeline.run(stage) for stage in ("graph", "train", "encode")}
        table = read_vectors(pipeline.artefact("encode"), ["code"], self._corpus.ids)
        codes: NDArray[Any] = from_vectors(table["code"], table.schema)
        manifest = pipeline.artefact("train").manifest()
        seconds = {
            "graph": results["graph"]["seconds"],
            "fit": manifest["seconds"],
            "encode": results["encode"]["seconds"],
        }
        return Fitted(np.asarray(codes, np.uint8), seconds, manifest["history"], manifest["rounds"])


def _on_ray(settings: Settings) -> bool:
    return settings.train.workers > 1 or settings.train.mode == "images"


def _by_term(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Loss terms over epochs."""
    skipped = ("seconds", "images_per_s", "epoch", "round", "step", "steps")
    terms = [k for k, v in (history[0] if history else {}).items() if isinstance(v, float) and k not in skipped]
    return {term: [round(float(epoch[term]), 8) for epoch in history] for term in terms}


def _line(settings: Settings, row: Mapping[str, Any]) -> str:
    metric = next(iter(_metrics(settings, [row])))
    value = row["metrics"][metric]
    return f"{row['name']} {row['bits']} bits seed {row['seed']}: {metric} {value:.4f}, {row['seconds']['fit']:.1f} s"


# Tables and figures


def _metrics(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that tables show, the main one first."""
    names = [*measure.tables(Cuts.of(settings.evaluate)), *classification.METRICS]
    return [name for name in names if rows and name in rows[0]["metrics"]]


def _write(settings: Settings, options: CompareOptions, rows: list[dict[str, Any]], cells: int) -> dict[str, Any]:
    metrics = _metrics(settings, rows)
    tables = {metric: table(rows, metric, _papers(options, metric)) for metric in metrics}
    text = "\n\n".join(f"### {metric}\n\n{text}" for metric, text in tables.items())
    result = {"command": "compare", "cells": cells, "done": len(rows), "protocol": settings.evaluate.protocol}
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cells.json").write_text(_compact(rows, lambda name: name not in _LONG))
        (folder / "curves.json").write_text(_compact(rows, lambda name: name in _LONG or name in _KEYS))
        about = f"{_about(settings, rows, cells)}\n\n{text}\n\n### Seconds to fit, and codes\n\n{_costs(rows)}\n"
        (folder / "table.md").write_text(about)
        _draw(folder, rows, metrics[0], _papers(options, metrics[0]))
        result["out"] = str(folder.absolute())
    return {**result, "rows": [_short(row) for row in rows], "text": f"{_about(settings, rows, cells)}\n\n{text}"}


def table(rows: Sequence[Mapping[str, Any]], metric: str, papers: Mapping[str, Mapping[int, float]]) -> str:
    """Markdown: methods down, code lengths across, mean and spread (n - 1) over seeds, the papers' own numbers last."""
    lengths = sorted({row["bits"] for row in rows})
    printed = sorted({bits for values in papers.values() for bits in values})
    head = ["method", *(f"{bits} bits" for bits in lengths), *(f"paper {bits}" for bits in printed)]
    lines = [head, ["---"] * len(head)]
    for name, by_bits in grouped(rows, metric).items():
        paper = papers.get(name.partition(":")[0], {})
        own = [_mean(by_bits.get(bits, [])) for bits in lengths]
        lines.append([name, *own, *(f"{paper[bits]:.3f}" if bits in paper else "" for bits in printed)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def grouped(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[int, list[float]]]:
    """method -> bits -> values over seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found.setdefault(row["name"], {}).setdefault(row["bits"], []).append(row["metrics"][metric])
    return found


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: per method, seconds to fit at the longest code, and its statistics."""
    longest = max((row["bits"] for row in rows), default=0)
    lines = [
        ["method", "preset", "graph s", "fit s", "imbalance", "entropy", "correlation", "distinct codes"],
        ["---"] * 8,
    ]
    for name in grouped(rows, next(iter(rows[0]["metrics"]))) if rows else []:
        own = [row for row in rows if row["name"] == name and row["bits"] == longest]
        if own:
            seconds = [f"{np.mean([row['seconds'].get(part, 0.0) for row in own]):.1f}" for part in ("graph", "fit")]
            codes = [
                f"{np.mean([row['codes'][part] for row in own]):.3f}"
                for part in ("imbalance", "entropy", "correlation", "distinct")
            ]
            lines.append([name, own[0]["preset"], *seconds, *codes])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _papers(options: CompareOptions, metric: str) -> dict[str, dict[int, float]]:
    """The papers' numbers in this metric: method -> bits -> value."""
    found: dict[str, dict[int, float]] = {}
    for name in options.published:
        given = published()[name]
        if given["metric"] == metric:
            for method, values in given["methods"].items():
                known = {b: v for b, v in zip(given["bits"], values, strict=True) if v is not None}
                found.setdefault(method, {}).update(known)
    return found


def _about(settings: Settings, rows: Sequence[Mapping[str, Any]], cells: int) -> str:
    first = rows[0] if rows else {"sizes": ["?"] * 3, "features": "?", "threads": "?"}
    query, train, database = first["sizes"]
    seeds = sorted({row["seed"] for row in rows})
    splits = len({row["split"] for row in rows})
    return (
        f"Protocol {settings.evaluate.protocol}: {query} queries, {train} training images, {database} in the database; "
        f"seeds {', '.join(map(str, seeds))} ({splits} splits); mode {settings.train.mode}; "
        f"features {first['features']}; {len(rows)} of {cells} cells."
    )


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its curves and histories, for stdout."""
    return {name: row[name] for name in ("name", "method", "preset", "bits", "seed", "metrics", "seconds", "codes")}


def _compact(rows: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> str:
    """JSON with one row a line, of the fields that are wanted, rounded to what is meaningful."""
    lines = (json.dumps(_round({k: v for k, v in row.items() if k != "write_id" and wanted(k)})) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, list) else value


def _draw(folder: Path, rows: Sequence[Mapping[str, Any]], metric: str, papers: Mapping[str, Any]) -> None:
    """mAP over bits, and at each length precision-recall, precision@N and, where watched, the metric over epochs."""
    figures.save(figures.map_over_bits(grouped(rows, metric), papers, ylabel=metric), folder, "map_over_bits")
    for bits in sorted({row["bits"] for row in rows}):
        own = [row for row in rows if row["bits"] == bits and row["curves"]]
        by_name: dict[str, list[Mapping[str, Any]]] = {}
        for row in own:
            by_name.setdefault(row["name"], []).append(row)
        radius = {n: tuple(_average(v, "radius", k) for k in ("recall", "precision")) for n, v in by_name.items()}
        ranks = {n: tuple(_average(v, "precision_at", k) for k in ("n", "precision")) for n, v in by_name.items()}
        if own:
            title = f"{bits} bits"
            drawn = figures.curves(radius, "recall", "precision", f"{title}, by radius")  # type: ignore[arg-type]
            figures.save(drawn, folder, f"precision_recall_{bits}")
            drawn = figures.curves(ranks, "N", "precision@N", title)  # type: ignore[arg-type]
            figures.save(drawn, folder, f"precision_at_{bits}")
        watched = {
            n: ([p["epoch"] for p in v[0]["watched"]], [p["metrics"][metric] for p in v[0]["watched"]])
            for n, v in by_name.items()
            if v[0]["watched"]
        }
        if watched:
            figures.save(figures.curves(watched, "epoch", metric, f"{bits} bits"), folder, f"epochs_{bits}")


def _average(rows: Sequence[Mapping[str, Any]], curve: str, part: str) -> list[float]:
    return [float(v) for v in np.mean([row["curves"][curve][part] for row in rows], axis=0)]
