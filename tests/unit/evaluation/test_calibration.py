"""Calibration against loops in numpy, planted temperatures and scikit-learn's log loss."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from agnews_dist.evaluation.calibration import (
    apply_temperature,
    calibration_curve,
    expected_calibration_error,
    fit_temperature,
    is_at_bound,
)


def plant(temperature: float, num_classes: int = 4, num_rows: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels from a softmax; return them, its logits, and probabilities too extreme by that temperature."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(num_rows, num_classes)) * 1.5
    labels = (softmax(logits, axis=1).cumsum(axis=1) > generator.random((num_rows, 1))).argmax(axis=1)
    return labels, logits, softmax(logits * temperature, axis=1).astype(np.float32)


@pytest.mark.parametrize("num_bins", [10, 15])
def test_curve_and_error_equal_a_loop(num_bins: int) -> None:
    labels, _, probabilities = plant(2.0, num_rows=3000)
    confidence, predictions = probabilities.max(axis=1), probabilities.argmax(axis=1)
    confidence[:4] = [1.0, np.float32(1 + 1e-7), 0.0, 0.4]
    bins = calibration_curve(labels, predictions, confidence, num_bins)
    expected, error = [], 0.0
    for i in range(num_bins):
        low, high = np.linspace(0, 1, num_bins + 1)[i : i + 2]
        above = confidence > low if i else confidence >= 0
        rows = above & (confidence.astype(np.float64) <= high if i < num_bins - 1 else True)
        if rows.any():
            accuracy, mean = (labels == predictions)[rows].mean(), confidence[rows].astype(np.float64).mean()
            expected.append((low, high, rows.sum(), mean, accuracy))
            error += rows.mean() * abs(accuracy - mean)
    np.testing.assert_allclose(bins, expected)
    assert len(bins) < num_bins, "some are empty"
    assert expected_calibration_error(bins) == pytest.approx(error, rel=1e-12)


def test_error_of_hand_made_predictions() -> None:
    confidence = np.array([0.85, 0.85, 0.85, 0.85, 0.55])
    bins = calibration_curve(np.array([0, 0, 0, 1, 1]), np.zeros(5, np.int64), confidence, 10)
    assert [each.num_examples for each in bins] == [1, 4]
    assert expected_calibration_error(bins) == pytest.approx((4 * 0.1 + 1 * 0.55) / 5)
    with pytest.raises(ValueError, match="0 examples"):
        expected_calibration_error([])


@pytest.mark.parametrize("temperature", [2.5, 1.0, 0.4])
def test_a_planted_temperature_is_recovered(temperature: float) -> None:
    labels, _, probabilities = plant(temperature)
    assert fit_temperature(labels, probabilities) == pytest.approx(temperature, rel=0.05)


def test_a_fitted_temperature_calibrates() -> None:
    labels, logits, probabilities = plant(2.5)
    scaled = apply_temperature(probabilities, fit_temperature(labels, probabilities))
    np.testing.assert_allclose(apply_temperature(probabilities, 2.5), softmax(logits, axis=1), atol=1e-6)
    np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
    before, after = (
        expected_calibration_error(calibration_curve(labels, each.argmax(axis=1), each.max(axis=1)))
        for each in (probabilities, scaled)
    )
    assert after < 0.02 < 0.1 < before


def test_fit_temperature_equals_a_search_with_scikit_learns_loss() -> None:
    labels, _, probabilities = plant(1.5, 300, num_rows=2000)
    values = probabilities.astype(np.float64)
    losses = {t: log_loss(labels, softmax(np.log(values) / t, axis=1), labels=np.arange(300)) for t in np.linspace(1.2, 2, 81)}
    assert fit_temperature(labels, probabilities) == pytest.approx(min(losses, key=losses.__getitem__), abs=0.011)


def test_fit_temperature_stays_within_its_bounds() -> None:
    probabilities, labels = np.array([[1, 0], [0, 1], [1, 0]], np.float32), np.array([0, 1, 1])
    assert np.isfinite(apply_temperature(probabilities, 0.05)).all()
    # 1 of 3 is wrong: the best probability of each prediction is 2/3, beyond the upper bound of the temperature.
    flat = fit_temperature(labels, probabilities)
    sharp = fit_temperature(np.array([0, 1, 0]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]))
    assert (flat, sharp) == (pytest.approx(20, rel=0.01), pytest.approx(0.05, rel=0.01))
    assert is_at_bound(flat)
    assert is_at_bound(sharp)


def test_temperature_follows_extreme_logits() -> None:
    probabilities = softmax(np.array([[0.0, -60.0, -70.0]]), axis=1)
    expected = log_softmax(np.array([[0.0, -6.0, -7.0]]), axis=1)
    np.testing.assert_allclose(np.log(apply_temperature(probabilities, 10)), expected, rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 2], [0, -1], [0], []])
def test_labels_that_do_not_fit_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"outside the 2 classes|not one row each"):
        fit_temperature(np.array(labels, np.int64), np.full((2, 2), 0.5))


def test_curve_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match="not one of each per row"):
        calibration_curve(np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(3))
