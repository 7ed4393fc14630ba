"""Logistic regression on tf-idf or on features, and how many rows of it a number of seconds buys. Needs scikit-learn.

Baselines and the search for label errors share it. The solver is saga for texts: with a loose tolerance it is six times as fast
as lbfgs on sparse rows, at the same accuracy. Features are dense and few, which suits lbfgs.
"""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agnews_dist.evaluation.metrics import Integers

MAX_CELLS = 1 << 25
"""Most rows x classes and most words x classes of a fit: a few copies of 256 MB."""
MAX_WORDS = 100_000
"""Most words, word pairs or character sequences of a vocabulary."""
MAX_CHARACTERS = 8_192
"""Characters of a text that are read. A GPT-2 reads 1,024 tokens, some 5,000 characters."""
PROBE_ROWS = 500
"""Rows of the first fit that is timed."""
MARGIN = 1.5
"""Factor on estimated seconds: the solver may need more passes over more rows."""
_WORD = re.compile(r"\b\w\w+\b")
_SAMPLED_TEXTS = 2_000

Analyzer = Literal["word", "char"]


class TooCostlyError(Exception):
    """A fit that does not pay even for few rows; the text is the reason."""


def choose_analyzer(texts: Sequence[str]) -> Analyzer:
    """Choose words, or characters where most words occur in one text only: text without spaces, or hardly a word at all.

    >>> choose_analyzer(["oil prices rose", "oil prices fell"]), choose_analyzer(["油价上涨", "油价下跌"])
    ('word', 'char')
    """
    step = max(1, len(texts) // _SAMPLED_TEXTS)
    words = [set(_WORD.findall(texts[i][:MAX_CHARACTERS].lower())) for i in range(0, len(texts), step)]
    num_texts = Counter(word for each in words for word in each)
    num_shared = sum(count for count in num_texts.values() if count > 1)
    return "word" if num_shared and 2 * num_shared >= num_texts.total() else "char"


def make_vectorizer(analyzer: Analyzer, num_classes: int) -> Any:
    """Make a tf-idf of words and word pairs, or of one to three characters, that occur in two texts or more."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    float32: Any = np.float32
    return TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=(1, 2) if analyzer == "word" else (1, 3),
        lowercase=True,
        sublinear_tf=True,
        min_df=2,
        max_features=min(MAX_WORDS, MAX_CELLS // num_classes),
        dtype=float32,
    )


def make_text_classifier() -> Any:
    """Make a logistic regression for tf-idf."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=3.0, solver="saga", tol=1e-2, max_iter=50, random_state=0)


def make_feature_classifier() -> Any:
    """Make a logistic regression for features, scaled to mean 0 and variance 1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-3, max_iter=100))


@contextmanager
def ignore_warnings() -> Generator[None]:
    """Keep two warnings off the console: passes of the solver are bounded on purpose, and a sample may have many classes."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        yield


def select_texts(texts: Sequence[str], rows_N: Integers) -> list[str]:
    """Return the texts of some rows, cut to `MAX_CHARACTERS`."""
    return [str(texts[row])[:MAX_CHARACTERS] for row in rows_N.tolist()]


def select_features(features_NH: NDArray[Any], rows_N: Integers) -> NDArray[np.float32]:
    """Return the features of some rows in float32; infinite values and NaN become 0."""
    return np.nan_to_num(features_NH[rows_N].astype(np.float32), posinf=0, neginf=0)


def order_stratified(labels_N: Integers, seed: int) -> NDArray[np.int64]:
    """Order the rows at random so that each first part of the order has all classes in their shares.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> [np.bincount(labels[order_stratified(labels, 0)[:n]]).tolist() for n in (3, 6)]
    [[2, 1], [4, 2]]
    """
    generator = np.random.default_rng(seed)
    classes_N = np.unique(labels_N, return_inverse=True)[1]
    shuffled_N = generator.permutation(len(labels_N))
    by_class_N = shuffled_N[np.argsort(classes_N[shuffled_N], kind="stable")]
    counts_C = np.bincount(classes_N)
    rank_N = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    # A shift by class, so that of many classes with one row each a random part comes first.
    place_N = (rank_N + np.repeat(generator.random(len(counts_C)), counts_C)) / np.repeat(counts_C, counts_C)
    return by_class_N[np.argsort(place_N, kind="stable")]


def choose_rows(
    labels_N: Integers,
    fit: Callable[[NDArray[np.int64]], object],
    *,
    max_rows: int,
    max_seconds: float,
    num_scored: int = 0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Choose as many rows, stratified, as can be fitted in the time, and return them in ascending order.

    Small fits are timed first. Cost is taken as proportional to rows x classes. `num_scored` rows are predicted later.

    Raises:
        TooCostlyError: the limits allow too few rows.
    """
    num_classes = len(np.unique(labels_N))
    if num_classes < 2:
        raise TooCostlyError(f"{len(labels_N):,} training rows of {num_classes} class: nothing to learn")
    order_N = order_stratified(labels_N, seed)
    limit = min(len(labels_N), max_rows, MAX_CELLS // num_classes)
    required = min(len(labels_N), max(min(max_rows, PROBE_ROWS), 2 * num_classes))
    if limit < required:
        raise TooCostlyError(f"{num_classes:,} classes: {limit:,} rows fit in memory or are allowed, {required:,} are needed")
    started, num_rows = time.perf_counter(), min(PROBE_ROWS, limit)
    while True:
        before = time.perf_counter()
        fit(order_N[:num_rows])
        now = time.perf_counter()
        share_seen = len(np.unique(labels_N[order_N[:num_rows]])) / num_classes
        seconds_per_row = MARGIN * (now - before) / num_rows / share_seen
        affordable = int((max_seconds - (now - started)) / seconds_per_row) - num_scored
        if affordable < required:
            raise TooCostlyError(f"{required:,} rows need more than {max_seconds:g} s")
        if 16 * num_rows >= limit or affordable <= 4 * num_rows:
            return np.sort(order_N[: min(limit, affordable)])
        num_rows *= 4
