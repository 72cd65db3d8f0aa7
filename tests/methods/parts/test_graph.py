"""The graph by rule: sizes, the same graph as by hand, and a new rule as one entry."""

import numpy as np
import pytest

from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import GraphSettings
from hashdist.methods.parts import graph
from hashdist.methods.parts.graph import RULES, Rule
from hashdist.nearest import cosine, shared


def features(n: int = 90) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((n, 16)).astype(np.float32)


@pytest.mark.parametrize(("rule", "n", "wanted"), [("and", 90, (4, 4)), ("union", 90, (15, 6)), ("union", 9, (8, 6))])
def test_sizes_are_those_of_the_papers_where_they_are_left_open(rule: str, n: int, wanted: tuple[int, int]) -> None:
    assert graph.sizes(GraphSettings(rule=rule), n, "a test") == wanted
    assert graph.sizes(GraphSettings(rule=rule, neighbours=3, shared=2), n, "a test") == (3, 2)


def test_no_neighbours_are_searched_without_a_graph() -> None:
    assert graph.sizes(GraphSettings(rule="none"), 90, "a test") == (0, 0)
    with pytest.raises(InvalidInput, match="builds no graph"):
        graph.positives("none", np.zeros((3, 1), np.int32), 1)


@pytest.mark.parametrize("rule", ["and", "union"])
def test_a_graph_in_memory_is_the_one_made_in_parts(rule: str) -> None:
    built = graph.build(features(), GraphSettings(rule=rule, neighbours=7, shared=5), threads=1)
    np.testing.assert_array_equal(built.neighbours_NK, cosine.self_nearest(features(), 7).rows_MK)
    runs = [graph.positives(rule, built.neighbours_NK, 5, rows) for rows in ((0, 40), (40, 90))]
    np.testing.assert_array_equal(built.positives.indices, np.concatenate([run.indices for run in runs]))
    assert built.positives.indptr[-1] == sum(run.indptr[-1] for run in runs)
    np.testing.assert_array_equal(built.symmetric.indices, shared.symmetric(built.positives, "or").indices)
    assert (built.k1, built.k2) == (7, 5)


def test_a_method_names_its_rule_and_an_unknown_one_is_refused() -> None:
    assert [graph.rule_for(method, "auto") for method in ("dsah", "ddh", "csdh", "itq")] == [
        "and",
        "union",
        "none",
        "none",
    ]
    assert graph.rule_for("dsah", "union") == "union"
    with pytest.raises(InvalidInput, match=r"auto or one of and, union, none, found 'unheard'"):
        graph.rule_for("dsah", "unheard")


def test_a_new_rule_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest_alone(
        neighbours_NK: np.ndarray,
        inverted: shared.Inverted,
        k2: int,
        rows: tuple[int, int] | None = None,
        *,
        threads: int = 0,
    ) -> shared.Sparse:
        """The k2 nearest of each row, without a look at shared neighbours."""
        start, stop = rows or (0, len(neighbours_NK))
        near = np.sort(neighbours_NK[start:stop, :k2], axis=1)
        return shared.Sparse(np.arange(stop - start + 1, dtype=np.int64) * near.shape[1], near.ravel())

    monkeypatch.setitem(RULES, "nearest", Rule(nearest_alone, lambda n: min(10, n - 1), lambda k1: k1))
    built = graph.build(features(), GraphSettings(rule="nearest", symmetrize="none"))
    assert graph.rule_for("dsah", "nearest") == "nearest"
    np.testing.assert_array_equal(built.symmetric.indices.reshape(90, 10), np.sort(built.neighbours_NK, axis=1))
