"""Probes against scikit-learn's own steps, and the rule that finds the end of the rise."""

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
    choose_probe_rows,
    compare_views,
    find_end_of_rise,
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


def make_scores(p_values: list[float], best: int) -> list[LayerScore]:
    """Return scores of layers 0 to 3, then of layer 3 after the norm."""
    views = [*(View(layer, "last") for layer in range(4)), View(3, "last", is_normed=True)]
    return [
        LayerScore(view, 0.1, 50, 0.5, Interval(0.4, 0.6), 0.5, p, 16, is_best=number == best)
        for number, (view, p) in enumerate(zip(views, p_values, strict=True))
    ]


@pytest.mark.parametrize(
    ("p_values", "best", "first", "above"),
    [
        ([0.001, 0.01, 0.2, 0.9, 1.0], 4, "2", 1),
        ([0.001, 0.01, 0.02, 0.03, 1.0], 4, "3 + norm", 0),
        ([0.001, 0.01, 1.0, 0.001, 0.001], 2, "2", 1),
        ([0.2, 0.01, 0.3, 1.0, 0.2], 3, "2", 1),  # layer 0 is close by chance
        ([1.0, 0.5, 0.5, 0.5, 0.5], 0, "0", 3),
    ],
)
def test_the_rise_ends_where_no_layer_up_to_the_best_is_worse(p_values: list[float], best: int, first: str, above: int) -> None:
    found = find_end_of_rise(make_scores(p_values, best), "last", num_blocks=3, num_rows=100)
    assert (found.first.view.layer_name, found.num_above) == (first, above)
    assert found.smallest == pytest.approx(1.96 * 4 / 100, abs=1e-3)
