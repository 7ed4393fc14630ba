"""Rows that a caller gives in Python: pandas, `datasets`, arrow, lists. They are read by the same code as rows of files.

A row is named by its position from 0, and by its label in the frame's index where that differs. No library is imported here to
recognise its objects.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.formats.arrow_file import read_class_names
from agnews_dist.data.formats.table import CHUNK_ROWS, Chunk, Table, check_unique
from agnews_dist.data.hugging_face import translate_errors
from agnews_dist.data.local_files import SPLIT_WORDS, SplitSettings, exists, open_local
from agnews_dist.data.rows import RawRows, quote_value, read_rows
from agnews_dist.errors import DataError

KINDS = "a pandas DataFrame, a datasets.Dataset, an arrow table, (texts, labels), a list of rows, or a path"
_PAIR = ("text", "label")
"""Columns of rows that have no names for theirs."""
Read = Callable[[str, int, int], Sequence[object]]
"""Function that returns the values of a column from one row to another."""


class GivenTable(Table):
    """Rows in memory."""

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        num_rows: int,
        read: Read,
        *,
        row_labels: Sequence[object] | None = None,
        class_names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """`read`: see `Read`; `class_names`: column -> names of its classes."""
        self.name, self.columns, self.row_labels, self.card_classes = name, tuple(columns), row_labels, class_names or {}
        self._num_rows, self._read = num_rows, read

    def __len__(self) -> int:
        return self._num_rows

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield the rows; see `Table`. Their numbers are positions from 0."""
        check_unique(self.name, self.columns, wanted)
        for begin in range(0, self._num_rows, CHUNK_ROWS):
            end = min(begin + CHUNK_ROWS, self._num_rows)
            columns = {column: [_plain(value) for value in self._read(column, begin, end)] for column in wanted}
            yield Chunk(columns, np.arange(begin, end, dtype=np.int32))


def read_given(
    given: Mapping[str, object], columns: ColumnSettings, splits: SplitSettings | None = None, directory: Path | None = None
) -> dict[str, RawRows]:
    """Read and check the rows of every split.

    Args:
        given: split -> rows; train may hold several splits (a DatasetDict).
        columns: see `ColumnSettings`.
        splits: names of the splits of a DatasetDict, where they are not the usual ones.
        directory: place of texts beyond the memory.

    Raises:
        DataError: rows of an unknown kind, or wrong ones; names the row.
    """
    tables: dict[str, list[Table]] = {}
    for split, rows in given.items():
        for name, found in _open(split, rows, splits or SplitSettings()).items():
            if name in tables:
                raise DataError(f"{split}: the split {name!r} is there twice, in train and on its own. Leave one out.")
            tables[name] = found
    return {
        name: read_rows(name, found, columns, needs_label=name != "test", directory=directory) for name, found in tables.items()
    }


def open_texts(texts: object) -> GivenTable:
    """Open texts to classify: a list, an array or a column of strings.

    Raises:
        DataError: it is one string, or no sequence.
    """
    if isinstance(texts, str):
        raise DataError("texts is one string: each of its characters would be a text. Write predict([text]).")
    values = _list_values(texts)
    if values is None:
        raise DataError(f"texts is {_describe(texts)}: a list, an array or a column of strings is needed. Write a list.")
    return GivenTable("texts", _PAIR[:1], len(values), lambda _, begin, end: values[begin:end], row_labels=_index_of(texts))


def _open(split: str, rows: Any, splits: SplitSettings) -> dict[str, list[Table]]:
    """Return split -> tables."""
    if isinstance(rows, (str, Path)):
        return {split: _open_path(split, Path(rows))}
    if _is(rows, "datasets", "DatasetDict"):
        if split != "train":
            raise DataError(f"{split} is a DatasetDict: it holds several splits. Give one of them, {split}=splits[NAME].")
        names = {name: splits.find(name, list(rows), split) for name in SPLIT_WORDS}
        return {name: [_open_dataset(name, rows[found])] for name, found in names.items() if found is not None}
    if _is(rows, "datasets", "Dataset"):
        return {split: [_open_dataset(split, rows)]}
    if _is(rows, "pandas", "DataFrame"):
        return {split: [_open_frame(split, rows)]}
    if hasattr(rows, "__arrow_c_stream__"):
        return {split: [_open_arrow(split, rows)]}
    if isinstance(rows, tuple):
        return {split: [_open_lists(split, cast("tuple[object, ...]", rows))]}
    if isinstance(rows, list):
        return {split: [_open_rows(split, cast("list[object]", rows))]}
    raise DataError(f"{split} is {_describe(rows)}: no rows can be read from it. Give {KINDS}.")


def _is(value: object, module: str, name: str) -> bool:
    """Return whether a value is of a library's class, without importing the library."""
    return any(each.__name__ == name and each.__module__.partition(".")[0] == module for each in type(value).__mro__)


