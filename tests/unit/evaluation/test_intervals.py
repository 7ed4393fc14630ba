"""Intervals against scipy, against rows drawn one by one, and by how often they hold the true value."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score
from support.scores import list_pairs

from agnews_dist.evaluation import intervals
from agnews_dist.evaluation.intervals import bootstrap_macro_f1, draw_counts, macro_f1_of_draws, wilson_interval

CONFUSIONS = {
    "four classes": [[110, 5, 3, 2], [4, 90, 6, 0], [8, 9, 70, 13], [1, 0, 11, 68]],
    "a rare class, which some draws lack": [[60, 4, 0], [5, 30, 0], [1, 0, 1]],
    "a class that is only predicted": [[20, 1, 0], [3, 25, 1], [0, 0, 0]],
}


@pytest.mark.parametrize(
    ("num_correct", "num_examples", "level"), [(9, 10, 0.95), (0, 7, 0.95), (7, 7, 0.9), (6821, 7600, 0.99)]
)
def test_wilson_equals_scipy(num_correct: int, num_examples: int, level: float) -> None:
    expected = stats.binomtest(num_correct, num_examples).proportion_ci(level, method="wilson")
    assert wilson_interval(num_correct, num_examples, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("num_correct", "num_examples"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(num_correct: int, num_examples: int) -> None:
    with pytest.raises(ValueError):
        wilson_interval(num_correct, num_examples)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFUSIONS)
def test_bootstrap_without_pseudo_rows_equals_rows_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(intervals, "PSEUDO_ROWS", 0)
    labels, predictions = list_pairs(CONFUSIONS[case])
    generator = np.random.default_rng(1)
    values = []
    for _ in range(600):
        rows = generator.integers(0, len(labels), len(labels))
        values.append(f1_score(labels[rows], predictions[rows], average="macro"))
    score = f1_score(labels, predictions, average="macro")
    corrected, num_rows = 2 * score - np.mean(values), score * (1 - score) / np.var(values)
    for level in (0.5, 0.95):
        expected = wilson_interval(corrected * num_rows, num_rows, level)
        found = bootstrap_macro_f1(labels, predictions, level=level, num_samples=4000)
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=0.2 * np.std(values))


def test_macro_f1_of_draws_equals_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels, predictions = np.array([7, 7, 2, 9, 9, 4]), np.array([7, 2, 2, 9, 7, 1])
    drawn = generator.integers(0, 3, (20, len(labels)))
    expected = [
        f1_score(labels.repeat(counts), predictions.repeat(counts), average="macro", zero_division=0) for counts in drawn
    ]
    np.testing.assert_allclose(macro_f1_of_draws(drawn, labels, predictions), expected, rtol=1e-12)


def test_bootstrap_of_many_kinds_is_drawn_in_blocks_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "MAX_DRAWN_CELLS", 5_000)
    monkeypatch.setattr(intervals, "MAX_WORK", 300_000)
    few, many, most = (
        [len(block) for block in draw_counts(np.full(kinds, 2), 9, num_samples=900, seed=0)] for kinds in (10, 1000, 10_000)
    )
    assert (few, many, sum(most)) == ([500, 400], [5] * 60, intervals.MIN_SAMPLES)


def test_bootstrap_depends_on_the_seed_alone() -> None:
    pairs = list_pairs(CONFUSIONS["four classes"])
    assert bootstrap_macro_f1(*pairs, seed=3) == bootstrap_macro_f1(*(pair[::-1] for pair in pairs), seed=3)
    assert bootstrap_macro_f1(*pairs, seed=3) != bootstrap_macro_f1(*pairs, seed=4)


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        pytest.param([0], [0], id="one row"),
        pytest.param([0, 1] * 20, [0, 1] * 20, id="all right"),
        pytest.param([0, 1] * 20, [1, 0] * 20, id="all wrong"),
        pytest.param([*range(10)] * 4, [0, *range(1, 10)] * 3 + [1] * 10, id="four rows a class"),
    ],
)
def test_rows_that_allow_no_interval_have_none(labels: list[int], predictions: list[int]) -> None:
    assert bootstrap_macro_f1(np.array(labels), np.array(predictions)) is None


@pytest.mark.parametrize(("labels", "predictions"), [([], []), ([1, 2], [1]), ([[1]], [[1]])])
def test_bootstrap_refuses_what_has_no_macro_f1(labels: list, predictions: list) -> None:
    with pytest.raises(ValueError, match="macro F1"):
        bootstrap_macro_f1(np.array(labels, np.int64), np.array(predictions, np.int64))


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.5, 0.9, 0.98])
def test_wilson_holds_the_true_accuracy_in_95_of_100_splits(accuracy: float) -> None:
    counts = np.arange(301)
    held = [low <= accuracy <= high for low, high in (wilson_interval(count, 300) for count in counts.tolist())]
    assert stats.binom.pmf(counts, 300, accuracy)[held].sum() == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("frequencies", "num_rows", "accuracy", "num_splits"),
    [
        ([1] * 4, 40, 0.95, 300),
        ([1] * 20, 200, 0.9, 200),
        ([1] * 50, 250, 0.9, 150),
        ([1] * 100, 700, 0.7, 100),
        ([100, 100, 100, 3], 303, 0.9, 200),
        ([2000] + [1] * 50, 2050, 0.9, 100),
    ],
    ids=["4 in 40", "20 in 200", "50 in 250", "100 in 700", "one rare", "one frequent"],
)
def test_bootstrap_holds_the_true_macro_f1_and_the_score(
    frequencies: list[int], num_rows: int, accuracy: float, num_splits: int
) -> None:
    """Percentiles hold it in 80 of 100 splits of 50 classes, and in fewer of more classes."""
    num_classes, share_C = len(frequencies), np.array(frequencies) / sum(frequencies)
    predicted_C = accuracy * share_C + (1 - accuracy) * (1 - share_C) / (num_classes - 1)
    truth = (2 * accuracy * share_C / (share_C + predicted_C)).mean()
    generator = np.random.default_rng(0)
    num_held = num_found = 0
    for seed in range(num_splits):
        labels = generator.choice(num_classes, num_rows, p=share_C)
        wrong = (labels + generator.integers(1, num_classes, num_rows)) % num_classes
        predictions = np.where(generator.random(num_rows) < accuracy, labels, wrong)
        found = bootstrap_macro_f1(labels, predictions, num_samples=300, seed=seed)
        if found is None:
            assert (labels == predictions).all()
            continue
        num_found += 1
        num_held += found.low <= truth <= found.high
        assert 0 <= found.low <= f1_score(labels, predictions, average="macro") <= found.high <= 1
    assert num_found > 0.8 * num_splits
    assert num_held / num_found == pytest.approx(0.95, abs=0.06)
