"""Scores that cheap methods reach on the same rows: the most frequent class, tf-idf, features of the frozen model.

Each method is bounded in rows and in seconds. What does not fit is skipped with a reason. Needs scikit-learn, except for the
most frequent class.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.linear_model import (
    MAX_CELLS,
    TooCostlyError,
    choose_analyzer,
    choose_rows,
    ignore_warnings,
    make_feature_classifier,
    make_text_classifier,
    make_vectorizer,
    select_features,
    select_texts,
)
from agnews_dist.evaluation.metrics import Integers, are_labelled, compute_scores

Predict = Callable[[str, NDArray[np.int64]], NDArray[np.int64]]
"""A function from the name of a split and row numbers to predicted classes."""


FROZEN_MODEL = "frozen model + logistic regression"


class BaselineScores(NamedTuple):
    """Scores of one split."""

    num_examples: int
    num_correct: int
    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class BaselineResult:
    """Scores of a cheap method, or the reason for leaving it out."""

    name: str
    scores: Mapping[str, BaselineScores] = field(default_factory=dict[str, BaselineScores])
    """Scores by split, except for splits without labels."""
    seconds: float = 0.0
    num_train_rows: int = 0
    """Training rows that it learnt from: fewer than there are if the time or the memory allows no more."""
    skipped: str = ""
    """Reason; empty if the method ran."""


def majority_baseline(train_labels_N: Integers, labels: Mapping[str, Integers]) -> BaselineResult:
    """Score the most frequent class of the training rows as the prediction for every row."""
    started = time.perf_counter()
    most_frequent = int(np.bincount(train_labels_N).argmax())
    predictions = {split: np.full(len(labels_N), most_frequent, np.int64) for split, labels_N in labels.items()}
    return _score("majority class", predictions, labels, started, len(train_labels_N))


def tfidf_baseline(
    train_texts: Sequence[str],
    train_labels_N: Integers,
    texts: Mapping[str, Sequence[str]],
    labels: Mapping[str, Integers],
    *,
    max_rows: int,
    max_seconds: float,
    seed: int = 0,
) -> BaselineResult:
    """Train a logistic regression on words and word pairs, and score each split.

    Texts without spaces are read as sequences of one to three characters.
    """
    num_classes = len(np.unique(train_labels_N))
    analyzer = choose_analyzer(train_texts)

    def fit(rows_R: NDArray[np.int64]) -> Predict:
        vectorizer, classifier = make_vectorizer(analyzer, num_classes), make_text_classifier()
        try:
            words_RW = vectorizer.fit_transform(select_texts(train_texts, rows_R))
        except ValueError as error:  # scikit-learn's only way to say so
            raise TooCostlyError(f"{len(rows_R):,} training texts share no word and no character") from error
        classifier.fit(words_RW, train_labels_N[rows_R])
        return lambda split, rows_B: classifier.predict(vectorizer.transform(select_texts(texts[split], rows_B)))

    return _train(
        "tf-idf + logistic regression", train_labels_N, labels, fit, max_rows=max_rows, max_seconds=max_seconds, seed=seed
    )


def features_baseline(
    train_features_NH: NDArray[Any],
    train_labels_N: Integers,
    features: Mapping[str, NDArray[Any]],
    labels: Mapping[str, Integers],
    *,
    max_seconds: float,
    seed: int = 0,
) -> BaselineResult:
    """Train a logistic regression on the features that the frozen model has for the last token, and score each split."""

    def fit(rows_R: NDArray[np.int64]) -> Predict:
        classifier = make_feature_classifier().fit(select_features(train_features_NH, rows_R), train_labels_N[rows_R])
        return lambda split, rows_B: classifier.predict(select_features(features[split], rows_B))

    num_rows = len(train_labels_N)
    return _train(FROZEN_MODEL, train_labels_N, labels, fit, max_rows=num_rows, max_seconds=max_seconds, seed=seed)


def _train(
    name: str,
    train_labels_N: Integers,
    labels: Mapping[str, Integers],
    fit: Callable[[NDArray[np.int64]], Predict],
    *,
    max_rows: int,
    max_seconds: float,
    seed: int,
) -> BaselineResult:
    """Fit as many rows as the limits allow, then predict in blocks: the scores of rows x classes are in memory."""
    started = time.perf_counter()
    num_scored = sum(len(labels_N) for labels_N in labels.values())
    block = max(1, MAX_CELLS // 8 // max(1, len(np.unique(train_labels_N))))
    with ignore_warnings():
        try:
            rows_R = choose_rows(
                train_labels_N, fit, max_rows=max_rows, max_seconds=max_seconds, num_scored=num_scored, seed=seed
            )
            predict = fit(rows_R)
        except TooCostlyError as error:
            return BaselineResult(name, seconds=time.perf_counter() - started, skipped=str(error))
        predictions = {
            split: np.concatenate(
                [np.zeros(0, np.int64)]
                + [predict(split, np.arange(i, min(i + block, len(labels_N)))) for i in range(0, len(labels_N), block)]
            )
            for split, labels_N in labels.items()
        }
    return _score(name, predictions, labels, started, len(rows_R))


def _score(
    name: str, predictions: Mapping[str, NDArray[np.int64]], labels: Mapping[str, Integers], started: float, num_train_rows: int
) -> BaselineResult:
    scores: dict[str, BaselineScores] = {}
    for split, labels_N in labels.items():
        num_classes = int(max(labels_N.max(), predictions[split].max())) + 1
        if not are_labelled(labels_N, num_classes):
            continue
        found = compute_scores(labels_N, predictions[split], num_classes, loss_sum=0.0)
        scores[split] = BaselineScores(found.num_examples, found.num_correct, found.accuracy, found.macro_f1)
    return BaselineResult(name, scores, time.perf_counter() - started, num_train_rows)
