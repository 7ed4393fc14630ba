"""Findings about a corpus that a user should know before training: classes without rows, duplicates, leaks between splits."""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.rows import Corpus, Ints, Split, list_first
from agnews_dist.errors import count_noun
from agnews_dist.events import DataFinding

MIN_CLASS_ROWS = 10
"""Training rows below which a class is reported."""
_OTHERS = re.compile(r"[\W_]+")
_ASCII_SPACES = {code: " " for code in range(128) if _OTHERS.match(chr(code))}
Hashes = NDArray[np.int64]


def hash_texts(texts: Sequence[str], normalise: Callable[[str], str] = str) -> Hashes:
    """Return a 64-bit hash of every text, int64 (N,). It is the same within one process only."""
    return np.fromiter((hash(normalise(text)) for text in texts), dtype=np.int64, count=len(texts))


def normalise(text: str) -> str:
    """Reduce a text to its letters and digits, without case: two texts that differ in the rest are the same to a reader.

    >>> normalise("Oil  ROSE -- again!")
    'oil rose again'
    """
    if text.isascii():  # ten times as fast
        return " ".join(text.lower().translate(_ASCII_SPACES).split()) or text
    return _OTHERS.sub(" ", text.casefold()).strip() or text


def find_faults(corpus: Corpus) -> list[DataFinding]:
    """Return the findings, those about the labels' values first."""
    findings = list(corpus.findings)
    # A split alone is scored, and nothing learns from it.
    if "train" in corpus.splits and len(corpus.splits) > 1:
        findings += _check_classes(corpus.splits["train"], corpus.class_names)
    exact = {name: hash_texts(split.texts) for name, split in corpus.splits.items()}
    if "train" in corpus.splits:
        findings += _check_duplicates(corpus.splits["train"], exact["train"])
    findings += _check_leaks(corpus, exact)
    return findings


def _check_classes(train: Split, class_names: Sequence[str]) -> Iterator[DataFinding]:
    counts_C = np.bincount(train.labels, minlength=len(class_names))
    empty = np.flatnonzero(counts_C == 0).tolist()
    if empty:
        yield DataFinding(
            f"{len(empty):,} of {len(class_names):,} classes without a training row",
            list_first(empty, lambda label: str(class_names[label])),
            "such a class cannot be learnt",
            "Add rows, or leave it out",
        )
    rare = np.flatnonzero((counts_C > 0) & (counts_C < MIN_CLASS_ROWS)).tolist()
    if rare:
        yield DataFinding(
            f"{len(rare):,} of {len(class_names):,} classes with fewer than {MIN_CLASS_ROWS} training rows",
            list_first(rare, lambda label: f"{class_names[label]}: {counts_C[label]}"),
            "such a class is learnt poorly",
            "Add rows, or merge classes",
        )


def _check_duplicates(train: Split, hash_N: Hashes) -> Iterator[DataFinding]:
    _, first_N, group_N, count_G = np.unique(hash_N, return_index=True, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(count_G > 1)
    if not len(repeated):
        return
    first_of_N = first_N[group_N]
    other_N = np.flatnonzero(first_of_N != np.arange(len(hash_N)))
    conflicting = other_N[train.labels[other_N] != train.labels[first_of_N[other_N]]]
    if len(conflicting):
        num_texts = len(np.unique(group_N[conflicting]))
        yield DataFinding(
            f"{count_noun(num_texts, 'text')} of train with more than one label",
            _list_pairs(train, conflicting, train, first_of_N[conflicting]),
            "no model can be right for all of these rows",
            "Correct the labels, or remove these rows",
        )
    yield DataFinding(
        f"{count_noun(len(other_N), 'row')} of train with the text of an earlier row",
        _list_pairs(train, other_N, train, first_of_N[other_N]),
        "they count several times",
        "Remove them, unless that is meant",
    )


def _check_leaks(corpus: Corpus, exact: dict[str, Hashes]) -> Iterator[DataFinding]:
    """Yield the texts that two splits share, as they are, or but for case, punctuation and white space."""
    splits = list(corpus.splits.values())
    if len(splits) < 2:
        return
    fuzzy = {split.name: hash_texts(split.texts, normalise) for split in splits}
    for number, later in enumerate(splits):
        for earlier in splits[:number]:
            same_N, at_N = _find_in(exact[later.name], exact[earlier.name])
            alike_N, near_N = _find_in(fuzzy[later.name], fuzzy[earlier.name])
            is_new = ~np.isin(alike_N, same_N)
            for ids_N, others_N, how in (
                (same_N, at_N, ""),
                (alike_N[is_new], near_N[is_new], ", but for case, punctuation and white space"),
            ):
                if len(ids_N):
                    yield DataFinding(
                        f"{count_noun(len(ids_N), 'row')} of {later.name} with a text that is also in {earlier.name}{how}",
                        _list_pairs(later, ids_N, earlier, others_N),
                        f"scores on {later.name} would be inflated",
                        f"Remove them from {earlier.name}",
                    )


def _find_in(hash_N: Hashes, earlier_N: Hashes) -> tuple[Ints, Ints]:
    """Return (ids of `hash_N` that occur in `earlier_N`, the first id there of each)."""
    values, first_N = np.unique(earlier_N, return_index=True)
    place_N = np.minimum(np.searchsorted(values, hash_N), len(values) - 1)
    ids_N = np.flatnonzero(values[place_N] == hash_N)
    return ids_N, first_N[place_N[ids_N]]


def _list_pairs(split: Split, ids_N: Ints, other: Split, others_N: Ints) -> str:
    pairs = list(zip(ids_N.tolist(), others_N.tolist(), strict=True))
    return list_first(pairs, lambda pair: f"{split.origin.name(pair[0])} = {other.origin.name(pair[1])}")
