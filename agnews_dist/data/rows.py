"""Rows of text with their labels and where each came from: what the reading, checking and splitting of data pass on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
