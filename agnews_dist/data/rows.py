"""Rows of text with their labels and where each came from: what the reading, checking and splitting of data pass on."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import DataError, did_you_mean

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Origin:
    """The file and row of N rows, so that an error can say `train.csv row 17`.

    Rows count from 1 as a person would see them: in csv the records without header and blank lines (a quoted line break
    does not start a new one), in jsonl the lines, in a json array its elements, in parquet, on the hub and in synthetic
    text the rows.
    """

    files: tuple[str, ...]
    """Names relative to the source, or `ag_news split train` for the hub."""
    file_N: Ints
    """Index into `files`."""
    row_N: Ints

    def __len__(self) -> int:
        return len(self.row_N)

    def name(self, index: int) -> str:
        """`train.csv row 17`."""
        return f"{self.files[int(self.file_N[index])]} row {int(self.row_N[index])}"

    def take(self, ids: Ints) -> "Origin":
        """The origins of the rows `ids`, in that order."""
        return Origin(self.files, self.file_N[ids], self.row_N[ids])

    @staticmethod
    def of_file(name: str, num_rows: int) -> "Origin":
        """Rows 1 to `num_rows` of one file."""
        return Origin((name,), np.zeros(num_rows, np.int64), np.arange(1, num_rows + 1, dtype=np.int64))

    @staticmethod
    def concatenate(parts: Sequence["Origin"]) -> "Origin":
        """The rows of all parts, in order."""
        first_file = np.cumsum([0, *(len(part.files) for part in parts)])
        return Origin(
            tuple(name for part in parts for name in part.files),
            np.concatenate([part.file_N + first for part, first in zip(parts, first_file, strict=False)]),
            np.concatenate([part.row_N for part in parts]),
        )


@dataclass(frozen=True)
class RawRows:
    """Rows as a file gives them, before any check."""

    texts: Sequence[object]
    labels: Sequence[object]
    origin: Origin
    class_names: tuple[str, ...] | None = None
    """From the file's own ClassLabel feature; None: the file does not say."""
    first_label: int = 0
    """How the file numbers its first class: 1 in AG News' original csv."""


@dataclass(frozen=True)
class Split:
    """N checked rows; the id of a row is its index here."""

    name: str
    texts: Sequence[str]
    labels: Ints
    """int64 class indices, shape (N,)."""
    origin: Origin

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, ids: Ints, name: str | None = None) -> "Split":
        """The rows `ids`, in that order, as a split of their own."""
        texts = [self.texts[int(i)] for i in ids]
        return Split(name or self.name, texts, self.labels[ids], self.origin.take(ids))


@dataclass(frozen=True)
class Corpus:
    """All splits of a source."""

    splits: Mapping[str, Split]
    """In the order train, validation, test; any but one may be absent."""
    class_names: tuple[str, ...]
    fingerprint: str
    """sha256 over class names, split names, texts and labels; the same on every machine and for every file format."""


