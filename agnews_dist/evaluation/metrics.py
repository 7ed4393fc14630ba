"""Confusion matrix, accuracy, macro F1, loss, and the check that every example was scored once.

Needs numpy only. Counts are integers and add up over ranks, so scores do not depend on how examples were divided over ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnews_dist.events import Scores

Integers = NDArray[np.integer[Any]]

MAX_LISTED = 10
"""Row numbers that an error lists before it counts the rest."""


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Scores of one class. A ratio with denominator 0 is NaN."""

    num_examples: int
    precision: float
    """Correct predictions of this class / predictions of this class."""
    recall: float
    """Correct predictions of this class / examples of this class."""
    f1: float
    """2 x correct predictions / (examples + predictions)."""


def confusion_matrix(labels_N: Integers, predictions_N: Integers, num_classes: int) -> NDArray[np.int64]:
    """Count pairs of true class (row) and predicted class (column).

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]

    Raises:
        ValueError: the arrays differ in shape, or contain a class outside 0 .. num_classes - 1.
    """
    if labels_N.ndim != 1 or labels_N.shape != predictions_N.shape:
        raise ValueError(f"labels of shape {labels_N.shape}, predictions of shape {predictions_N.shape}: not one pair each")
    # int8 labels would overflow in the product below.
    labels_N = labels_N.astype(np.int64, casting="same_kind")
    predictions_N = predictions_N.astype(np.int64, casting="same_kind")
    for name, classes_N in (("label", labels_N), ("prediction", predictions_N)):
        # bincount would silently count a class out of range in a wrong cell.
        outside_N = classes_N[(classes_N < 0) | (classes_N >= num_classes)]
        if outside_N.size:
            raise ValueError(f"{name} {outside_N[0]} outside the {num_classes} classes 0 .. {num_classes - 1}")
    counts = np.bincount(labels_N * num_classes + predictions_N, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def compute_class_scores(confusion_CC: Integers) -> list[ClassScores]:
    """Compute precision, recall and F1 of every class."""
    hits_C = np.diag(confusion_CC).astype(np.float64)
    examples_C = confusion_CC.sum(axis=1)
    predicted_C = confusion_CC.sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision_C = hits_C / predicted_C
        recall_C = hits_C / examples_C
        f1_C = 2 * hits_C / (examples_C + predicted_C)
    return [
        ClassScores(num_examples=int(count), precision=float(precision), recall=float(recall), f1=float(f1))
        for count, precision, recall, f1 in zip(examples_C, precision_C, recall_C, f1_C, strict=True)
    ]


def compute_scores(confusion_CC: Integers, loss_sum: float) -> Scores:
    """Compute the scores of a confusion matrix. `loss_sum`: sum of its examples' losses.

    Macro F1 is the mean F1 over the classes that occur among labels or predictions. A class with examples but without
    predictions, or the reverse, counts with F1 0. This equals scikit-learn's `f1_score(..., average="macro")`.

    Raises:
        ValueError: the matrix counts no example. The checks of the data refuse an empty split earlier.
    """
    num_examples = int(confusion_CC.sum())
    if num_examples == 0:
        raise ValueError("0 examples were scored: accuracy is undefined")
    num_correct = int(np.trace(confusion_CC))
    return Scores(
        num_examples=num_examples,
        num_correct=num_correct,
        accuracy=num_correct / num_examples,
        macro_f1=float(np.nanmean([scores.f1 for scores in compute_class_scores(confusion_CC)])),
        loss=loss_sum / num_examples,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion_CC),
    )


def in_file_order(ids_N: Integers, num_examples: int) -> NDArray[np.int64]:
    """Return the permutation that sorts gathered results: `values_N[in_file_order(ids_N, n)]` is in file order.

    `ids_N` are the row numbers of results gathered from all ranks, a permutation of 0 .. num_examples - 1.

    >>> in_file_order(np.array([2, 0, 1]), 3).tolist()
    [1, 2, 0]

    Raises:
        RuntimeError: rows are missing, scored twice, or not of this split. This is a bug in the sharding of batches.
    """
    known_N = (ids_N >= 0) & (ids_N < num_examples)
    seen_N = np.bincount(ids_N[known_N].astype(np.int64, casting="same_kind"), minlength=num_examples)
    faults = [
        f"{name}: {_format_ids(ids)}"
        for name, ids in (
            ("missing", np.flatnonzero(seen_N == 0)),
            ("scored more than once", np.flatnonzero(seen_N > 1)),
            ("not of this split", np.unique(ids_N[~known_N])),
        )
        if ids.size
    ]
    if faults:
        raise RuntimeError(
            f"{ids_N.size} results gathered for {num_examples} examples do not match one to one ({'; '.join(faults)})"
        )
    order_N = np.empty(num_examples, np.int64)
    order_N[ids_N] = np.arange(num_examples)
    return order_N


def _format_ids(ids: Integers) -> str:
    listed = ", ".join(str(int(row)) for row in ids[:MAX_LISTED])
    return listed if ids.size <= MAX_LISTED else f"{listed} and {ids.size - MAX_LISTED} more"
