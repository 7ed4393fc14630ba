"""Rows of text with their labels and origins, and the checks that turn them into splits."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import DataError, did_you_mean

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Origin:
    """File and row number of N rows, so that an error can say `train.csv row 17`.

    Row numbers start at 1. In csv they count records without header and blank lines, in jsonl lines, in a json array elements.
    Elsewhere they count rows.
    """

    files: tuple[str, ...]
    """Names relative to the source; `ag_news split train` for the hub."""
    file_N: Ints
    """Indices into `files`."""
    row_N: Ints

    def name(self, index: int) -> str:
        """Format the origin of one row: `train.csv row 17`."""
        return f"{self.files[int(self.file_N[index])]} row {int(self.row_N[index])}"

    def take(self, ids: Ints) -> "Origin":
        """Select the rows `ids`, in that order."""
        return Origin(self.files, self.file_N[ids], self.row_N[ids])

    @staticmethod
    def of_file(name: str, num_rows: int) -> "Origin":
        """Return the origin of rows 1 to `num_rows` of one file."""
        return Origin((name,), np.zeros(num_rows, np.int64), np.arange(1, num_rows + 1, dtype=np.int64))

    @staticmethod
    def concatenate(parts: Sequence["Origin"]) -> "Origin":
        """Join the rows of all parts, in order."""
        first_file = np.cumsum([0, *(len(part.files) for part in parts)])
        return Origin(
            tuple(name for part in parts for name in part.files),
            np.concatenate([part.file_N + first for part, first in zip(parts, first_file, strict=False)]),
            np.concatenate([part.row_N for part in parts]),
        )


@dataclass(frozen=True)
class RawRows:
    """Unchecked rows of a file or a hub split."""

    texts: Sequence[object]
    labels: Sequence[object]
    origin: Origin
    class_names: tuple[str, ...] | None = None
    """Names in the file's ClassLabel feature; None if it has none."""
    first_label: int = 0
    """Number of the first class in the file: 1 in AG News' original csv."""


@dataclass(frozen=True)
class Split:
    """N checked rows. The id of a row is its index here."""

    name: str
    texts: Sequence[str]
    labels: Ints
    """int64 class indices, shape (N,)."""
    origin: Origin

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, ids: Ints, name: str | None = None) -> "Split":
        """Select the rows `ids`, in that order, as a new split."""
        texts = [self.texts[int(i)] for i in ids]
        return Split(name or self.name, texts, self.labels[ids], self.origin.take(ids))


@dataclass(frozen=True)
class Corpus:
    """Splits of a source."""

    splits: Mapping[str, Split]
    """At least one of train, validation and test, in this order."""
    class_names: tuple[str, ...]
    fingerprint: str
    """sha256 over class names, split names, texts and labels; the same on every machine and for every file format."""


