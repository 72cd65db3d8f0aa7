"""One corpus, one split, any method: fitted, encoded and measured in this process, by the parts that the stages use.

`hashdist compare` and the benchmarks run their cells on it. The protocol draws queries, training set and database
anew for every seed; graphs are built once for each split and rule, and shared by the methods that ask for them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hashdist.evaluation import measure, ranking, statistics
from hashdist.evaluation.classification import METRICS, LabelledCodes, classify
from hashdist.evaluation.protocols import Split, parts_of, split
from hashdist.ground import bits
from hashdist.ground.errors import InvalidInput
from hashdist.ground.ranges import blocks
from hashdist.ground.schema import OK, from_vectors
from hashdist.ground.settings import GraphSettings, TrainSettings
from hashdist.methods.contract import (
    Graph,
    TrainingData,
    check_labels,
    deep_method,
    find_method,
    fit_shallow,
    method_settings,
)
from hashdist.methods.parts.communicator import SingleProcess
from hashdist.methods.parts.graph import build, find_rule, rule_for
from hashdist.methods.parts.labels import one_hot
from hashdist.methods.parts.threads import torch_threads
from hashdist.models.training import Checkpoint, train
from hashdist.nearest import cosine, shared
from hashdist.store.commit import Artefact
from hashdist.store.vectors import read_vectors

_ENCODE_ROWS = 1024

Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """One row of a comparison.

    Args:
        name: of the row.
        method: file name of a method, deep or shallow.
        preset: of a deep method.
        options: single values of a deep method's settings that differ from the preset.
        graph: single values of the graph's settings that differ from the run's.
    """

    name: str
    method: str
    preset: str = "paper"
    options: Mapping[str, Any] = field(default_factory=dict)
    graph: Mapping[str, Any] = field(default_factory=dict)

    @property
    def deep(self) -> bool:
        """Whether the training loop trains it; else it is fitted."""
        return hasattr(find_method(self.method), "Method")

    def rule(self) -> str:
        """The rule of the graph that it is trained on."""
        return rule_for(self.method, self.graph.get("rule", "auto"))

    def settings(self) -> Any:
        """The settings of a deep method; None for a shallow one. Raises InvalidInput."""
        return method_settings(deep_method(find_method(self.method)), self.preset, self.options) if self.deep else None


@dataclass(frozen=True)
class Corpus:
    """Images that take part, by ascending id.

    Args:
        name: digest of the features, and of which labels were dropped.
        ids: int64 [N].
        features: [N, D].
        labels: bool [N, C]; None where there are none.
        parts: [N], the data set's own parts, as their keys name them.
    """

    name: str
    ids: NDArray[np.int64]
    features: NDArray[np.floating]
    labels: NDArray[np.bool_] | None
    parts: Sequence[str] | None = None

    @cached_property
    def masks(self) -> NDArray[np.uint64]:
        """Label sets as bit masks."""
        classes = 0 if self.labels is None else self.labels.shape[1]
        return ranking.label_masks(self.label_lists(np.arange(len(self.ids))), max(1, classes))

    def label_lists(self, rows: NDArray[np.int64]) -> list[list[int]]:
        """The labels of some rows."""
        return [[] if self.labels is None else np.flatnonzero(self.labels[row]).tolist() for row in rows]


def read_corpus(features: Artefact, drop_labels: Sequence[int] = ()) -> Corpus:
    """The images of committed features that have a feature, and where any has labels, a label.

    Args:
        features: committed.
        drop_labels: classes that count for nothing; images that are left without a label take no part.
    """
    table = read_vectors(features, ["id", "key", "status", "labels", "feature"])
    table = table.filter(table["status"].to_numpy() == OK)
    labels = one_hot(table["labels"].to_pylist())
    wrong = [label for label in drop_labels if not 0 <= label < labels.shape[1]]
    if wrong:
        raise InvalidInput(f"labels to drop must lie in [0, {labels.shape[1]}), found {wrong}")
    labels[:, list(drop_labels)] = False
    vectors: NDArray[Any] = from_vectors(table["feature"], table.schema)
    ids: NDArray[np.int64] = table["id"].to_numpy()
    parts = parts_of(table["key"].to_pylist())
    name = features.name + "".join(f"-{label}" for label in sorted(drop_labels))
    if not labels.shape[1]:
        return Corpus(name, ids, vectors, None, parts)
    keep = labels.any(1)
    kept = [parts[row] for row in np.flatnonzero(keep)]
    return Corpus(name, ids[keep], np.ascontiguousarray(vectors[keep]), labels[keep], kept)


@dataclass(frozen=True)
class Fitted:
    """A fitted method.

    Args:
        codes: uint8 [N, L/8] of all images of the corpus.
        seconds: wall time of `graph`, `fit` and `encode`.
        history: loss terms by epoch, of a deep method.
        rounds: what the method reported after each round.
        curve: what `watch` returned after epochs, each with epoch and seconds.
    """

    codes: Codes
    seconds: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


class Experiment:
    """A corpus under one split.

    Args:
        corpus: the images.
        protocol: hashdist/evaluation/protocols.py.
        seed: of the split.
        graph: settings of graphs, where a recipe does not say otherwise.
        cuts: how deep metrics look.
        threads: CPU threads.
    """

    def __init__(
        self,
        corpus: Corpus,
        protocol: str,
        seed: int,
        graph: GraphSettings,
        *,
        cuts: measure.Cuts | None = None,
        threads: int = 1,
    ) -> None:
        labels = None if corpus.labels is None else corpus.label_lists(np.arange(len(corpus.ids)))
        self.corpus, self.seed, self._graph, self.threads = corpus, seed, graph, threads
        self.cuts = cuts or measure.Cuts()
        self.split: Split = split(protocol, corpus.ids, labels, seed, corpus.parts)
        self._graphs: dict[GraphSettings, tuple[Graph | None, dict[str, Any]]] = {}

    @cached_property
    def sample(self) -> NDArray[np.floating]:
        """Features of the training images."""
        return np.ascontiguousarray(self.corpus.features[self.split.train])

    @property
    def labels(self) -> NDArray[np.bool_] | None:
        """Labels of the training images."""
        return None if self.corpus.labels is None else self.corpus.labels[self.split.train]

    def fit(self, recipe: Recipe, length: int, watch: int = 0) -> Fitted:
        """Fit or train `recipe` on the training set and encode everything.

        Args:
            recipe: what.
            length: code length in bits.
            watch: epochs between two measurements along the way; 0 = none.
        """
        return self._train(recipe, length, watch) if recipe.deep else self._fit_shallow(recipe, length)

    def graph(self, recipe: Recipe) -> tuple[Graph | None, dict[str, Any]]:
        """The graph that a recipe is trained on, and how well its positives agree with labels."""
        chosen = replace(self._graph, **{**recipe.graph, "rule": recipe.rule()})
        if chosen not in self._graphs:
            self._graphs[chosen] = self._build_graph(chosen)
        return self._graphs[chosen]

    def measure(self, codes: Codes) -> dict[str, Any]:
        """Metrics, curves and statistics of codes uint8 [N, L/8] of all images."""
        query, database = self.split.query, self.split.database
        base, masks = np.ascontiguousarray(codes[database]), self.corpus.masks
        depth = min(self.cuts.depth, len(database))
        found = measure.search(base, codes[query], masks[database], masks[query], depth, threads=self.threads)
        results = measure.Results(found.nearest.rows_QK.astype(np.int64), exact_QK=self._exact_neighbours)
        if self.corpus.labels is not None:
            results = replace(results, histograms=found.histograms, relevant=found.relevant)
        return {
            "metrics": measure.metrics(results, self.cuts),
            "curves": measure.curves(results),
            "codes": statistics.of_codes(base),
        }

    def classify(self, codes: Codes) -> dict[str, float]:
        """A support vector machine on the codes (DDH, Table 6): `svm_accuracy`, and `svm_seconds` of the fit alone.

        Raises InvalidInput without one label an image or without validation images in the protocol.
        """
        labels = self.corpus.labels
        if labels is None or (labels.sum(1) != 1).any() or not len(self.split.validation):
            raise InvalidInput(
                f"a classifier on codes needs one label for every image and a protocol with validation images, found "
                f"{len(self.split.validation)} of these; use flowers17, or a protocol file"
            )
        sets = (self.split.train, self.split.validation, self.split.query)
        train, validation, test = (LabelledCodes(codes[rows], labels[rows].argmax(1)) for rows in sets)
        found = classify(train, validation, test)
        return dict(zip(METRICS, (found.accuracy, found.seconds), strict=True))

    @cached_property
    def _exact_neighbours(self) -> NDArray[np.int64]:
        base = np.ascontiguousarray(self.corpus.features[self.split.database])
        query = np.ascontiguousarray(self.corpus.features[self.split.query])
        return cosine.nearest(query, base, self.cuts.recall_at, threads=self.threads).astype(np.int64)

    def _build_graph(self, wanted: GraphSettings) -> tuple[Graph | None, dict[str, Any]]:
        if find_rule(wanted.rule) is None:
            return None, {}
        started = time.perf_counter()
        built = build(self.sample, wanted, threads=self.threads)
        seconds = time.perf_counter() - started
        about: dict[str, Any] = {"rule": wanted.rule, "k1": built.k1, "k2": built.k2, "seconds": seconds}
        if self.labels is not None:
            near = built.neighbours_NK
            lists = shared.Sparse(np.arange(len(near) + 1, dtype=np.int64) * built.k1, near.ravel())
            graphs = {"neighbours": lists, "graph": built.positives, "symmetric graph": built.symmetric}
            about["agreement"] = {name: statistics.edge_agreement(edges, self.labels) for name, edges in graphs.items()}
        return Graph(*built.symmetric, built.neighbours_NK), about

    def _fit_shallow(self, recipe: Recipe, length: int) -> Fitted:
        started = time.perf_counter()
        sample = self.sample.astype(np.float32)
        encoder = fit_shallow(find_method(recipe.method), sample, self.labels, length, self.seed)
        fitted = time.perf_counter()
        parts = [bits.pack(encoder(self.corpus.features[a:b])) for a, b in blocks(len(self.corpus.ids), 8192)]
        return Fitted(np.concatenate(parts), {"fit": fitted - started, "encode": time.perf_counter() - fitted})

    def _train(self, recipe: Recipe, length: int, watch: int) -> Fitted:
        module = deep_method(find_method(recipe.method))
        if module.USES == "labels":
            check_labels(module.NAME, self.labels)
        graph, about = self.graph(recipe)
        data = TrainingData(self.corpus.ids[self.split.train], self.sample, None, self.labels, graph)
        wanted = TrainSettings(
            method=recipe.method,
            preset=recipe.preset,
            bits=length,
            seed=self.seed,
            options=dict(recipe.options),
            threads=self.threads,
        )
        chosen, curve = recipe.settings(), []

        def look(checkpoint: Checkpoint) -> None:
            done = len(checkpoint.history)
            if watch and done and done % watch == 0 and checkpoint.position["step"] == 0:
                width = self.corpus.features.shape[1]
                head = module.network(chosen, width, length, torch.Generator(), classes=data.classes)
                head.load_state_dict(checkpoint.state["head"])
                measured = self.measure(self._encode(head.eval()))
                seconds = sum(epoch["seconds"] for epoch in checkpoint.history)
                curve.append({"epoch": done, "seconds": seconds, "metrics": measured["metrics"]})

        trained = train(find_method(recipe.method), data, wanted, SingleProcess(), save=look, report=lambda _: None)
        ended = time.perf_counter()
        codes = self._encode(trained.network)
        seconds = {
            "graph": about.get("seconds", 0.0),
            "fit": trained.seconds,
            "encode": time.perf_counter() - ended,
        }
        return Fitted(codes, seconds, trained.history, trained.rounds, curve)

    def _encode(self, head: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> Codes:
        with torch_threads(self.threads), torch.inference_mode():
            parts = [
                bits.pack(head(torch.from_numpy(self.corpus.features[a:b].astype(np.float32)))["z"].numpy())
                for a, b in blocks(len(self.corpus.ids), _ENCODE_ROWS)
            ]
        return np.concatenate(parts)
