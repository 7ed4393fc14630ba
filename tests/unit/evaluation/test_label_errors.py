"""Planted label errors and planted copies are found; no row is judged by a model that saw its text."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from agnews_dist.data.synthetic import generate
from agnews_dist.evaluation.label_errors import LabelIssue, find_near_duplicates, probabilities_out_of_fold, rank_label_issues

PLENTY = {"max_rows": 10**6, "max_seconds": 300.0}
NUM_CLASSES = 4


def synthetic(num_rows: int) -> tuple[list[str], np.ndarray]:
    pairs = generate(num_rows, 0, "train")
    return [text for text, _ in pairs], np.array([label for _, label in pairs])


def plant_errors(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and all labels, with another class in a share of the rows, each equally likely."""
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(labels), int(share * len(labels)), replace=False)
    wrong = labels.copy()
    wrong[rows] = (labels[rows] + generator.integers(1, NUM_CLASSES, len(rows))) % NUM_CLASSES
    return rows, wrong


def test_issues_are_rows_with_another_class_the_least_probable_first() -> None:
    probabilities = np.array([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [0.4, 0.3, 0.3]], np.float32)
    labels = np.array([0, 1, 1, 0])
    issues = rank_label_issues(labels, probabilities, limit=10)
    assert [issue.row for issue in issues] == [2, 0, 1]
    assert issues[1] == LabelIssue(0, 0, 1, *(pytest.approx(value) for value in (0.1, 0.1, 0.6)))
    assert rank_label_issues(labels, probabilities, limit=1) == issues[:1]
    assert rank_label_issues(labels[:0], probabilities[:0], limit=1) == []
    assert rank_label_issues(np.zeros(4, np.int64), probabilities[:, :1] * 0 + 1, limit=1) == []


@pytest.mark.slow
def test_planted_label_errors_are_at_the_head_of_the_list(shared) -> None:
    from pyarrow import parquet

    table = parquet.read_table(shared / "data" / "ag_news" / "train-00000-of-00001.parquet")
    labels = table["label"].to_numpy()
    planted, wrong = plant_errors(labels, 0.02, seed=0)
    found = probabilities_out_of_fold(table["text"].to_pylist(), wrong, NUM_CLASSES, **PLENTY)
    assert (len(found.rows_N), found.note) == (12_423, "")
    np.testing.assert_allclose(found.probabilities_NC.sum(axis=1), 1, atol=1e-5)
    issues = rank_label_issues(wrong, found.probabilities_NC, limit=int(0.04 * len(labels)))
    assert np.isin(planted, [issue.row for issue in issues]).mean() >= 0.6
    of_planted = [issue for issue in issues if issue.row in set(planted.tolist())]
    assert np.mean([labels[issue.row] == issue.suggested for issue in of_planted]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("change", [str, lambda text: f"  {text.upper()}!"], ids=["exact", "case and punctuation"])
def test_copies_of_a_text_do_not_vouch_for_their_label(change) -> None:
    texts, labels = synthetic(1500)
    planted, wrong = plant_errors(labels, 0.01, seed=0)
    for _ in range(4):
        texts += [change(texts[row]) for row in planted]
        wrong = np.concatenate([wrong, wrong[planted]])
    found = probabilities_out_of_fold(texts, wrong, NUM_CLASSES, **PLENTY)
    issues = rank_label_issues(wrong, found.probabilities_NC, limit=len(texts))
    copies = np.concatenate([planted, np.arange(1500, len(texts))])
    assert np.isin(copies, [issue.row for issue in issues]).mean() > 0.9, "copies were in the fold that a model learnt from"


@pytest.mark.slow
def test_random_labels_are_not_remembered() -> None:
    texts, _ = synthetic(1200)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, NUM_CLASSES, 1200)
    found = probabilities_out_of_fold(texts, labels, NUM_CLASSES, **PLENTY)
    assert (found.probabilities_NC.argmax(axis=1) == labels).mean() == pytest.approx(0.25, abs=0.05)


def test_rare_classes_and_rows_beyond_the_limit_are_left_out_and_counted() -> None:
    texts, labels = synthetic(800)
    labels[[10, 20, 30]] = 7
    copied = [texts[40]] * 6
    texts, labels = texts + copied, np.concatenate([labels, np.full(6, 5)])
    found = probabilities_out_of_fold(texts, labels, 9, max_rows=500, max_seconds=300)
    assert found.note == "left out: 9 rows of classes with fewer than 5 texts, 297 rows beyond the limits of rows and time"
    assert found.probabilities_NC.shape == (500, 9)
    assert not np.isin(found.rows_N, [10, 20, 30, *range(800, 806)]).any()
    assert (np.diff(found.rows_N) > 0).all()
    assert (found.probabilities_NC[:, 4:] == 0).all()
    accuracy = (found.probabilities_NC.argmax(axis=1) == labels[found.rows_N]).mean()
    assert accuracy > 0.6, "rows are those of the probabilities"


@pytest.mark.parametrize(
    ("texts", "labels", "max_seconds", "reason"),
    [
        (["a word"] * 20, [0, 1] * 10, 300.0, "not searched: every class has fewer than 5 texts"),
        ([f"word {i}" for i in range(20)], [0] * 20, 300.0, "1 class: nothing to learn"),
        ([f"word {i}" for i in range(20)], [0, 1] * 10, 0.0, "20 rows need more than 0 s"),
    ],
)
def test_no_probabilities_have_a_reason(texts: list[str], labels: list[int], max_seconds: float, reason: str) -> None:
    found = probabilities_out_of_fold(texts, np.array(labels), 2, max_rows=100, max_seconds=max_seconds)
    assert reason in found.note
    assert (len(found.rows_N), found.probabilities_NC.shape) == (0, (0, 2))


def test_near_duplicates_equal_a_dense_product() -> None:
    texts, _ = synthetic(300)
    texts += [f"{text} Updated." for text in texts[:30]] + [texts[0], texts[0]]
    rows = list(range(0, len(texts), 2))
    found = find_near_duplicates(texts, rows, min_similarity=0.6, limit_per_row=2)
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(texts).toarray()
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, 0)
    assert list(found) == rows
    assert sum(map(len, found.values())) > 30
    for row, others in found.items():
        expected = sorted(similarity[row][similarity[row] >= 0.6], reverse=True)[:2]
        np.testing.assert_allclose([other.similarity for other in others], expected, atol=1e-5)
        np.testing.assert_allclose([similarity[row, other.row] for other in others], expected, atol=1e-5)
        assert row not in [other.row for other in others]
    assert [other.row for other in found[0]] == [330, 331]


def test_near_duplicates_among_candidates_are_not_displaced_by_others() -> None:
    texts = [f"oil prices rose in march by {number} per cent" for number in ("two", "three")] + ["oil prices rose in march"] * 5
    assert 0 not in [other.row for other in find_near_duplicates(texts, [6], min_similarity=0.1)[6]]
    found = find_near_duplicates(texts, [6], candidates=[1, 0], min_similarity=0.1)[6]
    assert [other.row for other in found] == [0, 1]
    everywhere = find_near_duplicates(texts, [6], min_similarity=0.1, limit_per_row=9)[6]
    assert found == [other for other in everywhere if other.row < 2]


def test_near_duplicates_of_texts_without_words() -> None:
    texts = ["油价周一上涨了百分之三", "油价周一上涨了百分之四", "球队在最后一分钟进球", "?!"]
    assert [other.row for other in find_near_duplicates(texts, [0], min_similarity=0.6)[0]] == [1]
    assert find_near_duplicates(["", ""], [0, 1]) == {0: [], 1: []}
