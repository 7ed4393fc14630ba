"""Probable label errors and near duplicates. Needs scikit-learn, and cleanlab for the order of probable errors.

A row is suspicious if models that never saw it give its label a low probability. So the probabilities are out of fold: five
models each leave out a fifth of the texts. Equal texts are in one fold: a model would repeat a wrong label that it saw.

Of 2 % planted errors in AG News, 81 % are in the first 4 % of the list. cleanlab's other scores and its filter found fewer.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.quality import hash_texts, normalise
from agnews_dist.errors import count_noun
from agnews_dist.evaluation.linear_model import (
    MAX_CELLS,
    MAX_WORDS,
    TooCostlyError,
    choose_analyzer,
    choose_rows,
    ignore_warnings,
    make_text_classifier,
    make_vectorizer,
    select_texts,
)
from agnews_dist.evaluation.metrics import Integers

COMPARED_CHARACTERS = 2_000
"""Characters by which texts are compared."""
QUERY_ROWS = 64
"""Rows compared with all texts at once: at most 64 x texts similarities in memory."""


class LabelIssue(NamedTuple):
    """A row whose label is probably wrong."""

    row: int
    """Position in the labels and probabilities."""
    label: int
    suggested: int
    """The most probable class."""
    quality: float
    """cleanlab's score of the label, from 0 (wrong) to 1 (right)."""
    label_probability: float
    suggested_probability: float


class OutOfFold(NamedTuple):
    """Probabilities by models that did not see the row or an equal text."""

    rows_N: NDArray[np.int64]
    """Rows, ascending; empty if there are no probabilities."""
    probabilities_NC: NDArray[np.float32]
    note: str
    """Rows that were left out, and why; empty if none were."""


class NearDuplicate(NamedTuple):
    """Another row with almost the same text."""

    row: int
    similarity: float
    """Cosine of the two tf-idf vectors."""


def rank_label_issues(labels_N: Integers, probabilities_NC: NDArray[Any], *, limit: int) -> list[LabelIssue]:
    """List rows whose label is not the most probable class, the most probable errors first, at most `limit`."""
    from cleanlab.rank import get_label_quality_scores

    if not len(labels_N):
        return []
    quality_N = np.asarray(get_label_quality_scores(labels_N, probabilities_NC, method="self_confidence"))
    suggested_N = probabilities_NC.argmax(axis=1)
    order_N = np.argsort(quality_N, kind="stable")
    order_N = order_N[suggested_N[order_N] != labels_N[order_N]][:limit]
    return [
        LabelIssue(
            row=row,
            label=int(labels_N[row]),
            suggested=int(suggested_N[row]),
            quality=float(quality_N[row]),
            label_probability=float(probabilities_NC[row, labels_N[row]]),
            suggested_probability=float(probabilities_NC[row, suggested_N[row]]),
        )
        for row in order_N.tolist()
    ]


