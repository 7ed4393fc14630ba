"""Comparison of two classifiers on the same rows: McNemar's exact test and intervals of the differences.

Both classifiers see the same rows, so their errors go together. A comparison row by row finds differences that two separate
intervals would hide.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.intervals import (
    Interval,
    add_pseudo_rows,
    count_kinds,
    draw_counts,
    has_enough_rows,
    macro_f1_of_draws,
    quantile_of_level,
)
from agnews_dist.evaluation.metrics import Integers, count_classes


class McNemar(NamedTuple):
    """Rows that only one of two classifiers has right, and the probability of such a difference by chance."""

    num_first_only: int
    num_second_only: int
    p_value: float
    """Two-sided and exact; 1.0 if both have the same rows right."""


class PairedDifference(NamedTuple):
    """A score of the second classifier minus that of the first."""

    value: float
    interval: Interval | None
    """Approximate; None: the rows do not allow one."""


def mcnemar_exact(labels_N: Integers, first_N: Integers, second_N: Integers) -> McNemar:
    """Test the hypothesis that two classifiers have the same accuracy, from their predictions for the same rows.

    >>> mcnemar_exact(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 0]))
    McNemar(num_first_only=3, num_second_only=0, p_value=0.25)

    Raises:
        ValueError: the arrays differ in shape.
    """
    from scipy.stats import binomtest

    _check_shapes(labels_N, first_N, second_N)
    first_right_N, second_right_N = first_N == labels_N, second_N == labels_N
    num_first_only = int(np.count_nonzero(first_right_N & ~second_right_N))
    num_second_only = int(np.count_nonzero(second_right_N & ~first_right_N))
    num_different = num_first_only + num_second_only
    if num_different == 0:
        return McNemar(0, 0, 1.0)
    found: Any = binomtest(num_first_only, num_different, 0.5)
    return McNemar(num_first_only, num_second_only, float(found.pvalue))


def bootstrap_differences(
    labels_N: Integers,
    first_N: Integers,
    second_N: Integers,
    num_classes: int,
    *,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Mapping[str, PairedDifference]:
    """Compute accuracy and macro F1 of the second minus the first, with approximate intervals by a bootstrap over rows.

    A drawn row counts for both classifiers. An interval is the difference without its bias in the draws, and the spread of the
    draws to both sides. It is None where all draws are equal, and for macro F1 as in `bootstrap_macro_f1`. `num_samples` is
    reduced where samples x kinds of rows exceed `MAX_WORK`. Returned keys: `accuracy`, `macro_f1`.

    Raises:
        ValueError: the arrays differ in shape, are empty, or hold a class outside 0 .. num_classes - 1.
    """
    _check_shapes(labels_N, first_N, second_N)
    if not len(labels_N):
        raise ValueError("0 examples: two classifiers cannot be compared")
    for predictions_N in (first_N, second_N):
        count_classes(labels_N, predictions_N, num_classes)  # raises for a class out of range
    kinds, counts_K = count_kinds(labels_N, first_N, second_N)
    smoothed, weights_J = add_pseudo_rows(kinds, counts_K)
    scores = {"accuracy": _subtract_accuracy, "macro_f1": _subtract_macro_f1}
    draws = [
        [score(drawn_SJ, *smoothed) for score in scores.values()]
        for drawn_SJ in draw_counts(weights_J, len(labels_N), num_samples=num_samples, seed=seed)
    ]
    has_interval = {"accuracy": True, "macro_f1": has_enough_rows(labels_N, first_N, second_N)}
    found: dict[str, PairedDifference] = {}
    for index, (name, score) in enumerate(scores.items()):
        values_S = np.concatenate([block[index] for block in draws])
        value = float(score(counts_K[None], *kinds)[0])
        bias = float(values_S.mean() - score(weights_J[None], *smoothed)[0])
        interval = _interval_of_draws(value, bias, values_S, level) if has_interval[name] else None
        found[name] = PairedDifference(value, interval)
    return found


def _subtract_accuracy(drawn_SK: NDArray[Any], labels_K: Integers, first_K: Integers, second_K: Integers) -> NDArray[Any]:
    gain_K = (second_K == labels_K).astype(np.int64) - (first_K == labels_K)
    return drawn_SK @ gain_K / drawn_SK.sum(axis=1)


def _subtract_macro_f1(drawn_SK: NDArray[Any], labels_K: Integers, first_K: Integers, second_K: Integers) -> NDArray[Any]:
    return macro_f1_of_draws(drawn_SK, labels_K, second_K) - macro_f1_of_draws(drawn_SK, labels_K, first_K)


def _interval_of_draws(value: float, bias: float, values_S: NDArray[np.float64], level: float) -> Interval | None:
    if np.ptp(values_S) == 0:
        return None
    middle, half = value - bias, quantile_of_level(level) * float(values_S.std())
    return Interval(max(-1.0, min(middle - half, value)), min(1.0, max(middle + half, value)))


def _check_shapes(labels_N: Integers, first_N: Integers, second_N: Integers) -> None:
    if not labels_N.shape == first_N.shape == second_N.shape or labels_N.ndim != 1:
        raise ValueError(f"shapes {labels_N.shape}, {first_N.shape}, {second_N.shape}: not the same rows")
