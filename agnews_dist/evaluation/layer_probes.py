"""Probes: a standardised logistic regression on each view of the frozen model, compared on the same rows. Needs scikit-learn.

The strength of the L2 penalty is chosen for each view on held-out training rows. Only then are the scored rows predicted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.intervals import Interval, wilson_interval
from agnews_dist.evaluation.layer_features import Floats, Pooling, View
from agnews_dist.evaluation.linear_model import (
    MAX_CELLS,
    TooCostlyError,
    choose_rows,
    ignore_warnings,
    make_feature_classifier,
    order_stratified,
)
from agnews_dist.evaluation.metrics import Integers, compute_scores
from agnews_dist.evaluation.paired import mcnemar_exact

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Values of scikit-learn's C that are tried: the inverse strength of the penalty on weights of scaled features."""
HELD_SHARE = 0.2
"""Share of the training rows on which the strength is chosen."""
SIGNIFICANT = 0.05
"""Limit of p below which a layer counts as worse than the best."""
MIN_TRAIN_ROWS = 10


class ProbeFit(NamedTuple):
    """Result of one probe."""

    strength: float
    """The chosen C."""
    predictions_N: NDArray[np.int64]
    """Predictions for the scored rows."""
    seconds: float


@dataclass(frozen=True)
class LayerScore:
    """Scores of one view."""

    view: View
    strength: float
    num_correct: int
    accuracy: float
    interval: Interval
    """Wilson's, at 95 %."""
    macro_f1: float
    p_value: float
    """McNemar's exact test against the best layer with the same pooling."""
    num_different: int
    """Rows that only one of these two has right."""
    is_best: bool
    """Highest accuracy of its pooling; the lowest such layer."""

    @property
    def is_close(self) -> bool:
        """True if it is not distinguishable from the best."""
        return self.p_value >= SIGNIFICANT


class Conclusion(NamedTuple):
    """The layer to cut at, for one pooling."""

    best: LayerScore
    cut: LayerScore
    """The highest layer within one standard error of the best."""
    num_above: int
    """Blocks above `cut`."""
    standard_error: float
    """Standard error of the difference in accuracy between `cut` and the best."""


def split_rows(labels_N: Integers, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split training rows: those that are kept, with one of each class at least, and those held out."""
    order_N = order_stratified(labels_N, seed)
    is_kept_N = np.arange(len(order_N)) < round((1 - HELD_SHARE) * len(order_N))
    is_kept_N[np.unique(labels_N[order_N], return_index=True)[1]] = True
    return order_N[is_kept_N], order_N[~is_kept_N]


def check_rows(labels_N: Integers, seed: int) -> None:
    """Check that there are enough training rows to choose a strength on some of them.

    Raises:
        TooCostlyError: there are not.
    """
    if len(labels_N) < MIN_TRAIN_ROWS or not len(split_rows(labels_N, seed)[1]):
        classes = len(np.unique(labels_N))
        raise TooCostlyError(f"{len(labels_N):,} training rows of {classes:,} classes are too few to hold some out")


def fit_probe(train_ND: Floats, labels_N: Integers, scored_ND: Floats, *, seed: int) -> ProbeFit:
    """Fit the probe of one view, and predict the scored rows."""
    from sklearn.model_selection import GridSearchCV

    begin = time.perf_counter()
    kept_N, held_N = split_rows(labels_N, seed)
    # A small fit that is only timed may have no rows to hold out.
    folds = [(kept_N, held_N if len(held_N) else kept_N)]
    options: dict[str, Any] = {"cv": folds, "error_score": "raise"}
    block = max(1, MAX_CELLS // 8 // len(np.unique(labels_N)))
    with ignore_warnings():
        # Of equal accuracies it takes the first: the strongest penalty. Then it fits all rows.
        search: Any = GridSearchCV(make_feature_classifier(), {"logisticregression__C": list(STRENGTHS)}, **options)
        probe = search.fit(train_ND, labels_N)
        parts = [probe.predict(scored_ND[i : i + block]) for i in range(0, len(scored_ND), block)]
    strength = float(probe.best_params_["logisticregression__C"])
    return ProbeFit(strength, np.concatenate([np.zeros(0, np.int64), *parts]), time.perf_counter() - begin)


def choose_probe_rows(train_ND: Floats, labels_N: Integers, *, max_seconds: float, seed: int) -> NDArray[np.int64]:
    """Choose as many training rows as one probe can be fitted on in the time; see `choose_rows`.

    Raises:
        TooCostlyError: the time is too short, or there are too few rows.
    """
    import_module("sklearn.model_selection")  # takes seconds, which are not those of a fit

    def fit(rows_R: NDArray[np.int64]) -> object:
        return fit_probe(train_ND[rows_R], labels_N[rows_R], train_ND[:0], seed=seed)

    rows_R = choose_rows(labels_N, fit, max_rows=len(labels_N), max_seconds=max_seconds, seed=seed)
    check_rows(labels_N[rows_R], seed)
    return rows_R


def compare_views(views: Sequence[View], fits: Sequence[ProbeFit], labels_N: Integers, num_classes: int) -> list[LayerScore]:
    """Score every view, and test it against the best layer with the same pooling."""
    found = [compute_scores(labels_N, fit.predictions_N, num_classes, loss_sum=0.0) for fit in fits]
    best: dict[Pooling, int] = {}
    for number, view in enumerate(views):
        if view.pooling not in best or found[number].num_correct > found[best[view.pooling]].num_correct:
            best[view.pooling] = number
    scores: list[LayerScore] = []
    for number, (view, fit, each) in enumerate(zip(views, fits, found, strict=True)):
        test = mcnemar_exact(labels_N, fit.predictions_N, fits[best[view.pooling]].predictions_N)
        scores.append(
            LayerScore(
                view,
                fit.strength,
                each.num_correct,
                each.accuracy,
                wilson_interval(each.num_correct, each.num_examples),
                each.macro_f1,
                test.p_value,
                test.num_first_only + test.num_second_only,
                is_best=number == best[view.pooling],
            )
        )
    return scores


def choose_cut(scores: Sequence[LayerScore], pooling: Pooling, *, num_blocks: int, num_rows: int) -> Conclusion:
    """Choose the highest layer whose accuracy is within one standard error of the best: the fewest blocks to train.

    The error is that of the difference on the same rows. This is the one-standard-error rule of Breiman et al. 1984.
    """
    own = [score for score in scores if score.view.pooling == pooling]
    best = next(score for score in own if score.is_best)

    def error(score: LayerScore) -> float:
        difference = best.num_correct - score.num_correct
        return (score.num_different - difference**2 / num_rows) ** 0.5 / num_rows

    cut = next(score for score in reversed(own) if best.num_correct - score.num_correct <= num_rows * error(score))
    return Conclusion(best, cut, num_blocks - cut.view.layer, error(cut))
