"""Rows of text with labels and origins, as they are read and as checked splits."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.columns import Columns, ColumnSettings, find_columns, is_original
from agnews_dist.data.formats.csv_file import CsvTable
from agnews_dist.data.formats.table import Chunk, Table, locate_row
from agnews_dist.data.texts import Texts, TextWriter
from agnews_dist.errors import DataError, count_noun, shorten
from agnews_dist.events import DataFinding

Ints = NDArray[np.int64]
LabelValue = str | int | bool
MAX_CLASSES = 10_000
_MAX_LABEL = 200
"""Characters of a field up to which it may be the label of a row that a stray quote has swallowed."""
NUM_SHOWN = 5
"""Rows that a message lists; it counts the others."""
A_DECIMAL = "a decimal number (pandas makes them of integers where a label is missing)"
UNREADABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
"""Characters that no name of a class may have: they end lines, control terminals or have no UTF-8 bytes."""
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
"""Characters without width, which are not white space to Python."""
NULL = r"\N"
"""A field without a value, as MySQL, PostgreSQL and Hive write it."""
T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """File and row number of N rows, so that an error can say `train.csv row 17`.

    Row numbers start at 1. In csv they count records without header and blank lines, in jsonl lines, in a json array elements.
    Elsewhere they count rows. Those of rows in memory start at 0.
    """

    files: tuple[str, ...]
    """Names relative to the source; `ag_news split train` for the hub."""
    file_N: NDArray[np.int32]
    """Indices into `files`."""
    row_N: NDArray[np.int32]
    row_labels: tuple[Sequence[object] | None, ...] = ()
    """By file: labels of its rows, see `Table.row_labels`; empty: no file has any."""

    def name(self, index: int) -> str:
        """Format the origin of one row: `train.csv row 17`."""
        file = int(self.file_N[index])
        return locate_row(self.files[file], int(self.row_N[index]), self.row_labels[file] if self.row_labels else None)

    def take(self, ids: Ints) -> "Origin":
        """Select the rows `ids`, in that order."""
        return Origin(self.files, self.file_N[ids], self.row_N[ids], self.row_labels)

    @staticmethod
    def of_file(name: str, num_rows: int) -> "Origin":
        """Return the origin of rows 1 to `num_rows` of one file."""
        return Origin((name,), np.zeros(num_rows, np.int32), np.arange(1, num_rows + 1, dtype=np.int32))


@dataclass(frozen=True)
class RawRows:
    """N rows of a split as they were read; the texts are checked, the labels are values of the file."""

    texts: Texts
    values: tuple[LabelValue, ...]
    """The different labels, in the order in which they occur."""
    code_N: NDArray[np.int32]
    """Indices into `values`; -1: the row has no label."""
    origin: Origin
    columns: Columns
    class_names: tuple[str, ...] | None = None
    """Names in the files' ClassLabel type; None if they have none."""
    is_original: bool = False
    """True if the columns are those of AG News' original csv."""
    notes: tuple[str, ...] = ()
    """Ways of reading the files that are not obvious."""

    def first_of(self, code: int) -> str:
        """Format the origin of the first row with a label."""
        return self.origin.name(int(np.flatnonzero(self.code_N == code)[0]))


@dataclass(frozen=True)
class Split:
    """N checked rows. The id of a row is its index here."""

    name: str
    texts: Texts
    labels: Ints
    """int64 class indices, shape (N,); -1 in every row of a split without labels."""
    origin: Origin

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, ids: Ints, name: str | None = None) -> "Split":
        """Select the rows `ids`, in that order, as a new split."""
        return Split(name or self.name, self.texts.take(ids), self.labels[ids], self.origin.take(ids))


@dataclass(frozen=True)
class Corpus:
    """Splits of a source."""

    splits: Mapping[str, Split]
    """At least one of train, validation and test, in this order."""
    class_names: tuple[str, ...]
    fingerprint: str
    """sha256 over class names, split names, texts and labels; the same on every machine and for every file format."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Label -> value for the header of a run: the columns, the classes, how the files were read."""
    findings: tuple[DataFinding, ...] = ()
    """Findings about the values of the labels."""
    notes: tuple[str, ...] = ()
    """Warnings about the settings of this start."""