def probabilities_out_of_fold(
    texts: Sequence[str],
    labels_N: Integers,
    num_classes: int,
    *,
    num_folds: int = 5,
    max_rows: int,
    max_seconds: float,
    seed: int = 0,
) -> OutOfFold:
    """Compute the class probabilities of each row by models that did not see its text.

    The models are logistic regressions on tf-idf. The rows are a stratified sample if all do not fit the limits. Rows of
    classes with fewer than `num_folds` texts are left out.
    """
    groups_N = _group_texts(texts)
    analyzer = choose_analyzer(texts)

    def cross_validate(rows_R: NDArray[np.int64]) -> NDArray[np.float32]:
        vectorizer = make_vectorizer(analyzer, num_classes)
        try:
            words_RW = vectorizer.fit_transform(select_texts(texts, rows_R))
        except ValueError as error:  # scikit-learn's only way to say so
            raise TooCostlyError("the texts share no word and no character") from error
        probabilities_RC = np.zeros((len(rows_R), num_classes), np.float32)
        for train, test in _split_by_text(labels_N[rows_R], groups_N[rows_R], num_folds, seed):
            model = make_text_classifier().fit(words_RW[train], labels_N[rows_R[train]])
            probabilities_RC[np.ix_(test, model.classes_)] = model.predict_proba(words_RW[test])
        return probabilities_RC

    kept_N = np.flatnonzero(_have_enough_texts(labels_N, groups_N, num_folds))
    empty = OutOfFold(np.zeros(0, np.int64), np.zeros((0, num_classes), np.float32), "")
    if not len(kept_N):
        return empty._replace(note=f"not searched: every class has fewer than {num_folds} texts")
    with ignore_warnings():
        try:
            chosen_R = kept_N[
                choose_rows(
                    labels_N[kept_N],
                    lambda rows: cross_validate(kept_N[rows]),
                    max_rows=min(max_rows, MAX_CELLS // num_classes),
                    max_seconds=max_seconds,
                    seed=seed,
                )
            ]
            rows_R = chosen_R[_have_enough_texts(labels_N[chosen_R], groups_N[chosen_R], num_folds)]
            probabilities_RC = cross_validate(rows_R)
            predicted_R = probabilities_RC.any(axis=1)  # False where the other folds have one class only
            rows_R, probabilities_RC = rows_R[predicted_R], probabilities_RC[predicted_R]
        except TooCostlyError as error:
            return empty._replace(note=str(error))
    notes = [
        f"{count_noun(number, 'row')} {reason}"
        for number, reason in (
            (len(labels_N) - len(kept_N) + len(chosen_R) - len(rows_R), f"of classes with fewer than {num_folds} texts"),
            (len(kept_N) - len(chosen_R), "beyond the limits of rows and time"),
        )
        if number
    ]
    return OutOfFold(rows_R, probabilities_RC, f"left out: {', '.join(notes)}" if notes else "")


def _have_enough_texts(labels_R: Integers, groups_R: Integers, num_folds: int) -> NDArray[np.bool_]:
    """Return True for rows of classes with at least as many different texts as folds."""
    pairs = np.unique(np.stack([labels_R, groups_R], axis=1), axis=0)
    classes, num_texts = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(labels_R, classes[num_texts >= num_folds])


def _split_by_text(
    labels_R: Integers, groups_R: Integers, num_folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield positions to train on and to predict, fold by fold: equal texts in one fold, each class in equal shares.

    scikit-learn's StratifiedGroupKFold does the same, in seconds instead of milliseconds.
    """
    fold_R = _deal_texts(labels_R, groups_R, num_folds, seed)
    for fold in range(num_folds):
        train, test = np.flatnonzero(fold_R != fold), np.flatnonzero(fold_R == fold)
        if len(test) and len(np.unique(labels_R[train])) > 1:
            yield train, test


def _deal_texts(labels_R: Integers, groups_R: Integers, num_folds: int, seed: int) -> NDArray[np.int64]:
    """Deal the texts of each class to the folds in turn, in a random order; return the fold of each row."""
    _, first_G, group_R = np.unique(groups_R, return_index=True, return_inverse=True)
    shuffled_G = np.random.default_rng(seed).permutation(len(first_G))
    by_class_G = shuffled_G[np.argsort(labels_R[first_G[shuffled_G]], kind="stable")]
    fold_G = np.empty(len(first_G), np.int64)
    fold_G[by_class_G] = np.arange(len(first_G)) % num_folds
    return fold_G[group_R]


def assign_folds(texts: Sequence[str], labels_N: Integers, num_folds: int, seed: int) -> NDArray[np.int64]:
    """Return the fold of each row: equal texts in one fold, each class in equal shares.

    -1 for rows of classes with fewer texts than folds.
    """
    groups_N = _group_texts(texts)
    has_enough_N = _have_enough_texts(labels_N, groups_N, num_folds)
    fold_N = np.full(len(labels_N), -1, np.int64)
    fold_N[has_enough_N] = _deal_texts(labels_N[has_enough_N], groups_N[has_enough_N], num_folds, seed)
    return fold_N


def _group_texts(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return for each row the first row with an equal text: hashes differ from process to process."""
    _, first_G, group_N = np.unique(hash_texts(texts, normalise), return_index=True, return_inverse=True)
    return first_G[group_N]


def count_label_issues(labels_N: Integers, probabilities_NC: NDArray[Any]) -> int:
    """Estimate the number of wrong labels by confident learning (Northcutt, Jiang, Chuang 2021): cleanlab's estimate."""
    from cleanlab.count import num_label_issues

    # cleanlab takes labels 0 .. K - 1 that all occur.
    present_K = np.unique(labels_N)
    if len(present_K) < 2:
        return 0
    part_NK = probabilities_NC[:, present_K].astype(np.float64)
    part_NK /= np.maximum(part_NK.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return int(num_label_issues(np.searchsorted(present_K, labels_N), part_NK))


def find_near_duplicates(
    texts: Sequence[str],
    rows: Sequence[int],
    *,
    candidates: Sequence[int] | None = None,
    min_similarity: float = 0.8,
    limit_per_row: int = 3,
    deadline: float = math.inf,
) -> Mapping[int, list[NearDuplicate]]:
    """Find for each of `rows` the most similar other texts, at most `limit_per_row` with at least `min_similarity`.

    `candidates`: rows that may be found; None: all.
    Rows that are not reached before `deadline` (`time.monotonic()`) are absent from the result. Texts are compared by the words
    of their first 2,000 characters; texts without spaces by two or three characters.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    found: dict[int, list[NearDuplicate]] = {}
    analyzer = choose_analyzer(texts)
    float32: Any = np.float32
    vectorizer: Any = TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=(1, 1) if analyzer == "word" else (2, 3),
        sublinear_tf=True,
        max_features=MAX_WORDS,
        dtype=float32,
    )
    try:
        words_NW = vectorizer.fit_transform(text[:COMPARED_CHARACTERS] for text in texts)
    except ValueError:  # no text has a word: none is similar to another
        return {row: [] for row in rows}
    found_M = np.arange(len(texts)) if candidates is None else np.asarray(candidates)
    words_WM = words_NW[found_M].T.tocsr()
    for start in range(0, len(rows), QUERY_ROWS):
        if time.monotonic() > deadline:
            break
        queries = list(rows[start : start + QUERY_ROWS])
        found |= {row: [] for row in queries}
        similarity_QM = (words_NW[queries] @ words_WM).tocoo()
        close = similarity_QM.data >= min_similarity
        values, places, others = similarity_QM.data[close], similarity_QM.row[close], found_M[similarity_QM.col[close]]
        for index in np.lexsort((others, -values)).tolist():
            query, other = queries[places[index]], int(others[index])
            if other != query and len(found[query]) < limit_per_row:
                found[query].append(NearDuplicate(other, min(1.0, float(values[index]))))
    return found
