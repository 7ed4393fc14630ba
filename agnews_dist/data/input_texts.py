"""Texts to classify, in chunks: from arguments, standard input, a file of any format, or a directory of part files.

A file is read twice. The first pass checks and counts its rows, so that a bad row is found before hours of work. Plain text
from a stream is read once.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from agnews_dist.data.columns import ColumnSettings, find_columns, find_text
from agnews_dist.data.formats.csv_file import CsvTable
from agnews_dist.data.formats.line_file import ArgumentTable, JsonTable, TextTable
from agnews_dist.data.formats.registry import PART_SUFFIX, READERS, SUFFIXES, open_table
from agnews_dist.data.formats.streams import COMPRESSIONS, split_suffix
from agnews_dist.data.formats.table import Chunk, Table
from agnews_dist.data.local_files import SplitSettings, open_local
from agnews_dist.data.rows import TextChecker, texts_of
from agnews_dist.errors import ConfigError, DataError, did_you_mean

Format = Literal["csv", "tsv", "jsonl", "json", "txt"]
"""Values of `--input_format`."""
STREAM = "-"
"""Value of `--file` that means standard input."""
TEXT_SUFFIX = ".txt"
"""Suffix of a file with one text per line."""
MAX_NAME = 255
"""Characters of an argument that may be the name of a file."""
MAX_LABELS = 10_000
"""Labels of a csv that are kept for the check of its quotes."""


@dataclass(frozen=True)
class InputChunk:
    """Consecutive texts, checked, with the columns of their rows."""

    texts: Sequence[str]
    ids: Sequence[object]
    """Values of the column `id`, or row numbers from 0."""
    table: Table
    rows: Chunk
    """A chunk of `table` that holds these rows and perhaps more."""
    begin: int
    """First of them in `rows`."""

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str) -> Sequence[object]:
        return self.rows.columns[name][self.begin : self.begin + len(self)]

    @property
    def batch(self) -> Any:
        """The rows as a pyarrow RecordBatch; None if the file has no types."""
        return None if self.rows.batch is None else self.rows.batch.slice(self.begin, len(self))

    def locate(self, index: int) -> str:
        """Name a row for a message: `news.csv row 17`."""
        return self.table.locate(int(self.rows.row_N[self.begin + index]))


class InputTexts:
    """Texts of one or several tables, in order."""

    def __init__(
        self, tables: Sequence[Table], settings: ColumnSettings, *, keeps_columns: bool, spool: IO[bytes] | None = None
    ) -> None:
        """Find the columns. `keeps_columns`: read all of them, not only text and id; `spool`: file to keep until the end.

        Raises:
            DataError: a table has no text column, or others than the first.
        """
        self._separator, self._keeps_columns, self._spool = settings.separator, keeps_columns, spool
        first = tables[0]
        self._is_stream = isinstance(first, TextTable) and first.is_stream
        self.name, self.schema, self.columns = first.name, first.schema, first.columns
        self._is_json = all(isinstance(table, JsonTable) for table in tables)
        if self._is_json:  # programs leave out keys without a value, so parts have different ones
            self.columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
        self.num_texts = 0
        """Number of texts after `check`; 0: unknown."""
        for table in tables:
            if keeps_columns and not self._is_json and (table.columns != first.columns or table.schema != first.schema):
                raise DataError(
                    f"{table.name} has other columns or types than {first.name}: one output cannot hold both. Write both in "
                    "the same way, or classify one at a time."
                )
        plain = (TextTable, ArgumentTable)
        self._text = {table: table.columns if isinstance(table, plain) else find_text(table, settings) for table in tables}
        self._label = {table: _find_label(table, settings) for table in tables}

    @property
    def notes(self) -> list[str]:
        """Lines about how the tables are read, where that is not obvious."""
        found: dict[str, None] = {}
        for table, names in self._text.items():
            parts = [f"text from {' + '.join(map(repr, names))}"] * (names != ("text",)) + [table.note] * bool(table.note)
            if parts:
                found[f"{table.name}: {'; '.join(parts)}"] = None
        return list(found)

    def check(self) -> None:
        """Read, check and count all texts. A stream is not read.

        Raises:
            DataError: there are none, the file is damaged, or a text is missing, blank or not a string.
        """
        if self._is_stream:
            return
        checker, labels = TextChecker(), set[str]()
        for table, text in self._text.items():
            label = self._label[table]
            for chunk in table.chunks(text if label is None else (*text, label)):
                if label is not None and len(labels) < MAX_LABELS:
                    labels |= set(map(str, chunk.columns[label]))
                self._check(checker, table, chunk)
                self.num_texts += len(chunk)
            self._check_late_columns(table)
        checker.check(labels)
        if not self.num_texts:
            raise self._refuse_nothing()

    def chunks(self, max_texts: int) -> Iterator[InputChunk]:
        """Yield chunks of at most `max_texts` texts.

        Raises:
            DataError: as `check`, for a stream when the bad text is reached.
        """
        num_texts = 0
        for table, text in self._text.items():
            has_id = "id" in table.columns
            wanted = self.columns if self._keeps_columns else (*text, *(["id"] if has_id and "id" not in text else []))
            for chunk in table.chunks(wanted):
                texts = texts_of(chunk, text, self._separator)
                ids = chunk.columns["id"] if has_id else [None] * len(chunk)
                if self._is_stream:
                    self._check(checker := TextChecker(), table, chunk)
                    checker.check(())
                for begin in range(0, len(chunk), max_texts):
                    part = slice(begin, begin + max_texts)
                    found = [num_texts + i if each is None or each == "" else each for i, each in enumerate(ids[part])]
                    yield InputChunk([str(each) for each in texts[part]], found, table, chunk, begin)
                    num_texts += len(found)
        if not num_texts:
            raise self._refuse_nothing()

    def types_of_columns(self) -> dict[str, set[type]]:
        """Return the Python types of each column's values, without None. Objects of JSON are read for this."""
        types: dict[str, set[type]] = {column: set() for column in self.columns}
        for table in self._text if self._is_json else ():
            for chunk in table.chunks(self.columns):
                for column, found in types.items():
                    found |= set(map(type, chunk.columns[column]))
        return {column: found - {type(None)} for column, found in types.items()}

    def _check(self, checker: TextChecker, table: Table, chunk: Chunk) -> None:
        texts = texts_of(chunk, self._text[table], self._separator)
        for text, number in zip(texts, chunk.row_N.tolist(), strict=True):
            checker.encode(text, table, number)
        checker.add_suspects(table, self._label[table])

    def _check_late_columns(self, table: Table) -> None:
        late = [column for column in table.late_columns if column not in self.columns and self._keeps_columns]
        if late:
            raise DataError(
                f"{table.name} row {table.late_columns[late[0]]} has the key {late[0]!r}, which no row near the beginning has: "
                "the output has no column for it. Add the key to the first row, with null."
            )

    def _refuse_nothing(self) -> DataError:
        return DataError(
            f"{self.name} is empty: there is nothing to classify. Give texts as arguments, with --file, or one per line on "
            "standard input."
        )


