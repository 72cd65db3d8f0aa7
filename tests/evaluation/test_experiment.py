"""One split, any method, in process: against the metrics' own definitions and the plain labels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hashdist.evaluation.experiment import Corpus, Experiment, Recipe
from hashdist.evaluation.measure import Cuts
from hashdist.evaluation.ranking import PRECISION_AT
from hashdist.evaluation.statistics import edge_agreement, of_codes
from hashdist.ground import bits
from hashdist.ground.bits import hamming
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import GraphSettings
from hashdist.nearest.shared import Sparse
from tests.worlds.training import tiny_data

TINY = {"rounds": 1, "epochs": 2, "batch": 50}
DSAH = Recipe("ours", "dsah", options=TINY)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    data = tiny_data(n=400)
    assert data.features is not None
    return Corpus("tiny", data.ids, data.features, data.labels)


@pytest.fixture(scope="module")
def experiment(corpus: Corpus) -> Experiment:
    return Experiment(corpus, "uniform:40:200", 1, GraphSettings(), cuts=Cuts(50, 10, 5))


def test_metrics_are_those_of_plain_loops(experiment: Experiment, corpus: Corpus) -> None:
    codes = experiment.fit(Recipe("itq", "itq"), 8).codes
    found = experiment.measure(codes)
    assert corpus.labels is not None
    query, database = experiment.split.query, experiment.split.database
    precision, ap = [], []
    for q in query:
        order = np.argsort(hamming(codes[q], codes[database]), kind="stable")  # rows of the database are by id
        right = (corpus.labels[database][order] & corpus.labels[q]).any(1)
        precision.append(right[:10].mean())
        top = right[:50]
        ap.append(sum(top[: r + 1].mean() for r in range(50) if top[r]) / max(1, top.sum()))
    assert found["metrics"]["precision@10"] == pytest.approx(np.mean(precision))
    assert found["metrics"]["map@50"] == pytest.approx(np.mean(ap))
    curve = found["curves"]["precision_at"]
    assert curve["n"] == [n for n in PRECISION_AT if n <= experiment.split.database.size]
    assert curve["precision"][curve["n"].index(10)] == pytest.approx(np.mean(precision))
    assert 0 < found["metrics"]["recall@5"] <= 1


@pytest.mark.parametrize("recipe", [DSAH, Recipe("s", "csdh", options=TINY), Recipe("itq", "itq")])
def test_the_same_cell_gives_the_same_codes_and_another_seed_others(corpus: Corpus, recipe: Recipe) -> None:
    experiments = [Experiment(corpus, "uniform:40:200", seed, GraphSettings(), cuts=Cuts(50)) for seed in (0, 0, 1)]
    first, same, other = (experiment.fit(recipe, 8).codes for experiment in experiments)
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_graphs_are_shared_by_methods_that_ask_for_the_same(experiment: Experiment) -> None:
    assert experiment.graph(DSAH)[0] is experiment.graph(replace(DSAH, name="again", options={"gamma": 0.0}))[0]
    assert experiment.graph(replace(DSAH, graph={"neighbours": 7}))[1]["k1"] == 7
    assert experiment.graph(Recipe("d", "ddh"))[1]["rule"] == "union"
    assert experiment.graph(Recipe("c", "csdh")) == (None, {})


def test_a_watched_run_ends_where_an_unwatched_one_does(experiment: Experiment) -> None:
    watched = experiment.fit(DSAH, 8, watch=1)
    assert [point["epoch"] for point in watched.curve] == [1, 2]
    assert watched.curve[-1]["metrics"] == experiment.measure(watched.codes)["metrics"]
    assert np.array_equal(watched.codes, experiment.fit(DSAH, 8).codes)


def test_a_supervised_method_without_labels_is_refused(corpus: Corpus) -> None:
    bare = Experiment(replace(corpus, labels=None), "uniform:40:200", 0, GraphSettings())
    for method in ("csdh", "sdh"):
        with pytest.raises(InvalidInput, match="labels"):
            bare.fit(Recipe(method, method), 8)
    assert "map_all_ties" not in bare.measure(bare.fit(Recipe("lsh", "lsh"), 8).codes)["metrics"]


def test_code_statistics_of_known_codes() -> None:
    signs = np.array([[1, 1, -1, -1, 1, 1, 1, 1], [1, -1, 1, -1, 1, 1, 1, 1]] * 2, np.float32).T
    padded = np.concatenate([signs, np.ones((8, 4), np.float32)], axis=1)
    found = of_codes(bits.pack(padded))
    share = padded.clip(0).mean(0)
    assert found["imbalance"] == pytest.approx(np.abs(share - 0.5).mean())
    assert found["distinct"] == len(np.unique(padded, axis=0)) / 8
    h = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert found["entropy"] == pytest.approx(h * 4 / 8, rel=1e-6)


def test_edge_agreement_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((60, 4)) < 0.3
    edge = (rng.random((60, 60)) < 0.2) & ~np.eye(60, dtype=bool)
    rows = np.concatenate([[0], edge.sum(1).cumsum()]).astype(np.int64)
    found: Any = edge_agreement(Sparse(rows, np.nonzero(edge)[1].astype(np.int32)), labels)
    shared = ((labels.astype(int) @ labels.T.astype(int)) > 0) & ~np.eye(60, dtype=bool)
    assert found["precision"] == pytest.approx((edge & shared).sum() / edge.sum())
    assert found["recall"] == pytest.approx((edge & shared).sum() / shared.sum())
    assert found["mean_row"] == pytest.approx(edge.sum() / 60)
