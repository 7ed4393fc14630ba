"""Number of rows that fit a time, on a clock that the fits move; samples with all classes; words or characters."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from agnews_dist.evaluation import linear_model
from agnews_dist.evaluation.linear_model import (
    TooCostlyError,
    choose_analyzer,
    choose_rows,
    ignore_warnings,
    make_text_classifier,
    order_stratified,
)

LABELS = np.arange(20_000) % 5


@pytest.fixture
def timed_fit(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], None]:
    """A fit of 1 ms a row, on a clock that only fits move."""
    clock = [0.0]
    monkeypatch.setattr(linear_model, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def fit(rows: np.ndarray) -> None:
        clock[0] += len(rows) / 1000

    return fit


@pytest.mark.parametrize("max_seconds", [3.0, 8.0, 15.0])
def test_rows_are_as_many_as_the_time_allows(timed_fit: Callable[[np.ndarray], None], max_seconds: float) -> None:
    rows = choose_rows(LABELS, timed_fit, max_rows=10**6, max_seconds=max_seconds)
    timed_fit(rows)
    used = linear_model.time.perf_counter()
    assert max_seconds / 2 < used <= max_seconds, "trial fits and the last fit"
    np.testing.assert_array_equal(np.bincount(LABELS[rows]) // (len(rows) // 5), 1)
    assert (np.diff(rows) > 0).all()


def test_rows_are_all_or_those_allowed_if_time_is_plenty(timed_fit: Callable[[np.ndarray], None]) -> None:
    assert len(choose_rows(LABELS, timed_fit, max_rows=10**6, max_seconds=1000)) == len(LABELS)
    assert len(choose_rows(LABELS, timed_fit, max_rows=1234, max_seconds=1000)) == 1234
    assert len(choose_rows(LABELS[:40], timed_fit, max_rows=1234, max_seconds=1000)) == 40


def test_rows_to_predict_are_paid_for(timed_fit: Callable[[np.ndarray], None]) -> None:
    without = choose_rows(LABELS, timed_fit, max_rows=10**6, max_seconds=8)
    assert len(choose_rows(LABELS, timed_fit, max_rows=10**6, max_seconds=8, num_scored=1000)) == len(without) - 1000


@pytest.mark.parametrize(
    ("labels", "max_seconds", "reason"),
    [
        (LABELS, 0.5, "500 rows need more than 0.5 s"),
        (np.zeros(600, np.int64), 100, "600 training rows of 1 class: nothing to learn"),
        (np.zeros(0, np.int64), 100, "0 training rows of 0 class"),
        (np.arange(30_000) % 10_000, 10**6, "10,000 classes: 3,355 rows fit in memory"),
    ],
)
def test_what_costs_too_much_is_refused(
    timed_fit: Callable[[np.ndarray], None], labels: np.ndarray, max_seconds: float, reason: str
) -> None:
    with pytest.raises(TooCostlyError, match=reason):
        choose_rows(labels, timed_fit, max_rows=10**6, max_seconds=max_seconds)


def test_every_first_part_of_the_order_has_the_classes_in_their_shares() -> None:
    labels = np.repeat([0, 1, 2, 7], [500, 300, 195, 5])
    order = order_stratified(labels, seed=1)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    for num_rows in (10, 200, 900):
        counts = np.bincount(labels[order[:num_rows]], minlength=8)
        np.testing.assert_allclose(counts[[0, 1, 2, 7]], num_rows * np.array([0.5, 0.3, 0.195, 0.005]), atol=1)
    assert not np.array_equal(order, order_stratified(labels, seed=2))
    # One row of each class: the first part is a random one and not that of the lowest classes.
    assert np.sort(order_stratified(np.arange(1000), seed=1)[:100]).max() > 900


def test_texts_without_spaces_are_read_by_characters() -> None:
    english = [f"Oil prices rose by {i} percent on Monday" for i in range(50)]
    chinese = [f"油价周一上涨了{i}个百分点" for i in range(50)]
    assert choose_analyzer(english) == "word"
    assert choose_analyzer(english + chinese[:10]) == "word"
    for texts in (chinese, ["?!", "...", ":-)"], [""], []):
        assert choose_analyzer(texts) == "char"


def test_only_two_warnings_are_ignored() -> None:
    features, labels = np.random.default_rng(0).normal(size=(60, 5)), np.arange(60) % 3
    classifier = make_text_classifier().set_params(max_iter=1)
    with ignore_warnings():
        classifier.fit(features, labels)
        classifier.fit(features, np.arange(60) % 40)
        with pytest.warns(RuntimeWarning, match="other"):
            warnings.warn("other", RuntimeWarning, stacklevel=1)
    with pytest.warns(ConvergenceWarning):
        classifier.fit(features, labels)
