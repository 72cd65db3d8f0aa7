"""How well codes serve a linear classifier: a support vector machine on them, as DDH does on Oxford-17 (Table 6).

The paper names neither the kind of machine nor its C. Here: linear, one against the rest, codes as -1/+1, C of the
best accuracy on a validation part.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from sklearn.svm import LinearSVC

from hashdist.ground import bits
from hashdist.ground.errors import InvalidInput

COSTS = (0.01, 0.1, 1.0, 10.0)
"""Values of C that are tried."""


METRICS = ("svm_accuracy", "svm_seconds")
"""Names of the numbers that a comparison reports."""


class LabelledCodes(NamedTuple):
    """Packed codes uint8 [N, L/8] with the one label of each, int [N]."""

    codes: NDArray[np.uint8]
    labels: NDArray[np.integer]


class Classified(NamedTuple):
    """The result of a classification.

    Attributes:
        accuracy: on the test part, the mean over its classes of the share that was recognised.
        seconds: of fitting the chosen machine alone, as Table 6 counts.
        cost: the chosen C.
        validation: accuracy on the validation part by C, mean over classes.
    """

    accuracy: float
    seconds: float
    cost: float
    validation: dict[float, float]


def classify(
    train: LabelledCodes, validation: LabelledCodes, test: LabelledCodes, costs: Sequence[float] = COSTS
) -> Classified:
    """Fit on the training part with each C, take the best on the validation part (the smallest of equals), and test.

    Raises InvalidInput: parts that do not fit together, or fewer than two classes to learn.
    """
    _check(train, validation, test)
    fitted = {cost: _fit(train, cost) for cost in costs}
    found = {cost: _accuracy(machine, validation) for cost, (machine, _) in fitted.items()}
    best = min(found, key=lambda cost: (-found[cost], cost))
    machine, seconds = fitted[best]
    return Classified(_accuracy(machine, test), seconds, best, found)


def _fit(train: LabelledCodes, cost: float) -> tuple[LinearSVC, float]:
    signs_NL = bits.signs(train.codes).astype(np.float64)
    # the dual's coordinate descent is slow where C is large and classes overlap; the primal has one solution, too
    machine = LinearSVC(C=cost, dual=False, max_iter=10_000)
    started = time.perf_counter()
    machine.fit(signs_NL, train.labels)
    return machine, time.perf_counter() - started


def _accuracy(machine: LinearSVC, part: LabelledCodes) -> float:
    return float(balanced_accuracy_score(part.labels, machine.predict(bits.signs(part.codes).astype(np.float64))))


def _check(*parts: LabelledCodes) -> None:
    widths = {part.codes.shape[1] for part in parts}
    if len(widths) != 1 or any(len(part.codes) != len(part.labels) or not len(part.codes) for part in parts):
        shapes = ", ".join(f"{part.codes.shape} with {len(part.labels)} labels" for part in parts)
        raise InvalidInput(f"codes of each part must be of one width and have one label each, found {shapes}")
    known = set(np.unique(parts[0].labels).tolist())
    if len(known) < 2:
        raise InvalidInput(f"a classifier needs at least two classes to learn, found {len(known)}")
    unseen = set(np.unique(np.concatenate([part.labels for part in parts[1:]])).tolist()) - known
    if unseen:
        raise InvalidInput(f"every class must be in the training part, found {sorted(unseen)} in the others alone")
