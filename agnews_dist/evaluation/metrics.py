"""Labels and predictions -> confusion matrix -> accuracy, macro F1, loss; and the check that no example was lost.

Pure numpy. Counts are integers and add up over ranks, so the scores do not depend on how the examples were divided.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]

MOST_NAMED = 10
"""How many offending ids an error lists; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A split's scores; `confusion[i][j]` counts examples of true class i predicted as j."""

    num_examples: int
    num_correct: int
    accuracy: float
    macro_f1: float
    loss: float
    """Mean loss per example (nats)."""
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class's share of a confusion matrix; a ratio without any example to count is NaN."""

    num_examples: int
    precision: float
    """Of the examples predicted as this class, the share that is; NaN where none was predicted."""
    recall: float
    """Of the examples of this class, the share found; NaN where there is none."""
    f1: float
    """2 x hits / (examples + predictions): 0 where only one of the two exists, NaN where neither does."""


def confusion_matrix(labels_N: Integers, predictions_N: Integers, num_classes: int) -> NDArray[np.int64]:
    """Count (true class, predicted class) pairs: rows are true, columns predicted. No examples give zeros.

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]

    Raises:
        ValueError: the arrays differ in shape, or hold a class outside 0 .. num_classes - 1.
    """
    if labels_N.ndim != 1 or labels_N.shape != predictions_N.shape:
        raise ValueError(
            f"labels of shape {labels_N.shape}, predictions of shape {predictions_N.shape}: not one pair each"
        )
    # Widened first: int8 labels would overflow in the product below.
    labels_N = labels_N.astype(np.int64, casting="same_kind")
    predictions_N = predictions_N.astype(np.int64, casting="same_kind")
    for name, classes_N in (("label", labels_N), ("prediction", predictions_N)):
        # Checked here because a class out of range would be counted, silently, in another row's cell.
        outside_N = classes_N[(classes_N < 0) | (classes_N >= num_classes)]
        if outside_N.size:
            raise ValueError(f"{name} {outside_N[0]} outside the {num_classes} classes 0 .. {num_classes - 1}")
    counts = np.bincount(labels_N * num_classes + predictions_N, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def per_class(confusion_CC: Integers) -> list[ClassScores]:
    """Precision, recall and F1 of every class, with NaN for a ratio of nothing to nothing."""
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


def summarize(confusion_CC: Integers, loss_sum: float) -> Scores:
    """Scores of all examples counted in `confusion_CC`, whose losses add up to `loss_sum`.

    Macro F1 is the plain mean over the classes that occur among labels or predictions. A class with examples but no
    prediction (or the reverse) counts with F1 0; a class with neither is left out, for there was nothing to get right.
    This is scikit-learn's `f1_score(labels, predictions, average="macro")`.

    Raises:
        ValueError: the matrix counts no example: an empty split has no accuracy. The data's checks refuse it earlier.
    """
    num_examples = int(confusion_CC.sum())
    if num_examples == 0:
        raise ValueError("0 examples were scored: there is no accuracy of nothing")
    num_correct = int(np.trace(confusion_CC))
    return Scores(
        num_examples=num_examples,
        num_correct=num_correct,
        accuracy=num_correct / num_examples,
        macro_f1=float(np.nanmean([scores.f1 for scores in per_class(confusion_CC)])),
        loss=loss_sum / num_examples,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion_CC),
    )


def in_file_order(ids_N: Integers, num_examples: int) -> NDArray[np.int64]:
    """The permutation that sorts results gathered from all ranks: `values_N[in_file_order(ids_N, n)]` is in file order.

    `ids_N` are the row numbers of the gathered results; each of 0 .. num_examples - 1 must be there once.

    >>> in_file_order(np.array([2, 0, 1]), 3).tolist()
    [1, 2, 0]

    Raises:
        RuntimeError: rows are missing, scored twice, or not of this split. That is a bug in the dealing of examples to
            ranks, never the user's doing; scores computed from such rows would be wrong without a sign.
    """
    known_N = (ids_N >= 0) & (ids_N < num_examples)
    seen_N = np.bincount(ids_N[known_N].astype(np.int64, casting="same_kind"), minlength=num_examples)
    faults = [
        f"{name}: {_listed(ids)}"
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


def _listed(ids: Integers) -> str:
    named = ", ".join(str(int(row)) for row in ids[:MOST_NAMED])
    return named if ids.size <= MOST_NAMED else f"{named} and {ids.size - MOST_NAMED} more"
