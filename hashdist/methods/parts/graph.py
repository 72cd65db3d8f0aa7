"""The neighbour graph that a method starts from: how many neighbours it takes, and which pairs are positive, by rule.

| rule | positives of row i | k1, k2 by default |
|---|---|---|
| `and` | DSAH's W0: in the k1 nearest of i and in its top k2 by shared neighbours (Eqs 7-9) | 5 %, at most 500; k1 |
| `union` | DDH's S: the union of N(k) over the top k2 images k by shared neighbours, i among them (Eqs 1-3) | 15; 6 |
| `none` | no neighbours are searched, for methods that use no graph | |

A new rule is one entry of RULES; the graph stage and `hashdist compare` find it there, and a method names it as GRAPH.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import GraphSettings
from hashdist.methods.contract import find_method
from hashdist.nearest import cosine, shared


class Positives(Protocol):
    """Rows [start, stop) of the positives of neighbour lists, before the matrix is made symmetric."""

    def __call__(
        self,
        neighbours_NK: NDArray[np.int32],
        inverted: shared.Inverted,
        k2: int,
        rows: tuple[int, int] | None = None,
        *,
        threads: int = 0,
    ) -> shared.Sparse:
        """Arguments as in `shared.shared_neighbour_ranking`."""


@dataclass(frozen=True)
class Rule:
    """How positive pairs come from neighbour lists.

    Args:
        positives: those of a run of rows.
        neighbours: n -> k1, where the settings leave it open.
        shared: k1 -> k2, likewise.
        batch: images of the paper's uniform batch, where training on so sparse a graph can starve of positives.
    """

    positives: Positives
    neighbours: Callable[[int], int]
    shared: Callable[[int], int]
    batch: int | None = None


RULES: dict[str, Rule | None] = {
    "and": Rule(shared.initial_similarity, lambda n: max(1, min(500, n // 20)), lambda k1: k1, batch=50),
    "union": Rule(shared.union_similarity, lambda n: min(15, n - 1), lambda _: 6),
    "none": None,
}
"""Rules by name, as `graph.rule` and a method's GRAPH give it."""


class Built(NamedTuple):
    """A graph and what it was made from.

    Attributes:
        k1: neighbours of an image.
        k2: images of a row with the largest overlap of neighbour lists.
        neighbours_NK: int32 [n, k1].
        positives: by the rule.
        symmetric: the same made symmetric as the settings say.
    """

    k1: int
    k2: int
    neighbours_NK: NDArray[np.int32]
    positives: shared.Sparse
    symmetric: shared.Sparse


def find_rule(name: str) -> Rule | None:
    """The rule of that name, None where no graph is built; InvalidInput lists the known ones."""
    if name not in RULES:
        raise InvalidInput(f"graph.rule must be auto or one of {', '.join(RULES)}, found {name!r}")
    return RULES[name]


def rule_for(method: str, wanted: str) -> str:
    """The name of the rule that is wanted for a method: its own where that is `auto`. Raises InvalidInput."""
    name = str(getattr(find_method(method), "GRAPH", "none")) if wanted == "auto" else wanted
    find_rule(name)
    return name


def sizes(wanted: GraphSettings, n: int, where: str) -> tuple[int, int]:
    """k1 and k2 for n images, those found in `where`; 0 and 0 where no neighbours are wanted. Raises InvalidInput."""
    if n < 2:
        raise InvalidInput(
            f"training needs at least 2 images with a feature in its sample, found {n} in {where}; add images or raise "
            "graph.train_sample"
        )
    rule = find_rule(wanted.rule)
    if rule is None:
        return 0, 0
    k1 = wanted.neighbours or rule.neighbours(n)
    k2 = wanted.shared or rule.shared(k1)
    if not 1 <= k1 < n or k2 < 1:
        raise InvalidInput(
            f"graph.neighbours must lie between 1 and n - 1 = {n - 1} and graph.shared be at least 1, found {k1} and "
            f"{k2}; choose fewer neighbours or more images (graph.train_sample = {wanted.train_sample})"
        )
    return k1, k2


def positives(
    rule: str, neighbours_NK: NDArray[np.int32], k2: int, rows: tuple[int, int] | None = None, *, threads: int = 0
) -> shared.Sparse:
    """The positives of a run of rows (None = all) by a rule that builds a graph, before it is made symmetric."""
    found = find_rule(rule)
    if found is None:
        raise InvalidInput(f"rule {rule} builds no graph; choose another graph.rule")
    return found.positives(neighbours_NK, shared.inverted_lists(neighbours_NK), k2, rows, threads=threads)


def build(features_ND: cosine.Vectors, wanted: GraphSettings, *, threads: int = 0) -> Built:
    """The graph of all rows at once, in memory.

    Args:
        features_ND: of the training images, as `cosine.self_nearest` takes them.
        wanted: a rule that builds a graph, sizes, and how the graph is made symmetric.
        threads: 0 = all cores.

    Raises:
        InvalidInput: an unknown rule, or sizes that so few images do not have.
    """
    k1, k2 = sizes(wanted, len(features_ND), "the training set")
    neighbours_NK = cosine.self_nearest(features_ND, k1, threads=threads).rows_MK
    found = positives(wanted.rule, neighbours_NK, k2, threads=threads)
    return Built(k1, k2, neighbours_NK, found, shared.symmetric(found, wanted.symmetrize))