def open_texts(
    arguments: Sequence[str],
    file: str | None,
    stdin: BinaryIO,
    *,
    input_format: Format | None,
    columns: ColumnSettings,
    splits: SplitSettings,
    keeps_columns: bool,
) -> InputTexts:
    """Open the arguments, a file or directory, or standard input. `input_format`: None: by the suffix, or lines on a stream.

    Raises:
        ConfigError: arguments and a file, or an argument that is the name of a file.
        DataError: the file cannot be read, or has no text column.
    """
    if arguments and file is not None:
        raise ConfigError(f"--file {file!r} and {len(arguments)} text argument(s): only one may be given. Remove the other.")
    if arguments:
        _refuse_file_names(arguments)
        return InputTexts([ArgumentTable(arguments)], columns, keeps_columns=keeps_columns)
    path = None if file is None or file == STREAM else Path(file)
    if path is not None and not path.exists():
        raise DataError(f"--file {file!r}: the file cannot be read (no such file). Check the path.")
    if path is not None and (path.is_file() or path.is_dir()):
        tables = _open_directory(path, splits) if path.is_dir() else [_open_file(path, input_format)]
        return InputTexts(tables, columns, keeps_columns=keeps_columns)
    source, name = (stdin, "standard input") if path is None else (path, str(path))
    if input_format in (None, "txt"):
        return InputTexts([TextTable(source, name, is_sure=input_format is not None)], columns, keeps_columns=keeps_columns)
    spool = _copy(source, name, f".{input_format}")
    table = READERS[f".{input_format}"](Path(spool.name), name)
    return InputTexts([table], columns, keeps_columns=keeps_columns, spool=spool)


def _open_file(path: Path, input_format: Format | None) -> Table:
    suffix = f".{input_format}" if input_format else split_suffix(path)[0]
    if suffix == TEXT_SUFFIX:
        return TextTable(path, path.name, is_sure=input_format is not None)
    if input_format is None and suffix not in (*SUFFIXES, PART_SUFFIX):
        known = (*SUFFIXES, TEXT_SUFFIX)
        raise DataError(
            f"--file {str(path)!r}: no reader knows the suffix {suffix!r} (known: {', '.join(known)}, also with "
            f"{', '.join(COMPRESSIONS)}).{did_you_mean(suffix, known)} Rename it, or set --input_format."
        )
    return open_table(path, path.name, suffix if input_format else None)


def _open_directory(path: Path, splits: SplitSettings) -> Sequence[Table]:
    found = open_local(path, splits)
    if len(found) > 1:
        raise DataError(
            f"--file {str(path)!r}: it holds the splits {', '.join(found)}, and one input is needed. Name the file or folder "
            f"of one, or leave the others out with --data.splits.{list(found)[-1]} none."
        )
    return next(iter(found.values()))


def _copy(source: Path | BinaryIO, name: str, suffix: str) -> IO[bytes]:
    """Copy a stream or a pipe to a temporary file: tables are read twice."""
    try:
        spool = tempfile.NamedTemporaryFile(suffix=suffix)  # noqa: SIM115 (closed with the texts)
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
            shutil.copyfileobj(stream, spool)
        spool.flush()
    except OSError as error:
        raise DataError(
            f"{name} cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}. Free space there, set TMPDIR, or "
            "give a file with --file."
        ) from error
    return spool


def _refuse_file_names(arguments: Sequence[str]) -> None:
    """Refuse an argument that is the name of a file with texts: its name would be classified."""
    for argument in arguments:
        if (
            len(argument) < MAX_NAME
            and split_suffix(Path(argument))[0] in (*SUFFIXES, TEXT_SUFFIX)
            and Path(argument).is_file()
        ):
            raise ConfigError(
                f"text argument {argument!r}: it is the name of a file, and only the name would be classified. "
                f"Write --file {argument}, or give it on standard input to classify the name."
            )


def _find_label(table: Table, settings: ColumnSettings) -> str | None:
    """Return the label column of a csv, which shows whether a text has swallowed other rows; None: unknown."""
    try:
        return find_columns(table, settings, needs_label=False).label if isinstance(table, CsvTable) else None
    except DataError:
        return None
