"""Calibration: how far a probability of 0.8 is from 8 right predictions in 10. Needs numpy, and scipy for the temperature.

A temperature divides all logits. It keeps every prediction, and makes the probabilities less extreme (above 1) or more so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.metrics import Integers

Floats = NDArray[np.floating[Any]]

TEMPERATURES = (0.05, 20.0)
"""Bounds of a fitted temperature. Predictions that are all right would otherwise ask for 0."""
MAX_BLOCK_CELLS = 1 << 22
"""Probabilities that are copied to float64 at once: a few copies of 32 MB."""
TINY = float(np.finfo(np.float32).tiny)
"""The least probability whose logarithm is taken. A softmax in float32 rounds smaller ones to 0."""


class CalibrationBin(NamedTuple):
    """Predictions with a confidence in (low, high]."""

    low: float
    high: float
    num_examples: int
    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float


def calibration_curve(
    labels_N: Integers, predictions_N: Integers, confidence_N: Floats, num_bins: int = 15
) -> list[CalibrationBin]:
    """Group predictions by their confidence in bins of equal width; empty bins are left out.

    Raises:
        ValueError: the arrays differ in shape.
    """
    if not labels_N.shape == predictions_N.shape == confidence_N.shape or labels_N.ndim != 1:
        raise ValueError(f"shapes {labels_N.shape}, {predictions_N.shape}, {confidence_N.shape}: not one of each per row")
    edges = np.linspace(0, 1, num_bins + 1)
    # Inner edges only: 0 belongs to the first bin, and so does 1 + rounding to the last.
    bins_N = np.searchsorted(edges[1:-1], confidence_N.astype(np.float64), side="left")
    right_N = labels_N == predictions_N
    counts, confidences, rights = (
        np.bincount(bins_N, weights=each, minlength=num_bins)
        for each in (None, confidence_N.astype(np.float64), right_N.astype(np.float64))
    )
    return [
        CalibrationBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            num_examples=int(counts[i]),
            confidence=float(confidences[i] / counts[i]),
            accuracy=float(rights[i] / counts[i]),
        )
        for i in np.flatnonzero(counts).tolist()
    ]


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Compute the mean distance of accuracy and confidence, each bin weighted by its examples.

    Raises:
        ValueError: the bins hold no example.
    """
    num_examples = sum(each.num_examples for each in bins)
    if num_examples == 0:
        raise ValueError("0 examples: the calibration error is undefined")
    return sum(each.num_examples * abs(each.accuracy - each.confidence) for each in bins) / num_examples


def fit_temperature(labels_N: Integers, probabilities_NC: Floats) -> float:
    """Fit the temperature with the least negative log-likelihood, within `TEMPERATURES`.

    Use rows that did not train the model, such as validation rows. Log-probabilities are logits up to a constant per row.

    Raises:
        ValueError: there is not one label in range per row, or there are no rows.
    """
    from scipy.optimize import minimize_scalar

    _check_labels(labels_N, probabilities_NC)

    def loss(log_temperature: float) -> float:
        return _mean_loss(labels_N, probabilities_NC, float(np.exp(log_temperature)))

    bounds = tuple(np.log(TEMPERATURES).tolist())
    found: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def is_at_bound(temperature: float) -> bool:
    """Return whether a fitted temperature is at one of `TEMPERATURES`, so that the best one lies beyond.

    >>> is_at_bound(0.0501), is_at_bound(1.7)
    (True, False)
    """
    low, high = TEMPERATURES
    return not 1.01 * low < temperature < high / 1.01


def apply_temperature(probabilities_NC: Floats, temperature: float) -> NDArray[np.float64]:
    """Return the probabilities that the logits divided by the temperature have.

    >>> apply_temperature(np.array([[0.9, 0.1]]), 2.0).round(3).tolist()
    [[0.75, 0.25]]
    """
    return np.exp(_scale(probabilities_NC, temperature))


def _scale(probabilities_BC: Floats, temperature: float) -> NDArray[np.float64]:
    """Return log-probabilities at a temperature."""
    logits_BC = np.log(np.maximum(probabilities_BC.astype(np.float64), TINY)) / temperature
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    return logits_BC - np.log(np.exp(logits_BC).sum(axis=1, keepdims=True))


def _mean_loss(labels_N: Integers, probabilities_NC: Floats, temperature: float) -> float:
    """Compute the mean loss at a temperature block by block, so that no float64 copy of everything is needed."""
    num_rows, num_classes = probabilities_NC.shape
    block = max(1, MAX_BLOCK_CELLS // num_classes)
    total = 0.0
    for start in range(0, num_rows, block):
        log_BC = _scale(probabilities_NC[start : start + block], temperature)
        total -= float(np.take_along_axis(log_BC, labels_N[start : start + block, None], axis=1).sum())
    return total / num_rows


def _check_labels(labels_N: Integers, probabilities_NC: Floats) -> None:
    if probabilities_NC.ndim != 2 or labels_N.shape != probabilities_NC.shape[:1] or not len(labels_N):
        raise ValueError(f"labels of shape {labels_N.shape}, probabilities of shape {probabilities_NC.shape}: not one row each")
    if labels_N.min() < 0 or labels_N.max() >= probabilities_NC.shape[1]:
        raise ValueError(f"labels {labels_N.min()} .. {labels_N.max()} outside the {probabilities_NC.shape[1]} classes")
