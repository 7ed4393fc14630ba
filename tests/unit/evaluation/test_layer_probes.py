"""Probes against scikit-learn's own steps, and the rule that chooses the cut."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from agnews_dist.evaluation.intervals import Interval
from agnews_dist.evaluation.layer_features import View
from agnews_dist.evaluation.layer_probes import (
    STRENGTHS,
    LayerScore,
    ProbeFit,
    check_rows,
    choose_cut,
    choose_probe_rows,
    compare_views,
    fit_probe,
    split_rows,
)
from agnews_dist.evaluation.linear_model import TooCostlyError


def draw_rows(num_rows: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows of three overlapping classes; columns differ in scale a hundredfold."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % 3
    centres = np.random.default_rng(9).normal(size=(3, 12))
    values = (centres[labels] + rng.normal(scale=spread, size=(num_rows, 12))) * np.geomspace(0.1, 10, 12)
    return values.astype(np.float32), labels


def predict_by_hand(train: np.ndarray, labels: np.ndarray, scored: np.ndarray, strength: float) -> np.ndarray:
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=strength, tol=1e-3, max_iter=100)
    return model.fit(scaler.transform(train), labels).predict(scaler.transform(scored))


def test_fit_probe_chooses_the_strength_on_held_out_rows_and_fits_all() -> None:
    train, labels = draw_rows(300, 0)
    scored, truth = draw_rows(200, 1)
    kept, held = split_rows(labels, seed=0)
    assert sorted([*kept, *held]) == list(range(300))
    assert len(held) == 60
    accuracies = [(predict_by_hand(train[kept], labels[kept], train[held], c) == labels[held]).mean() for c in STRENGTHS]
    assert len(set(accuracies)) > 1
    fit = fit_probe(train, labels, scored, seed=0)
    assert fit.strength == STRENGTHS[int(np.argmax(accuracies))]
    assert (fit.predictions_N == predict_by_hand(train, labels, scored, fit.strength)).all()
    assert (fit.predictions_N == truth).mean() > 0.7


def test_a_class_of_one_row_is_kept_for_the_fit() -> None:
    labels = np.array([0] * 20 + [1])
    for seed in range(5):
        kept, held = split_rows(labels, seed)
        assert 20 in kept
        assert len(held) >= 3


@pytest.mark.parametrize("labels", [np.arange(9) % 2, np.arange(40)])
def test_too_few_rows_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(TooCostlyError, match="too few to hold some out"):
        check_rows(labels, 0)


def test_rows_are_chosen_by_the_time() -> None:
    train, labels = draw_rows(3000, 0)
    assert len(choose_probe_rows(train, labels, max_seconds=1000, seed=0)) == 3000
    with pytest.raises(TooCostlyError, match="500 rows need more than"):
        choose_probe_rows(train, labels, max_seconds=1e-6, seed=0)


def test_compare_views_tests_each_layer_against_the_best_of_its_pooling() -> None:
    truth = np.arange(60) % 3
    answers = {("last", 0): 20, ("mean", 0): 55, ("last", 1): 41, ("mean", 1): 55}
    views = [View(layer, pooling) for pooling, layer in answers]
    fits = [ProbeFit(0.1, np.where(np.arange(60) < right, truth, (truth + 1) % 3), 0.0) for right in answers.values()]
    found = compare_views(views, fits, truth, 3)
    assert [each.num_correct for each in found] == [20, 55, 41, 55]
    # Of equal layers the lower one is the best.
    assert [each.is_best for each in found] == [False, True, True, False]
    assert found[0].p_value == pytest.approx(binomtest(0, 21).pvalue)
    assert found[0].num_different == 21
    assert [each.is_close for each in found] == [False, True, True, True]
    wilson = binomtest(41, 60).proportion_ci(0.95, method="wilson")
    assert found[2].interval == pytest.approx((wilson.low, wilson.high))


def make_scores(num_correct: list[int], num_different: list[int]) -> list[LayerScore]:
    """Return scores of layers 0 to 3, then of layer 3 after the norm."""
    views = [*(View(layer, "last") for layer in range(4)), View(3, "last", is_normed=True)]
    best = num_correct.index(max(num_correct))
    return [
        LayerScore(view, 0.1, right, right / 100, Interval(0.4, 0.6), 0.5, 1.0, different, is_best=number == best)
        for number, (view, right, different) in enumerate(zip(views, num_correct, num_different, strict=True))
    ]


@pytest.mark.parametrize(
    ("num_correct", "num_different", "cut", "above"),
    [
        ([40, 50, 60, 70, 80], [40, 30, 20, 10, 0], "3 + norm", 0),
        ([40, 50, 80, 60, 50], [40, 30, 0, 20, 30], "2", 1),
        # 4 worse, 16 rows apart: an error of 3.98 rows; 3 worse: one of 3.99.
        ([40, 80, 76, 50, 50], [40, 0, 16, 30, 30], "1", 2),
        ([40, 80, 77, 50, 50], [40, 0, 16, 30, 30], "2", 1),
        ([80, 79, 78, 79, 50], [0, 9, 9, 9, 30], "3", 0),
        ([80, 60, 50, 50, 50], [0, 20, 30, 30, 30], "0", 3),
    ],
)
def test_the_cut_is_the_highest_layer_within_one_paired_error(
    num_correct: list[int], num_different: list[int], cut: str, above: int
) -> None:
    found = choose_cut(make_scores(num_correct, num_different), "last", num_blocks=3, num_rows=100)
    assert (found.cut.view.layer_name, found.num_above) == (cut, above)


def test_the_error_is_that_of_the_paired_difference() -> None:
    truth = np.zeros(100, np.int64)
    left, right = (np.where(np.isin(np.arange(100), wrong), 1, 0) for wrong in (range(12), range(8, 22)))
    scores = compare_views([View(0, "last"), View(1, "last")], [ProbeFit(0.1, each, 0.0) for each in (left, right)], truth, 3)
    found = choose_cut(scores, "last", num_blocks=1, num_rows=100)
    differences = (left == truth).astype(float) - (right == truth)
    assert found.cut.view.layer == 1
    assert found.standard_error == pytest.approx(differences.std() / 10)
