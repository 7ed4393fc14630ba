"""Approximate confidence intervals of accuracy and macro F1. Needs numpy.

Drawing N rows with replacement is one multinomial draw over the kinds of rows: (true class, predicted class). So the bootstrap
needs counts and not the rows, and costs the same for a thousand rows and for a million.
"""

from collections.abc import Iterator, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.metrics import Integers

MIN_ROWS_PER_CLASS = 5
"""Mean rows per class that an interval of macro F1 takes. With fewer, its bias is as large as its width."""
PSEUDO_ROWS = 0.5
"""Rows that each class gets in addition for the draws."""
MAX_DRAWN_CELLS = 1 << 20
"""Counts that are drawn at once: 8 MB."""
MAX_WORK = 1 << 24
"""Counts that are drawn in all, some seconds. More kinds of rows get fewer samples, but at least `MIN_SAMPLES`."""
MIN_SAMPLES = 200


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


def wilson_interval(num_correct: float, num_examples: float, level: float = 0.95) -> Interval:
    """Compute Wilson's score interval of an accuracy. Counts may be fractions.

    >>> [round(end, 3) for end in wilson_interval(9, 10)]
    [0.596, 0.982]

    Raises:
        ValueError: `num_correct` is not in 0 .. num_examples, or there are no examples.
    """
    if num_examples <= 0 or not 0 <= num_correct <= num_examples:
        raise ValueError(f"{num_correct} of {num_examples} examples: an accuracy of them has no interval")
    z, share = quantile_of_level(level), num_correct / num_examples
    scale = 1 + z**2 / num_examples
    middle = (share + z**2 / (2 * num_examples)) / scale
    half = z / scale * (share * (1 - share) / num_examples + (z / (2 * num_examples)) ** 2) ** 0.5
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def quantile_of_level(level: float) -> float:
    """Return how many standard deviations an interval of a normal distribution has to each side.

    >>> round(quantile_of_level(0.95), 2)
    1.96
    """
    return NormalDist().inv_cdf((1 + level) / 2)