T = TypeVar("T")
NUM_SHOWN = 5
"""Rows that a message lists before it only counts."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


def listed(rows: Sequence[T], name: Callable[[T], str]) -> str:
    """`train.csv row 3, train.csv row 8 and 12 more`; `name` is asked only for those shown."""
    more = len(rows) - NUM_SHOWN
    return ", ".join(map(name, rows[:NUM_SHOWN])) + (f" and {more:,} more" if more > 0 else "")


def counted(num_rows: int) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{num_rows:,} row" + "s" * (num_rows != 1)


def check_columns(file: str, found: Sequence[str], needed: Sequence[str] = ("text", "label")) -> None:
    """
    Raises:
        DataError: a column is missing; names those found, and the nearest.
    """
    missing = [name for name in needed if name not in found]
    if missing:
        columns = ", ".join(map(repr, found)) or "none"
        raise DataError(
            f"{file} has no column {' and no column '.join(map(repr, missing))} (found: {columns}): every row needs a text "
            f"and a label.{did_you_mean(missing[0], found)} Rename the column to {missing[0]!r}."
        )


def checked_split(name: str, raw: RawRows, class_names: tuple[str, ...]) -> Split:
    """`raw` with every text a string and every label a class index.

    Raises:
        DataError: no rows, a text that is no string, or labels that are no class.
    """
    if not raw.texts:
        raise DataError(
            f"split {name!r} ({listed(raw.origin.files, str)}) has no rows: there is nothing to read. Check how the file was "
            "written, or remove it."
        )
    bad = [i for i, text in enumerate(raw.texts) if not isinstance(text, str)]
    if bad:
        rows = listed(bad, lambda i: f"{raw.origin.name(i)}: {_literal(raw.texts[i])}")
        raise DataError(
            f"text is no string in {counted(len(bad))} ({rows}): only text can be tokenised. Fill in or remove these rows."
        )
    texts = [text for text in raw.texts if isinstance(text, str)]
    return Split(name, texts, _class_indices(raw, class_names), raw.origin)


def _literal(value: object) -> str:
    if value is None or value == "":
        return "null"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _class_indices(raw: RawRows, class_names: tuple[str, ...]) -> Ints:
    """int64 indices (N,) for labels given as integers, digits or class names."""
    # Labels take few different values: each is understood once. The type is part of the key, since 1 == True == 1.0.
    understood: dict[tuple[type, object], int | None] = {}
    indices = np.empty(len(raw.labels), dtype=np.int64)
    bad: list[int] = []
    for i, label in enumerate(raw.labels):
        if not isinstance(label, str | int | float | None):
            bad.append(i)
            continue
        key = (type(label), label)
        if key not in understood:
            understood[key] = _class_index(label, class_names, raw.first_label)
        index = understood[key]
        if index is None:
            bad.append(i)
        else:
            indices[i] = index
    if bad:
        first, last = raw.first_label, raw.first_label + len(class_names) - 1
        wrong = raw.labels[bad[0]]
        nearest = did_you_mean(wrong, class_names) if isinstance(wrong, str) else ""
        rows = listed(bad, lambda i: f"{raw.origin.name(i)}: {_literal(raw.labels[i])}")
        raise DataError(
            f"label is no class in {counted(len(bad))} ({rows}): classes are {first} to {last} "
            f"or {', '.join(class_names)}.{nearest} Correct these rows."
        )
    return indices


def _class_index(label: str | int | float | None, class_names: tuple[str, ...], first_label: int) -> int | None:
    if isinstance(label, str):
        if label in class_names:
            return class_names.index(label)
        if not _INTEGER.fullmatch(label.strip()):
            return None
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool):
        return None
    index = label - first_label
    return index if 0 <= index < len(class_names) else None


def fingerprint(splits: Mapping[str, Split], class_names: Iterable[str]) -> str:
    """sha256 over class names, split names, texts and labels, hexadecimal.

    Raises:
        DataError: a text holds half a surrogate pair, which no encoding can store.
    """
    digest = hashlib.sha256()

    def add(text: bytes) -> None:
        # With its length in front, so that no two lists of texts run together to the same bytes.
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
                    f"{split.origin.name(i)} holds {text[error.start]!r}, half of a surrogate pair: it is no character and has "
                    "no UTF-8 bytes to tokenise. Write the file again from the original text."
                ) from error
        add(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def check_corpus(corpus: Corpus) -> list[str]:
    """Look at every row once; returns warnings.

    Raises:
        DataError: texts that are empty or only white space.
    """
    empty: list[tuple[Split, int]] = []
    first_seen: dict[str, tuple[Split, int]] = {}
    twins: dict[tuple[str, str], list[str]] = {}
    for split in corpus.splits.values():
        for i, text in enumerate(split.texts):
            if not text.strip():
                empty.append((split, i))
            earlier, j = first_seen.setdefault(text, (split, i))
            if earlier is not split:
                pair = f"{split.origin.name(i)} = {earlier.origin.name(j)}"
                twins.setdefault((split.name, earlier.name), []).append(pair)
    if empty:
        raise DataError(
            f"text is empty or only white space in {counted(len(empty))} "
            f"({listed(empty, lambda row: row[0].origin.name(row[1]))}): nothing can be learnt or told from it. Remove these "
            "rows."
        )
    return [
        f"{counted(len(pairs))} of {later} with a text that is also in {earlier} ({listed(pairs, str)}): the score on {later} "
        f"is flattered by what was learnt by heart. Remove them from {earlier}."
        for (later, earlier), pairs in twins.items()
    ]
