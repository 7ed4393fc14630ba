"""Formats of lines: jsonl (one object per line), json (an array of objects, or one object per line) and plain text.

`datasets` is not used. It infers a type per block: one wrong label changes others, and text that looks like dates becomes
dates. Its errors do not name the line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from agnews_dist.data.columns import TEXT_NAMES
from agnews_dist.data.formats.streams import read_lines, split_lines
from agnews_dist.data.formats.table import CHUNK_ROWS, Chunk, Table, list_columns
from agnews_dist.errors import DataError

_WORDS = re.compile(r"[\w.-]+( [\w.-]+)?")
_MAX_OBJECT = 1 << 24
"""Characters after which an object of an array is not awaited any more."""


class TextTable(Table):
    """A file with one text per line, as a table with the column `text`."""

    columns = ("text",)
    unit = "line"

    def __init__(self, source: Path | BinaryIO, name: str, *, is_sure: bool = False) -> None:
        """Remember the source; a stream or a pipe is read once. `is_sure`: do not check whether the first line is a table's."""
        self._source, self.name, self._is_sure = source, name, is_sure
        self.is_stream = not (isinstance(source, Path) and source.is_file())

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield the lines without their ends; see `Table`."""
        source, start = self._source, 1
        lines = read_lines(source, self.name) if isinstance(source, Path) else split_lines(source, self.name)
        while part := list(islice(lines, CHUNK_ROWS)):
            texts = [line.removesuffix("\n").removesuffix("\r") for line in part]
            if start == 1 and not self._is_sure:
                self._check_first(texts[0])
            yield Chunk(dict.fromkeys(wanted, texts), np.arange(start, start + len(texts), dtype=np.int32))
            start += len(texts)

    def _check_first(self, line: str) -> None:
        found = describe_table(line)
        if found is not None:
            raise DataError(
                f"{self.name} line 1 looks like {found}: its raw lines would be classified. Set --input_format to its format, "
                "or to txt for one text per line."
            )


def describe_table(line: str) -> str | None:
    """Return what the first line of a table shows, as a noun; None for a line of plain text.

    >>> describe_table("text,label"), describe_table("Text, they say, is dead")
    ('a csv header', None)
    """
    if line.startswith(("PAR1", "ARROW1")):
        return "a parquet or arrow file"
    if re.fullmatch(r"\s*\[\s*(\{.*)?", line):
        return "a JSON array"
    try:
        if isinstance(json.loads(line), dict):
            return "a JSON object"
    except (ValueError, RecursionError):
        pass
    for separator in ",;\t|":
        # A sentence has a space after its comma.
        fields = [field.strip('"').lower() for field in line.split(separator)]
        are_names = len(set(fields)) == len(fields) > 1 and all(map(_WORDS.fullmatch, fields))
        if are_names and any(set(names) <= set(fields) for names in TEXT_NAMES):
            return "a csv header"
    return None


class ArgumentTable(Table):
    """Texts from the command line, as a table with the column `text`."""

    columns = ("text",)
    name, unit = "text", "argument"

    def __init__(self, texts: Sequence[str]) -> None:
        """Remember the texts."""
        self._texts = list(texts)

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield all texts; see `Table`."""
        yield Chunk(dict.fromkeys(wanted, self._texts), np.arange(1, len(self._texts) + 1, dtype=np.int32))