T = TypeVar("T")
NUM_SHOWN = 5
"""Rows that a message lists; it counts the others."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


def list_first(rows: Sequence[T], name: Callable[[T], str]) -> str:
    """List the first `NUM_SHOWN` rows and count the others: `train.csv row 3, train.csv row 8 and 12 more`."""
    more = len(rows) - NUM_SHOWN
    return ", ".join(map(name, rows[:NUM_SHOWN])) + (f" and {more:,} more" if more > 0 else "")


def count_rows(num_rows: int) -> str:
    """Format a count: `1 row`, `1,200 rows`."""
    return f"{num_rows:,} row" + "s" * (num_rows != 1)


def check_columns(file: str, found: Sequence[str]) -> None:
    """Check that the columns `found` contain 'text' and 'label'.

    Raises:
        DataError: a column is missing; names the columns found, and the nearest.
    """
    missing = [name for name in ("text", "label") if name not in found]
    if missing:
        columns = ", ".join(map(repr, found)) or "none"
        raise DataError(
            f"{file} has no column {' and no column '.join(map(repr, missing))} (found: {columns}): every row needs a text "
            f"and a label.{did_you_mean(missing[0], found)} Rename the column to {missing[0]!r}."
        )


def check_split(name: str, raw: RawRows, class_names: tuple[str, ...]) -> Split:
    """Check that texts are strings and labels classes; returns the rows with class indices.

    Raises:
        DataError: there are no rows, or a text or label of the wrong kind.
    """
    if not raw.texts:
        raise DataError(
            f"split {name!r} ({list_first(raw.origin.files, str)}) has no rows: at least one is needed. Check how the file was "
            "written, or remove it."
        )
    bad = [i for i, text in enumerate(raw.texts) if not isinstance(text, str)]
    if bad:
        rows = list_first(bad, lambda i: f"{raw.origin.name(i)}: {_quote(raw.texts[i])}")
        raise DataError(
            f"text is not a string in {count_rows(len(bad))} ({rows}): only strings can be tokenised. Fill in or "
            "remove these rows."
        )
    texts = [text for text in raw.texts if isinstance(text, str)]
    return Split(name, texts, _parse_labels(raw, class_names), raw.origin)


def _quote(value: object) -> str:
    if value is None or value == "":
        return "null"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _parse_labels(raw: RawRows, class_names: tuple[str, ...]) -> Ints:
    """Convert labels given as integers, digits or class names to int64 indices (N,)."""

    # Labels take few different values, so each is parsed once. The type is part of the key because 1 == True == 1.0.
    @lru_cache(maxsize=None, typed=True)
    def parse(label: str | int) -> int | None:
        return _parse_label(label, class_names, raw.first_label)

    indices = [parse(label) if isinstance(label, str | int) else None for label in raw.labels]
    bad = [i for i, index in enumerate(indices) if index is None]
    if bad:
        first, last = raw.first_label, raw.first_label + len(class_names) - 1
        wrong = raw.labels[bad[0]]
        nearest = did_you_mean(wrong, class_names) if isinstance(wrong, str) else ""
        rows = list_first(bad, lambda i: f"{raw.origin.name(i)}: {_quote(raw.labels[i])}")
        raise DataError(
            f"label is not a class in {count_rows(len(bad))} ({rows}): classes are {first} to {last} "
            f"or {', '.join(class_names)}.{nearest} Correct these rows."
        )
    return np.array(indices, dtype=np.int64)


def _parse_label(label: str | int, class_names: tuple[str, ...], first_label: int) -> int | None:
    if isinstance(label, str):
        if label in class_names:
            return class_names.index(label)
        if not _INTEGER.fullmatch(label.strip()):
            return None
        label = int(label)
    if isinstance(label, bool):
        return None
    index = label - first_label
    return index if 0 <= index < len(class_names) else None


def hash_corpus(splits: Mapping[str, Split], class_names: Iterable[str]) -> str:
    """Hash class names, split names, texts and labels with sha256.

    Raises:
        DataError: a text holds half of a surrogate pair, which has no UTF-8 bytes.
    """
    digest = hashlib.sha256()

    def add(text: bytes) -> None:
        # The length comes first, so that no two lists of texts give the same bytes.
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)

    for name in class_names:
        add(name.encode())
    for name, split in splits.items():
        add(name.encode())
        for i, text in enumerate(split.texts):
            try:
                add(text.encode())
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{split.origin.name(i)} holds {text[error.start]!r}, half of a surrogate pair: it has no "
                    "UTF-8 bytes to tokenise. Write the file again from the original text."
                ) from error
        add(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def check_corpus(corpus: Corpus) -> list[str]:
    """Check that no text is blank, and that splits share no text; returns warnings about shared texts.

    Raises:
        DataError: texts are empty or only white space.
    """
    empty: list[tuple[Split, int]] = []
    first_seen: dict[str, tuple[Split, int]] = {}
    shared_texts: dict[tuple[str, str], list[str]] = {}
    for split in corpus.splits.values():
        for i, text in enumerate(split.texts):
            if not text.strip():
                empty.append((split, i))
            earlier, j = first_seen.setdefault(text, (split, i))
            if earlier is not split:
                pair = f"{split.origin.name(i)} = {earlier.origin.name(j)}"
                shared_texts.setdefault((split.name, earlier.name), []).append(pair)
    if empty:
        raise DataError(
            f"text is empty or only white space in {count_rows(len(empty))} "
            f"({list_first(empty, lambda row: row[0].origin.name(row[1]))}): no class can be read from it. Remove "
            "these rows."
        )
    return [
        f"{count_rows(len(pairs))} of {later} with a text that is also in {earlier} ({list_first(pairs, str)}): scores on "
        f"{later} would be inflated. Remove them from {earlier}."
        for (later, earlier), pairs in shared_texts.items()
    ]
