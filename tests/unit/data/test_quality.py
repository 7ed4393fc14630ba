"""Findings about a corpus, with counts and rows."""

import numpy as np
import pytest

from agnews_dist.data.quality import find_faults, normalise
from agnews_dist.data.rows import Corpus, Origin, Split
from agnews_dist.data.texts import Texts


def make_split(name: str, texts: list[str], labels: list[int]) -> Split:
    return Split(name, Texts.of(texts), np.array(labels, dtype=np.int64), Origin.of_file(f"{name}.csv", len(texts)))


def findings_of(*splits: Split, names: tuple[str, ...] = ("a", "b")) -> list[str]:
    return [str(finding) for finding in find_faults(Corpus({split.name: split for split in splits}, names, "0" * 64))]


def enough(prefix: str, num_classes: int = 2) -> tuple[list[str], list[int]]:
    return [f"{prefix} {i}" for i in range(10 * num_classes)], [i % num_classes for i in range(10 * num_classes)]


def test_a_good_corpus_has_no_findings():
    assert findings_of(make_split("train", *enough("x")), make_split("test", *enough("y"))) == []


def test_classes_without_and_with_few_rows_are_named():
    texts, labels = enough("x")
    train, validation = make_split("train", [*texts, "last"], [*labels, 3]), make_split("validation", ["y"], [0])
    empty, rare = findings_of(train, validation, names=("a", "b", "c", "d"))
    assert empty.startswith("1 of 4 classes without a training row (c): such a class cannot be learnt.")
    assert rare.startswith("1 of 4 classes with fewer than 10 training rows (d: 1): ")
    assert findings_of(train, names=("a", "b", "c", "d")) == [], "a split alone is scored"


def test_repeated_texts_and_those_with_two_labels_are_counted():
    texts, labels = enough("x")
    two, repeated = findings_of(make_split("train", [*texts, "x 0", "x 1", "x 1"], [*labels, 1, 1, 1]))
    assert two.startswith("1 text of train with more than one label (train.csv row 21 = train.csv row 1): ")
    assert repeated.startswith(
        "3 rows of train with the text of an earlier row (train.csv row 21 = train.csv row 1, train.csv row 22 = "
    )


def test_texts_in_two_splits_are_counted_also_but_for_case_and_punctuation():
    train = make_split("train", *enough("Oil rose"))
    exact, fuzzy = findings_of(train, make_split("test", ["Oil rose 3", "oil  ROSE, 4!", "Oil rose 5 again"], [0, 1, 0]))
    assert exact.startswith(
        "1 row of test with a text that is also in train (test.csv row 1 = train.csv row 4): scores on test"
    )
    assert fuzzy.startswith(
        "1 row of test with a text that is also in train, but for case, punctuation and white space (test.csv row 2 = "
    )
    assert fuzzy.endswith("Remove them from train.")


def test_splits_without_labels_are_checked_for_leaks():
    train, test = make_split("train", *enough("x")), make_split("test", ["x 1", "new"], [-1, -1])
    (leak,) = findings_of(train, test)
    assert leak.startswith("1 row of test")


@pytest.mark.parametrize(
    ("one", "other", "same"), [("Straße", "STRASSE!", True), ("a_b", "a b", True), ("C++", "C", True), ("?!", "!?", False)]
)
def test_normalise_keeps_letters_and_digits(one, other, same):
    assert (normalise(one) == normalise(other)) == same