def student_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Compute Student's interval of a mean, for a few values that are about normally distributed. Needs scipy.

    >>> [round(end, 3) for end in student_interval([0.90, 0.91, 0.92])]
    [0.885, 0.935]

    Raises:
        ValueError: fewer than two values.
    """
    # scipy.stats has the same, and takes half a second to import.
    from scipy.special import stdtrit

    if len(values) < 2:
        raise ValueError(f"{len(values)} value: its mean has no interval")
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * stdev(values) / len(values) ** 0.5
    return Interval(fmean(values) - half, fmean(values) + half)


def bootstrap_macro_f1(
    labels_N: Integers, predictions_N: Integers, *, level: float = 0.95, num_samples: int = 2000, seed: int = 0
) -> Interval | None:
    """Compute an approximate interval of macro F1 by a bootstrap over rows; None: the rows do not allow one.

    Macro F1 of few rows is biased: rare classes vanish, and F1 is not a mean over rows. Draws are biased against the rows as
    the rows are against the truth, so that bias is subtracted. `add_pseudo_rows` smooths rare classes. The interval is Wilson's
    for the number of rows that has the spread of the draws, widened to the score if need be. None: fewer than
    `MIN_ROWS_PER_CLASS`, or all draws are equal.

    `num_samples` is reduced where samples x kinds of rows exceed `MAX_WORK`.

    Raises:
        ValueError: the arrays differ in shape, or are empty.
    """
    if labels_N.ndim != 1 or labels_N.shape != predictions_N.shape or not len(labels_N):
        raise ValueError(f"shapes {labels_N.shape}, {predictions_N.shape}: macro F1 takes a pair of classes for each row")
    if not has_enough_rows(labels_N, predictions_N):
        return None
    kinds, counts_K = count_kinds(labels_N, predictions_N)
    (labels_J, predictions_J), weights_J = add_pseudo_rows(kinds, counts_K)
    draws = draw_counts(weights_J, len(labels_N), num_samples=num_samples, seed=seed)
    values_S = np.concatenate([macro_f1_of_draws(drawn_SJ, labels_J, predictions_J) for drawn_SJ in draws])
    if np.ptp(values_S) == 0:
        return None
    score = float(macro_f1_of_draws(counts_K[None], *kinds)[0])
    bias = float(values_S.mean() - macro_f1_of_draws(weights_J[None], labels_J, predictions_J)[0])
    corrected = min(1.0, max(0.0, score - bias))
    num_rows = score * (1 - score) / float(values_S.var())
    low, high = wilson_interval(corrected * num_rows, num_rows, level)
    return Interval(min(low, score), max(high, score))


def has_enough_rows(labels_N: Integers, *predictions: Integers) -> bool:
    """Return whether there are `MIN_ROWS_PER_CLASS` on average, over the classes among labels or predictions."""
    num_classes = len(np.unique(np.concatenate([labels_N, *predictions])))
    return len(labels_N) >= MIN_ROWS_PER_CLASS * num_classes


def count_kinds(*columns: Integers) -> tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64]]:
    """Return the different rows of these columns, column by column, and how often each occurs.

    >>> kinds, counts = count_kinds(np.array([7, 7, 2]), np.array([5, 5, 9]))
    >>> [column.tolist() for column in kinds], counts.tolist()
    ([[2, 7], [9, 5]], [1, 2])
    """
    kinds_KD, counts_K = np.unique(np.stack(columns, axis=1).astype(np.int64), axis=0, return_counts=True)
    return tuple(kinds_KD.T), counts_K


def add_pseudo_rows(
    kinds: tuple[NDArray[np.int64], ...], counts_K: Integers
) -> tuple[tuple[NDArray[np.int64], ...], NDArray[np.float64]]:
    """Add `PSEUDO_ROWS` to each class, right and wrong as the rows of all classes are; return kinds and weights.

    Two rows of a class that are both right say little about it, but all draws from them are right too. The first column of
    `kinds` is the true class, each other one a prediction. A wrong prediction of a pseudo row is -1.
    """
    classes_C = np.unique(np.concatenate(kinds))
    right_KP = np.stack([predictions_K == kinds[0] for predictions_K in kinds[1:]], axis=1)
    patterns_MP, pattern_K = np.unique(right_KP, axis=0, return_inverse=True)
    share_M = np.bincount(pattern_K.reshape(-1), weights=counts_K) / counts_K.sum()
    labels_J = np.repeat(classes_C, len(patterns_MP))
    columns = [labels_J, *(np.where(np.tile(right_M, len(classes_C)), labels_J, -1) for right_M in patterns_MP.T)]
    weights_J = np.concatenate([counts_K.astype(np.float64), PSEUDO_ROWS * np.tile(share_M, len(classes_C))])
    return tuple(np.concatenate([kind_K, column_J]) for kind_K, column_J in zip(kinds, columns, strict=True)), weights_J


def draw_counts(
    weights_K: NDArray[np.floating[Any]] | Integers, num_rows: int, *, num_samples: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Draw rows with replacement, each kind in the share of its weight, and yield how often each occurs.

    The yielded blocks (samples, kinds) are small enough for memory. Together they have `num_samples` samples, or fewer within
    `MAX_WORK`.
    """
    generator = np.random.default_rng(seed)
    share_K = weights_K / weights_K.sum()
    num_samples = min(num_samples, max(MIN_SAMPLES, MAX_WORK // len(share_K)))
    block = max(1, MAX_DRAWN_CELLS // len(share_K))
    for start in range(0, num_samples, block):
        yield generator.multinomial(num_rows, share_K, size=min(block, num_samples - start))


def macro_f1_of_draws(drawn_SK: NDArray[Any], labels_K: Integers, predictions_K: Integers) -> NDArray[np.float64]:
    """Compute macro F1 of each draw (S,), over the classes that occur among its labels or predictions.

    Kind k of row has the true class `labels_K[k]` and the predicted class `predictions_K[k]`; -1 is none of the classes.
    """
    classes, numbers = np.unique(np.concatenate([labels_K, predictions_K]), return_inverse=True)
    true_K, predicted_K = numbers[: len(labels_K)], numbers[len(labels_K) :]
    marked_SC = _sum_by_class(drawn_SK, true_K, len(classes)) + _sum_by_class(drawn_SK, predicted_K, len(classes))
    marked_SC[:, classes < 0] = 0
    right_K = true_K == predicted_K
    hits_SC = _sum_by_class(drawn_SK[:, right_K], true_K[right_K], len(classes))
    f1_SC = 2 * hits_SC / np.maximum(marked_SC, 1)
    return f1_SC.sum(axis=1) / (marked_SC > 0).sum(axis=1)


def _sum_by_class(drawn_SK: NDArray[Any], class_K: Integers, num_classes: int) -> NDArray[Any]:
    """Sum the counts of all kinds with the same class: (S, num_classes)."""
    sums_SC = np.zeros((len(drawn_SK), num_classes), drawn_SK.dtype)
    order_K = np.argsort(class_K, kind="stable")
    present, starts = np.unique(class_K[order_K], return_index=True)
    if len(present):
        sums_SC[:, present] = np.add.reduceat(drawn_SK[:, order_K], starts, axis=1)
    return sums_SC
