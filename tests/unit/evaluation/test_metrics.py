"""Scores against scikit-learn and matrices counted by hand; the check that no example is lost."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from agnews_dist.evaluation.metrics import compute_class_scores, compute_scores, confusion_matrix, in_file_order


def random_case(seed: int, num_classes: int, num_examples: int, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_examples)
    predictions = np.where(rng.random(num_examples) < accuracy, labels, rng.integers(0, num_classes, num_examples))
    return labels, predictions


CASES = {
    "four classes": (4, *random_case(0, 4, 1000, 0.8)),
    "chance": (4, *random_case(1, 4, 500, 0.0)),
    "all right": (4, *random_case(2, 4, 100, 1.0)),
    "many classes, some absent": (30, *random_case(3, 30, 40, 0.5)),
    "one class only": (4, np.zeros(7, np.int64), np.zeros(7, np.int64)),
    "one class only, all wrong": (4, np.zeros(7, np.int64), np.full(7, 3)),
    "class never predicted": (3, np.array([0, 1, 2, 2]), np.array([0, 1, 1, 0])),
    "class predicted, never true": (3, np.array([0, 1, 1, 0]), np.array([0, 1, 2, 2])),
    "one example": (2, np.array([1]), np.array([0])),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_scikit_learn(case: str) -> None:
    num_classes, labels, predictions = CASES[case]
    confusion = confusion_matrix(labels, predictions, num_classes)
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(labels, predictions, labels=range(num_classes)))
    scores = compute_scores(confusion, loss_sum=2.5)
    assert scores.num_examples == len(labels)
    assert scores.num_correct == int(sk.accuracy_score(labels, predictions, normalize=False))
    assert scores.accuracy == sk.accuracy_score(labels, predictions)
    expected_f1 = sk.f1_score(labels, predictions, average="macro", zero_division=0)
    assert scores.macro_f1 == pytest.approx(expected_f1, rel=0, abs=1e-12)
    assert scores.loss == 2.5 / len(labels)
    assert scores.confusion == tuple(map(tuple, confusion.tolist()))


@pytest.mark.parametrize("case", CASES)
def test_class_scores_equal_scikit_learn(case: str) -> None:
    num_classes, labels, predictions = CASES[case]
    classes = compute_class_scores(confusion_matrix(labels, predictions, num_classes))
    assert len(classes) == num_classes
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), zero_division=np.nan
    )
    for ours, name in ((precision, "precision"), (recall, "recall"), (f1, "f1"), (support, "num_examples")):
        found = [getattr(scores, name) for scores in classes]
        np.testing.assert_allclose(found, ours, rtol=0, atol=1e-12, equal_nan=True, err_msg=name)


def test_rows_are_true_and_columns_predicted() -> None:
    # Three World predicted as Sports, one Sports predicted as World: a transposed matrix would swap 3 and 1.
    confusion = confusion_matrix(np.array([0, 0, 0, 1, 1]), np.array([1, 1, 1, 0, 1]), 2)
    assert confusion.tolist() == [[0, 3], [1, 1]]
    world, sports = compute_class_scores(confusion)
    assert (world.num_examples, sports.num_examples) == (3, 2)
    assert (world.recall, sports.recall) == (0.0, 0.5)
    assert (world.precision, sports.precision) == (0.0, 0.25)


def test_macro_f1_ignores_classes_without_examples_and_predictions() -> None:
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    # By hand: F1 = 6/7 and 8/9. The third class does not count.
    assert compute_scores(confusion, 0.0).macro_f1 == pytest.approx((6 / 7 + 8 / 9) / 2, rel=0, abs=1e-15)
    assert math.isnan(compute_class_scores(confusion)[2].f1)


def test_confusion_matrices_of_parts_add_up() -> None:
    _, labels, predictions = CASES["four classes"]
    parts = [slice(0, 0), slice(0, 17), slice(17, None)]
    total = sum(confusion_matrix(labels[part], predictions[part], 4) for part in parts)
    np.testing.assert_array_equal(total, sk.confusion_matrix(labels, predictions))


def test_small_integer_types_do_not_overflow() -> None:
    labels = np.array([99, 98], np.int8)
    confusion = confusion_matrix(labels, labels, 100)
    assert confusion[99, 99] == confusion[98, 98] == 1
    assert confusion.sum() == 2


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 4], [0, 0], "label 4 outside the 4 classes 0 .. 3"),
        ([0, -1], [0, 0], "label -1 outside"),
        ([0, 1], [0, 4], "prediction 4 outside"),
        ([0, 1], [0], r"labels of shape \(2,\), predictions of shape \(1,\)"),
    ],
)
def test_a_class_out_of_range_is_refused(labels: list[int], predictions: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(labels), np.array(predictions), 4)


def test_compute_scores_refuses_an_empty_matrix() -> None:
    with pytest.raises(ValueError, match="0 examples were scored"):
        compute_scores(np.zeros((4, 4), np.int64), 0.0)


def test_in_file_order_undoes_a_shuffle() -> None:
    ids = np.random.default_rng(5).permutation(1000)
    values = ids * 10
    order = in_file_order(ids, 1000)
    np.testing.assert_array_equal(values[order], np.arange(1000) * 10)
    assert in_file_order(np.empty(0, np.int64), 0).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "num_examples", "message"),
    [
        ([0, 2], 3, r"2 results gathered for 3 examples .*\(missing: 1\)"),
        ([0, 1, 1, 2], 3, r"\(scored more than once: 1\)"),
        ([0, 1, 1], 3, r"\(missing: 2; scored more than once: 1\)"),
        ([0, 1, 2, -1], 3, r"\(not of this split: -1\)"),
        ([0, 1, 3], 3, r"\(missing: 2; not of this split: 3\)"),
        ([], 12, r"missing: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
    ],
)
def test_in_file_order_names_missing_repeated_and_foreign_rows(ids: list[int], num_examples: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        in_file_order(np.array(ids, np.int64), num_examples)
