"""Scores of one split from its stored predictions: intervals, classes, calibration, mistakes, confused pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.calibration import (
    CalibrationBin,
    apply_temperature,
    calibration_curve,
    expected_calibration_error,
    fit_temperature,
)
from agnews_dist.evaluation.intervals import Interval, bootstrap_macro_f1, wilson_interval
from agnews_dist.evaluation.metrics import MAX_DENSE_CLASSES, compute_class_scores, compute_scores, count_classes
from agnews_dist.events import ClassScores, Scores
from agnews_dist.report.pages.stored_run import StoredPredictions, StoredRun

NUM_MISTAKES = 50
"""Most confident mistakes that are shown."""
NUM_PAIRS = 10
NUM_PAIR_ROWS = 3
"""Most confused pairs of classes that are shown, and texts of each."""


@dataclass(frozen=True)
class ConfusedPair:
    """Texts of class `label` that were predicted as class `prediction`."""

    label: int
    prediction: int
    num_examples: int
    share: float
    """Share of the texts of class `label`."""
    rows: tuple[int, ...]
    """The most confident of them."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Distance of the confidence of predictions from their accuracy."""

    bins: tuple[CalibrationBin, ...]
    error: float
    """Expected calibration error (ECE)."""
    num_left_out: int
    """Texts without a finite probability."""
    temperature: float | None
    """Fitted on validation, for the main split; None: see `no_temperature`."""
    no_temperature: str
    """Reason why no temperature was fitted."""
    error_with_temperature: float | None
    """None also for validation: the error of the rows that the temperature was fitted on would be too small."""


@dataclass(frozen=True, kw_only=True)
class SplitDetails:
    """Everything that the report shows of one labelled split."""

    split: str
    scores: Scores
    """Without the loss, which result.json has."""
    accuracy_interval: Interval
    macro_f1_interval: Interval | None
    """None: the rows do not allow one."""
    classes: tuple[ClassScores, ...]
    calibration: Calibration | None
    """None: no text has a finite probability."""
    mistakes: tuple[int, ...]
    """Rows, the most confident first."""
    pairs: tuple[ConfusedPair, ...]


def describe_split(run: StoredRun, split: str) -> SplitDetails:
    """Compute the details of a labelled split."""
    stored, num_classes = run.predictions[split], len(run.class_names)
    labels_N, predictions_N = stored.labels_N, stored.predictions_N
    scores = compute_scores(labels_N, predictions_N, num_classes, float("nan"))
    counts = count_classes(labels_N, predictions_N, num_classes)
    return SplitDetails(
        split=split,
        scores=scores,
        accuracy_interval=wilson_interval(scores.num_correct, scores.num_examples),
        macro_f1_interval=bootstrap_macro_f1(labels_N, predictions_N),
        classes=compute_class_scores(counts, np.arange(num_classes), run.class_names),
        calibration=_calibrate(run, split),
        mistakes=tuple(_sort_by_confidence(stored, np.flatnonzero(labels_N != predictions_N))[:NUM_MISTAKES]),
        pairs=tuple(_find_pairs(stored)),
    )


def _calibrate(run: StoredRun, split: str) -> Calibration | None:
    stored = run.predictions[split]
    finite_N = np.isfinite(stored.confidence_N)
    if not finite_N.any():
        return None
    labels_N, predictions_N = stored.labels_N[finite_N], stored.predictions_N[finite_N]
    bins = calibration_curve(labels_N, predictions_N, stored.confidence_N[finite_N])
    temperature = error = None
    reason = _find_obstacle(run, split)
    # One fit a run: only the main split shows it.
    if not reason and split == run.main_split:
        validation = run.predictions["validation"]
        temperature = fit_temperature(validation.labels_N, validation.probabilities_NK)
        if split != "validation":
            scaled_NC = apply_temperature(stored.probabilities_NK, temperature)
            scaled_N = scaled_NC[np.arange(len(scaled_NC)), stored.predictions_N]
            error = expected_calibration_error(calibration_curve(labels_N, predictions_N, scaled_N))
    return Calibration(
        bins=tuple(bins),
        error=expected_calibration_error(bins),
        num_left_out=int((~finite_N).sum()),
        temperature=temperature,
        no_temperature=reason,
        error_with_temperature=error,
    )


def _find_obstacle(run: StoredRun, split: str) -> str:
    """Return why a temperature cannot be fitted for a split; an empty string: it can."""
    if not run.is_labelled("validation"):
        return "the run has no labelled validation split"
    for stored in (run.predictions["validation"], run.predictions[split]):
        if stored.classes_NK is not None:
            return f"of more than {MAX_DENSE_CLASSES} classes only the most probable ones are kept"
        if not stored.has_all_probabilities:
            return "not every probability is finite"
    return ""


def _sort_by_confidence(stored: StoredPredictions, rows_N: NDArray[np.int64]) -> list[int]:
    """Sort rows by the probability of their prediction, the highest first; equal ones keep the order of the file."""
    return rows_N[np.argsort(-stored.confidence_N[rows_N], kind="stable")].tolist()


def _find_pairs(stored: StoredPredictions) -> Sequence[ConfusedPair]:
    """Find the pairs of classes that are confused most often."""
    wrong_N = np.flatnonzero(stored.labels_N != stored.predictions_N)
    pairs_N2 = np.stack([stored.labels_N[wrong_N], stored.predictions_N[wrong_N]], axis=1)
    pairs, group_N, counts = np.unique(pairs_N2, axis=0, return_inverse=True, return_counts=True)
    found: list[ConfusedPair] = []
    for number in np.argsort(-counts, kind="stable")[:NUM_PAIRS].tolist():
        label, prediction = pairs[number].tolist()
        rows = _sort_by_confidence(stored, wrong_N[group_N.reshape(-1) == number])
        share = int(counts[number]) / int((stored.labels_N == label).sum())
        found.append(ConfusedPair(label, prediction, int(counts[number]), share, tuple(rows[:NUM_PAIR_ROWS])))
    return found
