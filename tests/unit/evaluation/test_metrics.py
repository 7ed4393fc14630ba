"""Scores against scikit-learn and matrices counted by hand; the check that no example is lost."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk
from support.scores import list_pairs

from agnews_dist.evaluation.metrics import (
    are_labelled,
    choose_listed_classes,
    compute_class_scores,
    compute_scores,
    confusion_matrix,
    count_classes,
    in_file_order,
)


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
    "256 classes": (256, *random_case(4, 256, 3000, 0.6)),
    "257 classes": (257, *random_case(5, 257, 3000, 0.6)),
    "10,000 classes, one row each": (10_000, np.arange(10_000), random_case(6, 10_000, 10_000, 0.0)[1]),
    "10,000 classes, most absent": (10_000, *random_case(8, 10_000, 50, 0.5)),
    "10,000 classes, one example": (10_000, np.array([9_999]), np.array([9_999])),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_scikit_learn(case: str) -> None:
    num_classes, labels, predictions = CASES[case]
    scores = compute_scores(labels, predictions, num_classes, loss_sum=2.5)
    assert scores.num_examples == len(labels)
    assert scores.num_correct == int(sk.accuracy_score(labels, predictions, normalize=False))
    assert scores.accuracy == sk.accuracy_score(labels, predictions)
    expected_f1 = sk.f1_score(labels, predictions, average="macro", zero_division=0)
    assert scores.macro_f1 == expected_f1, "to the last bit"
    assert scores.loss == 2.5 / len(labels)
    if num_classes > 256:
        assert scores.confusion is None
        return
    confusion = sk.confusion_matrix(labels, predictions, labels=range(num_classes))
    np.testing.assert_array_equal(confusion_matrix(labels, predictions, num_classes), confusion)
    assert scores.confusion == tuple(map(tuple, confusion.tolist()))
    assert all(type(count) is int for row in scores.confusion for count in row)


@pytest.mark.parametrize("case", CASES)
def test_class_scores_equal_scikit_learn(case: str) -> None:
    num_classes, labels, predictions = CASES[case]
    names = tuple(f"class {i}" for i in range(num_classes))
    classes = compute_class_scores(count_classes(labels, predictions, num_classes), np.arange(num_classes), names)
    assert tuple(each.name for each in classes) == names
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
    counts = count_classes(np.array([0, 0, 0, 1, 1]), np.array([1, 1, 1, 0, 1]), 2)
    sports, world = compute_class_scores(counts, np.array([1, 0]), ("World", "Sports"))
    assert (world.name, sports.name) == ("World", "Sports")
    assert (world.num_examples, sports.num_examples) == (3, 2)
    assert (world.recall, sports.recall) == (0.0, 0.5)
    assert (world.precision, sports.precision) == (0.0, 0.25)


def test_macro_f1_ignores_classes_without_examples_and_predictions() -> None:
    labels, predictions = list_pairs([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    # By hand: F1 = 6/7 and 8/9. The third class does not count.
    assert compute_scores(labels, predictions, 3, 0.0).macro_f1 == pytest.approx((6 / 7 + 8 / 9) / 2, rel=0, abs=1e-15)
    assert math.isnan(compute_class_scores(count_classes(labels, predictions, 3), np.array([2]), ("a", "b", "c"))[0].f1)


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
    assert [counts.dtype for counts in count_classes(labels, labels, 100)] == [np.int64] * 3


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
    for count in (confusion_matrix, count_classes):
        with pytest.raises(ValueError, match=message):
            count(np.array(labels), np.array(predictions), 4)


def test_compute_scores_refuses_no_example() -> None:
    nothing = np.empty(0, np.int64)
    with pytest.raises(ValueError, match="0 examples were scored"):
        compute_scores(nothing, nothing, 4, 0.0)


@pytest.mark.parametrize(("labels", "expected"), [([0, 3], True), ([-1, -1], False), ([-1], False), ([], True)])
def test_a_split_is_labelled_or_not(labels: list[int], expected: bool) -> None:
    assert are_labelled(np.array(labels, np.int64), 4) is expected


@pytest.mark.parametrize("labels", [[0, -1], [-1, 3], [0, 4], [-2, -2]])
def test_a_partly_labelled_split_is_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="outside the 4 classes"):
        are_labelled(np.array(labels), 4)


def test_all_of_few_classes_are_listed_and_the_worst_of_many() -> None:
    for num_classes in (2, 20):
        labels = np.arange(num_classes)[:3] % num_classes
        assert choose_listed_classes(count_classes(labels, labels, num_classes)).tolist() == list(range(num_classes))
    # Class 7 has F1 0 with three examples, 3 and 5 with one. 4 was only predicted. 9: F1 2/3. Others are right or absent.
    labels, predictions = np.array([7, 3, 7, 5, 7, 9, 9, 1, 1]), np.array([4, 4, 4, 4, 4, 9, 0, 1, 1])
    counts = count_classes(labels, predictions, 21)
    assert choose_listed_classes(counts).tolist() == [7, 3, 5, 0, 4]
    # Only two of 300 classes occur.
    counts = count_classes(np.array([200, 299]), np.array([200, 299]), 300)
    assert choose_listed_classes(counts).tolist() == [200, 299]


def test_in_file_order_undoes_a_shuffle() -> None:
    ids = np.random.default_rng(5).permutation(1000)
    values = ids * 10
    order = in_file_order(ids, 1000)
    np.testing.assert_array_equal(values[order], np.arange(1000) * 10)
    assert in_file_order(np.empty(0, np.int64), 0).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "num_examples", "message"),
    [
        ([0, 2], 3, r"2 results gathered for 3 examples .*\(missing: examples 1\)"),
        ([0, 1, 1, 2], 3, r"\(scored more than once: examples 1\)"),
        ([0, 1, 1], 3, r"\(missing: examples 2; scored more than once: examples 1\)"),
        ([0, 1, 2, -1], 3, r"\(not of this split: examples -1\)"),
        ([0, 1, 3], 3, r"\(missing: examples 2; not of this split: examples 3\)"),
        ([], 22, r"missing: examples 0, 1, .*, 19 and 2 more"),
    ],
)
def test_in_file_order_names_missing_repeated_and_foreign_rows(ids: list[int], num_examples: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        in_file_order(np.array(ids, np.int64), num_examples)