def _open_path(split: str, path: Path) -> list[Table]:
    """Open the file or directory of one split."""
    if not exists(path):
        raise DataError(
            f"{split} {str(path)!r}: no such path, and a hub id cannot be combined with other rows. Give a path, or rows that "
            "datasets.load_dataset has read."
        )
    found = open_local(path, SplitSettings(unnamed=split))
    if split not in found:
        raise DataError(f"{split} {str(path)!r}: it has only the split {', '.join(found)}. Name the file or folder of {split}.")
    return found[split]


def _open_frame(split: str, frame: Any) -> Table:
    columns = [str(column) for column in frame.columns]

    def read(column: str, begin: int, end: int) -> Sequence[object]:
        # By position: labels of the index may be there twice, or in another order.
        return _restore_integers(frame.iloc[:, columns.index(column)]).iloc[begin:end].tolist()

    return GivenTable(split, columns, len(frame), read, row_labels=_index_of(frame))


def _restore_integers(series: Any) -> Any:
    """Return integers that pandas has made decimal numbers, because a value is missing, as integers again."""
    if series.dtype.kind != "f" or not series.hasnans or (series.dropna() % 1 != 0).any():
        return series
    return series.astype("Int64")


def _index_of(frame: Any) -> Sequence[object] | None:
    """Return the index of a DataFrame or Series; None: it is that of the positions, or there is none."""
    index = frame.index if _is(frame, "pandas", "NDFrame") else None
    is_default = type(index).__name__ == "RangeIndex" and (cast(Any, index).start, cast(Any, index).step) == (0, 1)
    return None if is_default else index


def _open_dataset(split: str, dataset: Any) -> Table:
    names = {
        column: tuple(map(str, feature.names))
        for column, feature in dataset.features.items()
        if type(feature).__name__ == "ClassLabel" and feature.names
    }

    def read(column: str, begin: int, end: int) -> Sequence[object]:
        # Without the caller's format or transform, and without decoding other columns.
        with translate_errors(lambda reason: DataError(f"{split} cannot be read: {reason}. Check the data set.")):
            return dataset.with_format(None).select_columns([column])[begin:end][column]

    return GivenTable(split, dataset.column_names, len(dataset), read, class_names=names)


def _open_arrow(split: str, rows: Any) -> Table:
    import pyarrow as pa

    table = pa.table(rows)

    def read(column: str, begin: int, end: int) -> Sequence[object]:
        return table.column(column)[begin:end].to_pylist()

    names = {column: found for column in table.column_names if (found := read_class_names(table.schema, column))}
    return GivenTable(split, table.column_names, len(table), read, class_names=names)


def _open_lists(split: str, pair: tuple[object, ...]) -> Table:
    """Open (texts, labels)."""
    lists = [_list_values(each) for each in pair if not isinstance(each, str)]
    found = [values for values in lists if values is not None]
    if len(pair) != 2 or len(found) != 2:
        raise DataError(f"{split} is a tuple: it must be (texts, labels), two lists. Give these, or rows in a list.")
    texts, labels = found
    if len(texts) != len(labels):
        raise DataError(f"{split} has {len(texts)} texts and {len(labels)} labels: every text needs one. Correct the lists.")
    columns: dict[str, list[object]] = dict(zip(_PAIR, found, strict=True))

    def read(column: str, begin: int, end: int) -> Sequence[object]:
        return columns[column][begin:end]

    return GivenTable(split, _PAIR, len(texts), read, row_labels=_index_of(pair[0]))


def _list_values(values: Any) -> list[object] | None:
    """Return the values of a list, an array or a column; None: it is neither."""
    if _is(values, "pandas", "Series"):
        return _restore_integers(values).tolist()
    for method in ("tolist", "to_pylist", "to_list"):  # numpy, arrow, others
        if hasattr(values, method):
            found = getattr(values, method)()
            return found if isinstance(found, list) else None
    return list(cast("Sequence[object]", values)) if isinstance(values, Sequence) else None


def _open_rows(split: str, rows: list[object]) -> Table:
    """Open a list of mappings, or of pairs (text, label)."""
    if all(isinstance(row, Mapping) for row in rows) and rows:
        mappings = cast("list[Mapping[str, object]]", rows)
        columns = dict.fromkeys(str(column) for row in mappings for column in row)

        def read(column: str, begin: int, end: int) -> Sequence[object]:
            return [row.get(column) for row in mappings[begin:end]]

        return GivenTable(split, tuple(columns), len(rows), read)
    for number, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or len(cast("Sequence[object]", row)) != 2:
            raise DataError(
                f"{split} row {number} is {quote_value(row)}: a row of a list is a pair (text, label) or a dict. Write all "
                "rows in one way, or two lists as (texts, labels)."
            )
    pairs = cast("list[Sequence[object]]", rows)

    def read_pairs(column: str, begin: int, end: int) -> Sequence[object]:
        return [pair[_PAIR.index(column)] for pair in pairs[begin:end]]

    return GivenTable(split, _PAIR, len(pairs), read_pairs)


def _plain(value: Any) -> object:
    """Return a value as files give it: numpy's scalars as Python's, and every mark of a missing value as None."""
    if isinstance(value, np.generic):
        value = value.item()
    is_missing = value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if is_missing else value


def _describe(value: object) -> str:
    """Name the type of a value: `a dict`."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
