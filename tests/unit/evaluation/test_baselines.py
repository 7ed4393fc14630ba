"""Cheap methods against scikit-learn's own pipeline, their limits, and texts that have no words."""

from collections.abc import Mapping

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

from agnews_dist.data.synthetic import generate
from agnews_dist.evaluation.baselines import BaselineResult, features_baseline, majority_baseline, tfidf_baseline

PLENTY = {"max_rows": 10**6, "max_seconds": 300.0}
Rows = tuple[list[str], np.ndarray]


@pytest.fixture(scope="module")
def rows() -> dict[str, Rows]:
    sizes = {"train": 1500, "validation": 300, "test": 400}
    pairs = {split: generate(size, 0, split) for split, size in sizes.items()}
    return {split: ([text for text, _ in found], np.array([label for _, label in found])) for split, found in pairs.items()}


def check_scores(result: BaselineResult, labels: Mapping[str, np.ndarray]) -> None:
    assert result.skipped == ""
    assert set(result.scores) == set(labels)
    for split, scores in result.scores.items():
        assert scores.num_examples == len(labels[split])
        assert scores.accuracy == scores.num_correct / scores.num_examples
        assert 0 <= scores.macro_f1 <= 1


def test_majority_is_the_most_frequent_training_class() -> None:
    labels = {"validation": np.array([0, 2, 2, 1]), "test": np.array([1, 1])}
    result = majority_baseline(np.array([1, 2, 2, 0]), labels)
    check_scores(result, labels)
    assert result.num_train_rows == 4
    for split, labels_N in labels.items():
        predictions = np.full(len(labels_N), 2)
        assert result.scores[split].accuracy == accuracy_score(labels_N, predictions)
        assert result.scores[split].macro_f1 == pytest.approx(f1_score(labels_N, predictions, average="macro"), abs=1e-12)


def test_a_split_without_labels_is_not_scored() -> None:
    result = majority_baseline(np.array([1, 2, 2]), {"validation": np.array([2, 1]), "test": np.array([-1, -1, -1])})
    assert set(result.scores) == {"validation"}


@pytest.mark.slow
def test_tfidf_learns_as_much_as_scikit_learns_pipeline(rows: dict[str, Rows]) -> None:
    texts, labels = ({split: rows[split][i] for split in ("validation", "test")} for i in (0, 1))
    result = tfidf_baseline(*rows["train"], texts, labels, **PLENTY)
    check_scores(result, labels)
    assert result.num_train_rows == 1500
    reference = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10)).fit(*rows["train"])
    for split in labels:
        assert result.scores[split].accuracy == pytest.approx(reference.score(texts[split], labels[split]), abs=0.04)
    assert min(scores.accuracy for scores in result.scores.values()) > 0.7


def test_tfidf_learns_from_no_more_rows_than_allowed(rows: dict[str, Rows]) -> None:
    validation = rows["validation"]
    result = tfidf_baseline(
        *rows["train"], {"validation": validation[0]}, {"validation": validation[1]}, max_rows=400, max_seconds=300
    )
    check_scores(result, {"validation": validation[1]})
    assert result.num_train_rows == 400


@pytest.mark.parametrize(
    ("texts", "labels", "max_seconds", "reason"),
    [
        (["a word"] * 20, [0, 1] * 10, 0.0, "20 rows need more than 0 s"),
        (["a word"] * 20, [3] * 20, 300.0, "1 class: nothing to learn"),
        ([""] * 20, [0, 1] * 10, 300.0, "share no word and no character"),
        (["a word"] * 9000, [*range(4500)] * 2, 300.0, "4,500 classes"),
    ],
)
def test_tfidf_is_skipped_with_a_reason(texts: list[str], labels: list[int], max_seconds: float, reason: str) -> None:
    result = tfidf_baseline(
        texts, np.array(labels), {"test": ["a"]}, {"test": np.array([1])}, max_rows=10**6, max_seconds=max_seconds
    )
    assert reason in result.skipped
    assert (result.scores, result.num_train_rows) == ({}, 0)


@pytest.mark.parametrize("words", [["油价", "股市", "涨跌", "球队", "进球", "比分"], ["?!", "...", ",", ";)", "--", "/"]])
def test_texts_without_words_are_classified(words: list[str]) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 2
    texts = ["".join(generator.choice(words[3 * label : 3 * label + 3], 8)) for label in labels]
    result = tfidf_baseline(texts[:150], labels[:150], {"test": texts[150:]}, {"test": labels[150:]}, **PLENTY)
    check_scores(result, {"test": labels[150:]})
    assert result.scores["test"].accuracy > 0.95


def test_features_are_scaled_and_classified() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(900) % 3
    features = generator.normal(size=(900, 6)) + 4 * np.eye(6)[labels]
    features = (features * [1e-3, 1, 1e4, 1, 1, 1] + 50).astype(np.float32)
    test = {"test": labels[600:]}
    result = features_baseline(features[:600], labels[:600], {"test": features[600:]}, test, max_seconds=300)
    check_scores(result, test)
    assert result.num_train_rows == 600
    assert result.scores["test"].accuracy > 0.9
    features[[7, 700], 2] = [np.inf, np.nan]
    again = features_baseline(features[:600], labels[:600], {"test": features[600:]}, test, max_seconds=300)
    assert again.scores["test"].accuracy == pytest.approx(result.scores["test"].accuracy, abs=0.05)


@pytest.mark.slow
def test_tfidf_reaches_its_known_accuracy_on_ag_news(shared) -> None:
    from pyarrow import parquet

    train, validation = (
        parquet.read_table(shared / "data" / "ag_news" / f"{split}-00000-of-00001.parquet") for split in ("train", "validation")
    )
    labels = {"validation": validation["label"].to_numpy()}
    texts = {"validation": validation["text"].to_pylist()}
    result = tfidf_baseline(train["text"].to_pylist(), train["label"].to_numpy(), texts, labels, **PLENTY)
    check_scores(result, labels)
    assert result.num_train_rows == 12_423
    assert result.scores["validation"].accuracy > 0.88
