"""Two classifiers on the same rows: the exact test against binomial sums, intervals against drawn rows, error rates of both."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from agnews_dist.evaluation import intervals
from agnews_dist.evaluation.paired import bootstrap_differences, mcnemar_exact

NUM_CLASSES = 4


def simulate(
    seed: int, first: float, second: float, num_rows: int = 1000, num_classes: int = NUM_CLASSES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate labels and the predictions of two classifiers of given accuracy; two thirds of the rows are easy for both."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    easy = generator.random(num_rows) < 2 / 3
    predictions = []
    for accuracy in (first, second):
        right = easy | (generator.random(num_rows) < 1 - 3 * (1 - accuracy))
        wrong = (labels + generator.integers(1, num_classes, num_rows)) % num_classes
        predictions.append(np.where(right, labels, wrong))
    return labels, *predictions


@pytest.mark.parametrize(("num_first", "num_second"), [(0, 0), (1, 0), (3, 9), (9, 3), (20, 20), (0, 12)])
def test_mcnemar_equals_the_binomial_sum(num_first: int, num_second: int) -> None:
    num_different = num_first + num_second
    labels = np.zeros(num_different + 5, np.int64)
    first = np.array([0] * num_first + [1] * num_second + [0, 0, 0, 1, 1])
    second = np.array([2] * num_first + [0] * num_second + [0, 0, 0, 1, 3])
    tail = sum(math.comb(num_different, i) for i in range(min(num_first, num_second) + 1)) / 2**num_different
    found = mcnemar_exact(labels, first, second)
    assert found[:2] == (num_first, num_second)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.slow
def test_mcnemar_rejects_one_pair_in_20_of_equal_classifiers() -> None:
    num_pairs = 600
    rejected = sum(mcnemar_exact(*simulate(seed, 0.9, 0.9)).p_value < 0.05 for seed in range(num_pairs))
    # The exact test rejects less often than it may, but it is no constant.
    assert stats.binom.ppf(0.001, num_pairs, 0.025) <= rejected <= stats.binom.ppf(0.999, num_pairs, 0.05)


def test_a_better_classifier_is_found_in_20_of_20_pairs() -> None:
    for seed in range(20):
        labels, first, second = simulate(seed, 0.87, 0.92)
        found = mcnemar_exact(labels, first, second)
        assert found.p_value < 0.05
        assert found.num_second_only > found.num_first_only
        interval = bootstrap_differences(labels, first, second, NUM_CLASSES)["accuracy"].interval
        assert interval is not None
        assert interval.low > 0


@pytest.mark.slow
def test_differences_without_pseudo_rows_equal_rows_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the 10,000 classes occur nowhere."""
    monkeypatch.setattr(intervals, "PSEUDO_ROWS", 0)
    labels, first, second = simulate(5, 0.8, 0.85, num_rows=300)
    num_classes, last = 10_000, 9_999
    labels[:3], first[:3], second[:3] = last, [0, last, 1], [last, last, 0]
    differences = bootstrap_differences(labels, first, second, num_classes, num_samples=4000)
    generator = np.random.default_rng(1)
    draws = [np.arange(300), *generator.integers(0, 300, (400, 300))]
    scores = {"accuracy": accuracy_score, "macro_f1": lambda *pair: f1_score(*pair, average="macro")}
    assert set(differences) == set(scores)
    for name, score in scores.items():
        expected, *values = (score(labels[rows], second[rows]) - score(labels[rows], first[rows]) for rows in draws)
        assert differences[name].value == pytest.approx(expected, abs=1e-12)
        middle, half = 2 * expected - np.mean(values), 1.96 * np.std(values)
        np.testing.assert_allclose(differences[name].interval, (middle - half, middle + half), atol=0.25 * np.std(values))


def test_differences_of_equal_predictions_are_zero_without_an_interval() -> None:
    labels, first, _ = simulate(0, 0.8, 0.8)
    for difference in bootstrap_differences(labels, first, first.copy(), NUM_CLASSES).values():
        assert difference == (0, None)


def test_macro_f1_of_few_rows_per_class_has_no_interval() -> None:
    labels, first, second = simulate(0, 0.8, 0.9, num_rows=19)
    found = bootstrap_differences(labels, first, second, NUM_CLASSES)
    assert found["macro_f1"].interval is None
    assert found["accuracy"].interval is not None


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "num_rows"), [(4, 1000), (4, 40), (50, 250), (100, 1000)])
def test_differences_hold_the_true_value_in_95_of_100_splits(num_classes: int, num_rows: int) -> None:
    """The expected difference is 0.03 in both scores up to a thousandth: errors are the same for all classes."""
    num_splits = 200
    found = [
        bootstrap_differences(*simulate(seed, 0.9, 0.93, num_rows, num_classes), num_classes, num_samples=300, seed=seed)
        for seed in range(num_splits)
    ]
    for score in ("accuracy", "macro_f1"):
        given = [each[score].interval for each in found if each[score].interval is not None]
        held = [low <= 0.03 <= high for low, high in given]
        assert len(held) > 0.8 * num_splits
        assert sum(held) / len(held) == pytest.approx(0.95, abs=0.05)


@pytest.mark.parametrize("second", [np.zeros(3, np.int64), np.zeros((4, 1), np.int64), np.full(4, NUM_CLASSES)])
def test_other_rows_and_classes_are_refused(second: np.ndarray) -> None:
    labels = np.zeros(4, np.int64)
    with pytest.raises(ValueError, match=r"not the same rows|outside the 4 classes"):
        bootstrap_differences(labels, labels, second, NUM_CLASSES)


def test_no_rows_are_refused() -> None:
    empty = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="0 examples"):
        bootstrap_differences(empty, empty, empty, NUM_CLASSES)
