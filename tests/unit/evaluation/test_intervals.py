"""Intervals against closed formulas, against rows drawn one by one, and by how often they hold the true value."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score
from support.scores import list_pairs

from agnews_dist.evaluation.intervals import bootstrap_macro_f1, macro_f1_of_draws, wilson_interval

CONFUSIONS = {
    "four classes": [[110, 5, 3, 2], [4, 90, 6, 0], [8, 9, 70, 13], [1, 0, 11, 68]],
    "a rare class, which some draws lack": [[60, 4, 0], [5, 30, 0], [1, 0, 1]],
    "a class that is only predicted": [[20, 1, 0], [3, 25, 1], [0, 0, 0]],
}


@pytest.mark.parametrize(
    ("num_correct", "num_examples", "level"), [(9, 10, 0.95), (0, 7, 0.95), (7, 7, 0.9), (6821, 7600, 0.99)]
)
def test_wilson_equals_the_closed_formula(num_correct: int, num_examples: int, level: float) -> None:
    z, share = stats.norm.ppf((1 + level) / 2), num_correct / num_examples
    middle = (share + z**2 / (2 * num_examples)) / (1 + z**2 / num_examples)
    half = z / (1 + z**2 / num_examples) * math.sqrt(share * (1 - share) / num_examples + (z / (2 * num_examples)) ** 2)
    assert wilson_interval(num_correct, num_examples, level) == pytest.approx((middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize(("num_correct", "num_examples"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(num_correct: int, num_examples: int) -> None:
    with pytest.raises(ValueError):
        wilson_interval(num_correct, num_examples)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFUSIONS)
def test_bootstrap_equals_rows_drawn_one_by_one(case: str) -> None:
    labels, predictions = list_pairs(CONFUSIONS[case])
    generator = np.random.default_rng(1)
    values = []
    for _ in range(600):
        rows = generator.integers(0, len(labels), len(labels))
        values.append(f1_score(labels[rows], predictions[rows], average="macro"))
    for level in (0.5, 0.95):
        expected = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        # A quantile of 600 draws scatters by a ninth of the spread.
        found = bootstrap_macro_f1(CONFUSIONS[case], level=level, num_samples=4000)
        np.testing.assert_allclose(found, expected, atol=0.3 * np.std(values))


def test_macro_f1_of_draws_equals_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels, predictions = np.array([7, 7, 2, 9, 9, 4]), np.array([7, 2, 2, 9, 7, 1])
    drawn = generator.integers(0, 3, (20, len(labels)))
    expected = [
        f1_score(labels.repeat(counts), predictions.repeat(counts), average="macro", zero_division=0) for counts in drawn
    ]
    np.testing.assert_allclose(macro_f1_of_draws(drawn, labels, predictions), expected, rtol=1e-12)


def test_bootstrap_of_256_classes_is_drawn_in_blocks() -> None:
    generator = np.random.default_rng(2)
    confusion = generator.integers(0, 2, (256, 256)) + np.diag(np.full(256, 100))
    low, high = bootstrap_macro_f1(confusion, num_samples=70)
    labels, predictions = list_pairs(confusion.tolist())
    assert low < high
    # Classes that a draw confuses more than the sample does lower its mean by little.
    assert (low + high) / 2 == pytest.approx(f1_score(labels, predictions, average="macro"), abs=0.01)


def test_bootstrap_depends_on_the_seed_alone() -> None:
    confusion = CONFUSIONS["four classes"]
    assert bootstrap_macro_f1(confusion, seed=3) == bootstrap_macro_f1(np.array(confusion), seed=3)
    assert bootstrap_macro_f1(confusion, seed=3) != bootstrap_macro_f1(confusion, seed=4)


@pytest.mark.parametrize("confusion", [[[0, 0], [0, 0]], [[1, 2]], [1, 2]])
def test_bootstrap_refuses_what_has_no_macro_f1(confusion: list) -> None:
    with pytest.raises(ValueError, match="macro F1"):
        bootstrap_macro_f1(confusion)


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.5, 0.9, 0.98])
def test_wilson_holds_the_true_accuracy_in_95_of_100_splits(accuracy: float) -> None:
    counts = np.arange(301)
    held = [low <= accuracy <= high for low, high in (wilson_interval(count, 300) for count in counts.tolist())]
    assert stats.binom.pmf(counts, 300, accuracy)[held].sum() == pytest.approx(0.95, abs=0.02)


def test_bootstrap_holds_the_true_macro_f1_in_95_of_100_splits() -> None:
    truth = np.array(CONFUSIONS["four classes"])
    labels, predictions = list_pairs(truth.tolist())
    expected = f1_score(labels, predictions, average="macro")
    generator = np.random.default_rng(0)
    splits = generator.multinomial(400, truth.ravel() / truth.sum(), size=300).reshape(-1, 4, 4)
    intervals = [bootstrap_macro_f1(split, num_samples=400, seed=seed) for seed, split in enumerate(splits)]
    num_held = sum(low <= expected <= high for low, high in intervals)
    # 300 splits scatter by 1.3 points.
    assert num_held / 300 == pytest.approx(0.95, abs=0.03)
