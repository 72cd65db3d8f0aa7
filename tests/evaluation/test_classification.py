"""The classifier on codes against scikit-learn's grid over the same parts, and cases that can be read off."""

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.svm import LinearSVC

from hashdist.evaluation.classification import COSTS, LabelledCodes, classify
from hashdist.ground import bits
from hashdist.ground.errors import InvalidInput


def noisy_codes(n: int, flips: float, seed: int, classes: int = 5, length: int = 32) -> LabelledCodes:
    """One random code a class, each bit flipped with that probability."""
    codes = np.random.default_rng(0).standard_normal((classes, length)) >= 0
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    return LabelledCodes(bits.pack(np.where(codes[labels] ^ (rng.random((n, length)) < flips), 1.0, -1.0)), labels)


def test_codes_of_one_code_a_class_are_recognised_all() -> None:
    parts = [noisy_codes(n, 0.02, seed) for seed, n in enumerate((100, 50, 50))]
    found = classify(*parts)
    assert found.accuracy == 1
    assert found.seconds > 0
    assert found.cost == min(c for c in COSTS if found.validation[c] == 1)


def test_codes_without_meaning_are_recognised_by_chance_only() -> None:
    parts = [noisy_codes(n, 0.5, seed) for seed, n in enumerate((400, 400, 2000))]
    assert classify(*parts).accuracy == pytest.approx(0.2, abs=0.05)


def test_choice_and_accuracy_are_those_of_a_grid_search_on_the_same_parts() -> None:
    train, validation, test = (noisy_codes(n, 0.35, seed) for seed, n in enumerate((150, 100, 300)))
    found = classify(train, validation, test)
    fold = PredefinedSplit(np.repeat([-1, 0], [150, 100]))
    signs = [bits.unpack(p.codes) * 2.0 - 1 for p in (train, validation, test)]
    grid = GridSearchCV(
        LinearSVC(dual=False), {"C": sorted(COSTS)}, scoring="balanced_accuracy", cv=fold, refit=False
    ).fit(np.concatenate(signs[:2]), np.concatenate((train.labels, validation.labels)))
    assert found.cost == grid.best_params_["C"]
    assert found.validation[found.cost] == pytest.approx(grid.best_score_)
    machine = LinearSVC(dual=False, C=found.cost).fit(signs[0], train.labels)
    right = machine.predict(signs[2]) == test.labels
    assert found.accuracy == pytest.approx(np.mean([right[test.labels == c].mean() for c in range(5)]))
    assert len(set(found.validation.values())) > 1


def test_classes_count_alike_whatever_their_size() -> None:
    train, validation, test = (noisy_codes(200, 0.0, seed, classes=2) for seed in range(3))
    # 9 of 10 test images are of class 0, and those of class 1 carry the code of class 0
    of_0 = test.codes[test.labels == 0]
    lopsided = LabelledCodes(np.repeat(of_0[:1], 100, axis=0), np.repeat([0, 1], [90, 10]))
    assert classify(train, validation, lopsided).accuracy == 0.5


def test_parts_that_do_not_fit_are_refused() -> None:
    part = noisy_codes(50, 0.1, 0)
    with pytest.raises(InvalidInput, match="one label each"):
        classify(part, part, LabelledCodes(part.codes, part.labels[1:]))
    with pytest.raises(InvalidInput, match="one width"):
        classify(part, part, LabelledCodes(part.codes[:, :2], part.labels))
    with pytest.raises(InvalidInput, match="at least two classes"):
        classify(LabelledCodes(part.codes, part.labels * 0), part, part)
    with pytest.raises(InvalidInput, match=r"found \[9\] in the others alone"):
        classify(part, part, LabelledCodes(part.codes, np.where(part.labels == 4, 9, part.labels)))