def list_first(rows: Sequence[T], name: Callable[[T], str]) -> str:
    """List the first `NUM_SHOWN` rows and count the others: `train.csv row 3, train.csv row 8 and 12 more`."""
    more = len(rows) - NUM_SHOWN
    return ", ".join(shorten(name(row), 100) for row in rows[:NUM_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def quote_value(value: object) -> str:
    """Format a value of a file for a message; null and an empty field are both `null`."""
    if value is None or value == "":
        return "null"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def read_rows(
    split: str, tables: Sequence[Table], settings: ColumnSettings, *, needs_label: bool, directory: Path | None = None
) -> RawRows:
    """Read the tables of one split, in order, chunk by chunk; `directory`: place of texts beyond the memory.

    Raises:
        DataError: there are no rows; a text is missing, blank or not a string; a label is not text, integer or boolean;
            tables do not fit together.
    """
    reader = _Reader(split, settings, needs_label=needs_label, directory=directory)
    for table in tables:
        reader.read(table)
    return reader.finish()


class TextChecker:
    """Checker of the texts of many rows, which names bad ones together."""

    def __init__(self) -> None:
        self._not_strings: list[str] = []
        self._blank: list[str] = []
        self._suspects: dict[str, dict[str, None]] = {}
        """Label -> rows that hold a line with this label, see `CsvTable.suspects`."""

    def encode(self, text: object, table: Table, number: int) -> bytes:
        """Return the bytes of the text of row `number`; of a bad one none, and remember it.

        Raises:
            DataError: the text has a character without UTF-8 bytes.
        """
        if not isinstance(text, str):
            self._not_strings.append(f"{table.locate(number)}: {quote_value(text)}")
            return b""
        if not text or text.isspace() or text == NULL or not text.strip(_INVISIBLE).strip():
            self._blank.append(table.locate(number))
            return b""
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{table.locate(number)} holds {text[error.start]!r}, half of a surrogate pair: it has no UTF-8 "
                "bytes to tokenise. Write the file again from the original text."
            ) from error

    def add_suspects(self, table: Table, label: str | None) -> None:
        """Take over the suspects of a csv file that were found since the last call; `label`: its label column."""
        if not isinstance(table, CsvTable):
            return
        if label is not None:
            index = table.columns.index(label)
            for row, fields in table.suspects:
                if len(fields[index]) <= _MAX_LABEL:
                    self._suspects.setdefault(fields[index].strip(), {})[f"{table.name} row {row}"] = None
        table.suspects.clear()

    def check(self, labels: Iterable[LabelValue]) -> None:
        """Check that no text was bad; `labels`: those that rows have.

        Raises:
            DataError: a text is missing, blank, not a string, or holds whole rows.
        """
        if bad := self._not_strings:
            raise DataError(
                f"text is not a string in {count_noun(len(bad), 'row')} ({list_first(bad, str)}): only strings can be "
                "tokenised. Fill in or remove these rows, or set --data.text_column."
            )
        if blank := self._blank:
            raise DataError(
                f"text is empty or only white space in {count_noun(len(blank), 'row')} ({list_first(blank, str)}): no class "
                "can be read from it. Remove these rows."
            )
        names = set(map(str, labels)) if self._suspects else set[str]()
        swallowed = list(dict.fromkeys(row for label, rows in self._suspects.items() if label in names for row in rows))
        if swallowed:
            raise DataError(
                f"a field holds whole rows with labels in {count_noun(len(swallowed), 'row')} ({list_first(swallowed, str)}): "
                "a quote is probably opened or closed too much. Correct the quotes, or write the file as jsonl."
            )


class _Reader:
    """Collector of the rows of one split."""

    def __init__(self, split: str, settings: ColumnSettings, *, needs_label: bool, directory: Path | None) -> None:
        self._split, self._settings, self._needs_label = split, settings, needs_label
        self._texts = TextWriter(directory)
        self._codes: list[NDArray[np.int32]] = []
        self._rows: list[NDArray[np.int32]] = []
        self._code_of: dict[tuple[type, LabelValue], int] = {}
        self._files: list[str] = []
        self._row_labels: list[Sequence[object] | None] = []
        self._sizes: list[int] = []
        self._checker = TextChecker()
        self._first: tuple[Table, Columns] | None = None
        self._notes: dict[str, None] = {}

    def read(self, table: Table) -> None:
        """Add the rows of one table."""
        columns = find_columns(table, self._settings, needs_label=self._needs_label)
        first, its_columns = self._first or (table, columns)
        self._first = (first, its_columns)
        if columns.label is not None and its_columns.label is not None:
            pair = (table.class_names(columns.label), first.class_names(its_columns.label))
        else:
            pair = (columns.label, its_columns.label)
        if pair[0] != pair[1] or is_original(table, columns) != is_original(first, its_columns):
            raise DataError(
                f"{table.name} and {first.name} name or number their classes differently: labels of the same split would mean "
                "different things. Write both files in the same way."
            )
        if columns != its_columns:
            self._notes[f"{table.name}: {columns}"] = None
        if table.note:
            self._notes[table.note] = None
        num_rows = 0
        for chunk in table.chunks(columns.wanted):
            self._add(table, columns, chunk)
            num_rows += len(chunk)
        self._files.append(table.name)
        self._row_labels.append(table.row_labels)
        self._sizes.append(num_rows)

    def _add(self, table: Table, columns: Columns, chunk: Chunk) -> None:
        texts = texts_of(chunk, columns.text, self._settings.separator)
        for text, number in zip(texts, chunk.row_N.tolist(), strict=True):
            self._texts.add(self._checker.encode(text, table, number))
        self._checker.add_suspects(table, columns.label)
        self._rows.append(chunk.row_N)
        labels = chunk.columns[columns.label] if columns.label is not None else [None] * len(chunk)
        codes = [self._encode_label(label, table, int(row)) for label, row in zip(labels, chunk.row_N, strict=True)]
        self._codes.append(np.array(codes, dtype=np.int32))

    def _encode_label(self, label: object, table: Table, row: int) -> int:
        if isinstance(label, str):
            label = label.strip()
        key = (type(label), label)
        try:
            code = self._code_of.get(key)  # pyright: ignore[reportArgumentType] # only right values are stored
        except TypeError:  # a list or an object
            code = None
        if code is not None:
            return code
        if label is None or label in ("", NULL):
            return -1
        where = table.locate(row)
        if not isinstance(label, str | int):
            kind = A_DECIMAL if isinstance(label, float) else f"a {type(label).__name__}"
            raise DataError(
                f"label {quote_value(label)} in {where} is {kind}: a label is one text, integer or boolean. Write "
                "the labels so, or set --data.label_column."
            )
        if isinstance(label, str) and (found := UNREADABLE.search(label)):
            raise DataError(
                f"label {quote_value(label)} in {where} has the character {found[0]!r}: a class needs a readable "
                "name. Correct it."
            )
        if len(self._code_of) >= MAX_CLASSES:
            raise DataError(
                f"{where} has the {MAX_CLASSES + 1:,}th different label, {quote_value(label)}: at most "
                f"{MAX_CLASSES:,} classes are possible. Set --data.label_column to the column of the classes."
            )
        self._code_of[(type(label), label)] = len(self._code_of)
        return len(self._code_of) - 1

    def finish(self) -> RawRows:
        assert self._first is not None
        table, columns = self._first
        if not sum(self._sizes):
            raise DataError(
                f"split {self._split!r} ({list_first(self._files, str)}) has no rows: at least one is needed. "
                f"Check how the file was written, remove it, or leave the split out with --data.splits.{self._split} none."
            )
        values = tuple(value for _, value in self._code_of)
        self._checker.check(values)
        file_N = np.repeat(np.arange(len(self._files), dtype=np.int32), self._sizes)
        return RawRows(
            self._texts.finish(),
            values,
            np.concatenate(self._codes),
            Origin(tuple(self._files), file_N, np.concatenate(self._rows), tuple(self._row_labels)),
            columns,
            table.class_names(columns.label) if columns.label is not None else None,
            is_original(table, columns),
            tuple(self._notes),
        )


def texts_of(chunk: Chunk, columns: Sequence[str], separator: str) -> Sequence[object]:
    """Return the texts of a chunk: those of a column, or of several joined. Missing and empty parts are left out."""
    parts = [chunk.columns[column] for column in columns]
    return parts[0] if len(parts) == 1 else [_join(each, separator) for each in zip(*parts, strict=True)]


def _join(parts: Sequence[object], separator: str) -> object:
    """Join the texts of one row; a value of another kind is returned, as bad."""
    present = [part for part in parts if part is not None and part != ""]
    wrong = [part for part in present if not isinstance(part, str)]
    return wrong[0] if wrong else separator.join(map(str, present))


def hash_corpus(splits: Mapping[str, Split], class_names: Iterable[str]) -> str:
    """Hash class names, split names, texts and labels with sha256."""
    digest = hashlib.sha256()

    def add(text: bytes) -> None:
        # The length comes first, so that no two lists of texts give the same bytes.
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)

    for name in class_names:
        add(name.encode())
    for name, split in splits.items():
        add(name.encode())
        for i in range(len(split)):
            add(split.texts.encoded(i))
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()
