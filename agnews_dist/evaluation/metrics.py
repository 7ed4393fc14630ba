"""Scores from labels and predictions, and the check that every example was scored once.

Needs numpy only. Counts are integers and add up over ranks, so scores do not depend on how examples were divided over ranks.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import format_ids
from agnews_dist.events import ClassScores, Scores

Integers = NDArray[np.integer[Any]]

MAX_DENSE_CLASSES = 256
"""Most classes of a confusion matrix, and of a row that holds the probability of every class."""
MAX_LISTED_CLASSES = 20
"""Most classes that a table lists one by one."""
NUM_LOWEST = 5
"""Classes that a table lists where there are more: those with the lowest F1."""


class ClassCounts(NamedTuple):
    """Examples, predictions and correct predictions of every class."""

    examples_C: NDArray[np.int64]
    predicted_C: NDArray[np.int64]
    hits_C: NDArray[np.int64]


def are_labelled(labels_N: Integers, num_classes: int) -> bool:
    """Check the labels of a split; return False if all are -1, so that it can be predicted but not scored.

    Raises:
        ValueError: a label is not a class. Also a -1 next to other labels is not one.
    """
    if labels_N.size and (labels_N == -1).all():
        return False
    _check_classes("label", labels_N, num_classes)
    return True


def confusion_matrix(labels_N: Integers, predictions_N: Integers, num_classes: int) -> NDArray[np.int64]:
    """Count pairs of true class (row) and predicted class (column).

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]

    Raises:
        ValueError: the arrays differ in shape, or contain a class outside 0 .. num_classes - 1.
    """
    labels_N, predictions_N = _check_pairs(labels_N, predictions_N, num_classes)
    counts = np.bincount(labels_N * num_classes + predictions_N, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def count_classes(labels_N: Integers, predictions_N: Integers, num_classes: int) -> ClassCounts:
    """Count examples, predictions and correct predictions of every class.

    >>> [counts.tolist() for counts in count_classes(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)]
    [[2, 1], [1, 2], [1, 1]]

    Raises:
        ValueError: as `confusion_matrix`.
    """
    labels_N, predictions_N = _check_pairs(labels_N, predictions_N, num_classes)
    classes = (labels_N, predictions_N, labels_N[labels_N == predictions_N])
    return ClassCounts(*(np.bincount(each, minlength=num_classes).astype(np.int64) for each in classes))


def _check_pairs(labels_N: Integers, predictions_N: Integers, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Check labels and predictions; return both as int64. A product of int8 labels would overflow."""
    if labels_N.ndim != 1 or labels_N.shape != predictions_N.shape:
        raise ValueError(f"labels of shape {labels_N.shape}, predictions of shape {predictions_N.shape}: not one pair each")
    _check_classes("label", labels_N, num_classes)
    _check_classes("prediction", predictions_N, num_classes)
    return labels_N.astype(np.int64, casting="same_kind"), predictions_N.astype(np.int64, casting="same_kind")


def _check_classes(name: str, classes_N: Integers, num_classes: int) -> None:
    # bincount would silently count a class out of range in a wrong cell.
    outside_N = classes_N[(classes_N < 0) | (classes_N >= num_classes)]
    if outside_N.size:
        raise ValueError(f"{name} {outside_N[0]} outside the {num_classes} classes 0 .. {num_classes - 1}")


def compute_f1(counts: ClassCounts) -> NDArray[np.float64]:
    """Compute F1 of every class: 2 x hits / (examples + predictions). NaN for a class with neither."""
    with np.errstate(invalid="ignore"):
        return 2 * counts.hits_C.astype(np.float64) / (counts.examples_C + counts.predicted_C)


def compute_scores(labels_N: Integers, predictions_N: Integers, num_classes: int, loss_sum: float) -> Scores:
    """Compute the scores of predictions. `loss_sum`: sum of the examples' losses.

    Macro F1 is the mean F1 over the classes that occur among labels or predictions. A class with examples but without
    predictions, or the reverse, counts with F1 0. This equals scikit-learn's `f1_score(..., average="macro")`.

    Raises:
        ValueError: as `confusion_matrix`, or the arrays are empty. The checks of the data refuse an empty split earlier.
    """
    counts = count_classes(labels_N, predictions_N, num_classes)
    num_examples, num_correct = len(labels_N), int(counts.hits_C.sum())
    if num_examples == 0:
        raise ValueError("0 examples were scored: accuracy is undefined")
    f1_C = compute_f1(counts)
    confusion = None
    if num_classes <= MAX_DENSE_CLASSES:
        confusion = tuple(tuple(row) for row in confusion_matrix(labels_N, predictions_N, num_classes).tolist())
    return Scores(
        num_examples=num_examples,
        num_correct=num_correct,
        accuracy=num_correct / num_examples,
        macro_f1=float(f1_C[~np.isnan(f1_C)].mean()),
        loss=loss_sum / num_examples,
        confusion=confusion,
    )


def choose_listed_classes(counts: ClassCounts) -> NDArray[np.int64]:
    """Choose the classes to list: all, or if they are too many those with the lowest F1, the most frequent first.

    Among many classes, those without examples and predictions are left out.
    """
    num_classes = len(counts.examples_C)
    if num_classes <= MAX_LISTED_CLASSES:
        return np.arange(num_classes)
    f1_C = compute_f1(counts)
    # NaN comes last.
    order_C = np.lexsort((-counts.examples_C, f1_C))
    return order_C[: min(NUM_LOWEST, np.count_nonzero(~np.isnan(f1_C)))]


def compute_class_scores(counts: ClassCounts, classes: Integers, class_names: tuple[str, ...]) -> tuple[ClassScores, ...]:
    """Compute precision, recall and F1 of `classes`, in that order."""
    hits_C = counts.hits_C.astype(np.float64)
    with np.errstate(invalid="ignore"):
        precision_C, recall_C = hits_C / counts.predicted_C, hits_C / counts.examples_C
    f1_C = compute_f1(counts)
    return tuple(
        ClassScores(
            name=class_names[i],
            num_examples=int(counts.examples_C[i]),
            precision=float(precision_C[i]),
            recall=float(recall_C[i]),
            f1=float(f1_C[i]),
        )
        for i in classes.tolist()
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
        f"{name}: {format_ids(ids.tolist())}"
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