class JsonTable(Table):
    """A file of JSON objects. A key that a row lacks is null there."""

    def __init__(self, path: Path, name: str) -> None:
        """Find the form of the file, and the keys of its first rows."""
        self._path, self.name = path, name
        lines = read_lines(path, name)
        first = next((line for line in lines if line.strip()), None)
        if first is None:
            raise DataError(f"{name} is empty: at least one row is needed. Check how it was written, or remove it.")
        self._is_array = first.lstrip().startswith("[")
        keys: dict[str, None] = {}
        rows = [row for _, row in islice(self._rows(), CHUNK_ROWS)]
        for row in rows:
            keys |= dict.fromkeys(row)
        if not keys:
            raise DataError(f"{name} has no rows: at least one is needed. Check how it was written, or remove it.")
        if not self._is_array and len(rows) == 1 and all(isinstance(value, list | dict) for value in rows[0].values()):
            raise DataError(
                f"{name} is one object of {list_columns(tuple(keys))}, each a list or an object: a json file holds rows. Write "
                "an array of rows, with pandas by to_json(orient='records')."
            )
        self.columns = tuple(keys)
        self.late_columns = {}

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield the rows; see `Table`."""
        rows = self._rows()
        known = frozenset(self.columns)
        while part := list(islice(rows, CHUNK_ROWS)):
            for number, row in part:
                if not row.keys() <= known:
                    self.late_columns = {**{key: number for key in row if key not in known}, **self.late_columns}
            columns = {column: [row.get(column) for _, row in part] for column in wanted}
            yield Chunk(columns, np.array([number for number, _ in part], dtype=np.int32))

    def _rows(self) -> Iterator[tuple[int, dict[str, object]]]:
        """Yield (row number, object)."""
        for number, value in self._array() if self._is_array else self._lines():
            if not isinstance(value, dict):
                raise DataError(
                    f"{self.name} row {number} is {str(value)[:40]!r}, not an object: a row has named fields. Write it as "
                    '{"text": ..., "label": ...}.'
                )
            yield number, cast("dict[str, object]", value)

    def _lines(self) -> Iterator[tuple[int, object]]:
        for number, line in enumerate(read_lines(self._path, self.name), start=1):
            if line.strip():
                try:
                    yield number, _DECODER.decode(line)
                except (ValueError, RecursionError) as error:
                    raise self._refuse(number, error) from error

    def _array(self) -> Iterator[tuple[int, object]]:
        """Yield the elements of an array, decoded one at a time."""
        lines = read_lines(self._path, self.name)
        text, position, number, separator = "", 0, 1, "["
        while True:
            text, position = _skip_space(text, position, lines)
            found = text[position : position + 1]
            if found == "]" and separator != "[":
                break
            if found != separator:
                reason = f"{separator!r} is expected before it, and {found!r} found" if found else "the array is not closed"
                raise self._refuse(number, ValueError(reason))
            text, position = _skip_space(text, position + 1, lines)
            if separator == "[" and text[position : position + 1] == "]":
                break
            value, text, position = self._element(text, position, lines, number)
            yield number, value
            number, separator = number + 1, ","
        rest = next((line for line in chain([text[position + 1 :]], lines) if line.strip()), None)
        if rest is not None:
            raise self._refuse(number, ValueError(f"the array is followed by {rest.strip()[:20]!r}"))

    def _element(self, text: str, position: int, lines: Iterator[str], number: int) -> tuple[object, str, int]:
        """Decode the element at `position`; return it, the text now at hand, and the position after the element."""
        text, position = text[position:], 0
        while True:
            try:
                value, end = _DECODER.raw_decode(text, position)
                # A number that ends the text at hand may continue in the next line.
                if end < len(text) or isinstance(value, (dict, list, str)):
                    return value, text, end
                reason: Exception = ValueError("the array is not closed")
            except (ValueError, RecursionError) as error:
                reason = error
            # More lines at once, the more were needed: an element of many lines is not decoded once per line.
            more = "".join(islice(lines, 1 + text.count("\n")))
            if not more or len(text) > _MAX_OBJECT:
                raise self._refuse(number, reason) from reason
            text += more

    def _refuse(self, number: int, error: Exception) -> DataError:
        # The parser sees one row at a time, so its line number means nothing.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(f"{self.name} row {number} is not valid JSON: {reason}. Write one object with its fields per line.")


def _skip_space(text: str, position: int, lines: Iterator[str]) -> tuple[str, int]:
    """Return the text and the position of its next character that is not white space, reading lines as needed."""
    while True:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        if position < len(text):
            return text, position
        line = next(lines, None)
        if line is None:
            return text, position
        text, position = line, 0


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text; a key that is there twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice ({', '.join(repr(key) for key, _ in pairs)})")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_to_object)
