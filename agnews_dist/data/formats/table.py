"""A table that is read in chunks: what every reader of a file format provides."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import DataError, did_you_mean

TEXT_NAMES = (("text",), ("sentence",), ("content",), ("utterance",), ("title", "description"))
"""Usual names of text columns; more than one name: their texts are joined."""
LABEL_NAMES = ("label", "labels", "class", "category", "intent", "target")
"""Usual names of the label column."""
CHUNK_ROWS = 10_000
"""Rows that a reader holds as Python objects at once."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a table."""

    columns: Mapping[str, Sequence[object]]
    """Column -> its values, of equal length."""
    row_N: NDArray[np.int32]
    """Row numbers from 1; of rows in memory from 0, as in Python. In csv they count records, in jsonl lines."""
    batch: Any = None
    """The same rows as a pyarrow RecordBatch, if the file has types; else None."""

    def __len__(self) -> int:
        return len(self.row_N)


class Table(ABC):
    """Rows of one file, or of one split of a data set, read from the start by each call of `chunks`."""

    name: str
    """Name in messages: `train.csv`, `ag_news split train`."""
    columns: tuple[str, ...]
    """Names of the columns, in the order of the file."""
    note: str = ""
    """The way of reading the file, if that is not obvious: `fields are separated by tabs`."""
    schema: Any = None
    """The pyarrow schema of a file that has types; else None."""
    unit: str = "row"
    """Name of what is counted in messages: row, or line of a plain text."""
    row_labels: Sequence[object] | None = None
    """Labels of the rows, by row number: the index of a DataFrame. None: they have only numbers."""
    late_columns: Mapping[str, int] = {}
    """Column that is not in `columns` -> its first row so far: keys of JSON objects far behind the beginning."""

    card_classes: Mapping[str, tuple[str, ...]] = {}
    """Column -> names of its classes, as the card of the data set says."""

    @abstractmethod
    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield the rows in chunks, with the columns `wanted` only.

        Raises:
            DataError: the file is damaged or not of its format; names file and line or row.
        """

    def locate(self, number: int) -> str:
        """Name a row for a message."""
        return locate_row(self.name, number, self.row_labels, self.unit)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the names in the column's ClassLabel type of the `datasets` library; None if it has another type."""
        return self.card_classes.get(column)


def locate_row(name: str, number: int, labels: Sequence[object] | None = None, unit: str = "row") -> str:
    """Name a row for a message, with its label where that differs from its number.

    >>> locate_row("train.csv", 17), locate_row("train", 1, ["a", "b"])
    ('train.csv row 17', "train row 1 (index 'b')")
    """
    label = number if labels is None else labels[number]
    label = label.item() if isinstance(label, np.generic) else label
    is_same = type(label) is int and label == number
    return f"{name} {unit} {number}" + ("" if is_same else f" (index {label!r})")


def check_unique(name: str, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that each column of `wanted` is only once among `columns`.

    Raises:
        DataError: a name is there twice.
    """
    counts = Counter(columns)
    twice = [column for column in wanted if counts[column] > 1]
    if twice:
        raise DataError(
            f"{name} has two columns of the same name ({', '.join(map(repr, twice))}): names must be unique. "
            "Rename or remove one."
        )


def check_has(name: str, found: Sequence[str], wanted: Sequence[str], setting: str) -> None:
    """Check that the columns `wanted`, which `setting` names, are among those found.

    Raises:
        DataError: one is missing; names the columns found, and the nearest.
    """
    for column in wanted:
        if column not in found:
            raise DataError(
                f"{name} has no column {column!r} (found: {list_columns(found)}): {setting} names it."
                f"{did_you_mean(column, found)} Set --{setting} to a column of the file."
            )


def list_columns(columns: Sequence[str]) -> str:
    """List the names of columns for a message, at most twelve.

    >>> list_columns(["id", "text"])
    "'id', 'text'"
    """
    more = len(columns) - 12
    return ", ".join(map(repr, columns[:12])) + (f" and {more} more" if more > 0 else "") or "none"
