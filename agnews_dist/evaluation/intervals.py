"""Confidence intervals of accuracy and macro F1. Needs numpy, and scipy for Wilson's interval.

Drawing N rows with replacement is one multinomial draw over the cells of the confusion matrix. So the bootstrap needs counts
and not the rows, and costs the same for a thousand rows and for a million.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.metrics import Integers

MAX_DRAWN_CELLS = 1 << 20
"""Counts that are drawn at once: 8 MB."""


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


def wilson_interval(num_correct: int, num_examples: int, level: float = 0.95) -> Interval:
    """Compute Wilson's score interval of an accuracy.

    >>> [round(end, 3) for end in wilson_interval(9, 10)]
    [0.596, 0.982]

    Raises:
        ValueError: `num_correct` is not in 0 .. num_examples, or there are no examples.
    """
    from scipy.stats import binomtest

    if num_examples == 0:
        raise ValueError("0 examples: an accuracy has no interval")
    found: Any = binomtest(num_correct, num_examples).proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap_macro_f1(
    confusion: Sequence[Sequence[int]] | Integers, *, level: float = 0.95, num_samples: int = 2000, seed: int = 0
) -> Interval:
    """Compute the percentile bootstrap interval of macro F1, rows drawn with replacement.

    `confusion[i][j]` counts the examples of true class i that were predicted as class j.

    Raises:
        ValueError: the matrix is not square, or counts nothing.
    """
    counts_CC = np.asarray(confusion, dtype=np.int64)
    if counts_CC.ndim != 2 or counts_CC.shape[0] != counts_CC.shape[1] or counts_CC.sum() == 0:
        raise ValueError(
            f"a confusion matrix of shape {counts_CC.shape} with {counts_CC.sum()} examples: macro F1 is undefined"
        )
    labels_K, predictions_K = np.nonzero(counts_CC)
    draws = draw_counts(counts_CC[labels_K, predictions_K], num_samples=num_samples, seed=seed)
    return percentile_interval(
        np.concatenate([macro_f1_of_draws(drawn_SK, labels_K, predictions_K) for drawn_SK in draws]), level
    )


def draw_counts(counts_K: Integers, *, num_samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draw as many rows as `counts_K` sums up to, with replacement, and yield how often each kind occurs.

    The yielded blocks (samples, kinds) are small enough for memory. Together they have `num_samples` samples.
    """
    generator = np.random.default_rng(seed)
    num_rows = int(counts_K.sum())
    share_K = counts_K / num_rows
    block = max(1, MAX_DRAWN_CELLS // len(counts_K))
    for start in range(0, num_samples, block):
        yield generator.multinomial(num_rows, share_K, size=min(block, num_samples - start))


def macro_f1_of_draws(drawn_SK: NDArray[np.int64], labels_K: Integers, predictions_K: Integers) -> NDArray[np.float64]:
    """Compute macro F1 of each draw (S,), over the classes that occur among its labels or predictions.

    Kind k of row has the true class `labels_K[k]` and the predicted class `predictions_K[k]`.
    """
    classes, numbers = np.unique(np.concatenate([labels_K, predictions_K]), return_inverse=True)
    true_K, predicted_K = numbers[: len(labels_K)], numbers[len(labels_K) :]
    marked_SC = _sum_by_class(drawn_SK, true_K, len(classes)) + _sum_by_class(drawn_SK, predicted_K, len(classes))
    right_K = true_K == predicted_K
    hits_SC = _sum_by_class(drawn_SK[:, right_K], true_K[right_K], len(classes))
    f1_SC = 2 * hits_SC / np.maximum(marked_SC, 1)
    return f1_SC.sum(axis=1) / (marked_SC > 0).sum(axis=1)


def _sum_by_class(drawn_SK: NDArray[np.int64], class_K: Integers, num_classes: int) -> NDArray[np.int64]:
    """Sum the counts of all kinds with the same class: int64 (S, num_classes)."""
    sums_SC = np.zeros((len(drawn_SK), num_classes), np.int64)
    order_K = np.argsort(class_K, kind="stable")
    present, starts = np.unique(class_K[order_K], return_index=True)
    if len(present):
        sums_SC[:, present] = np.add.reduceat(drawn_SK[:, order_K], starts, axis=1)
    return sums_SC


def percentile_interval(values_S: NDArray[np.float64], level: float) -> Interval:
    """Return the interval that leaves out equal shares of the values at both ends."""
    low, high = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(low, high)
