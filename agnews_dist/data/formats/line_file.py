"""Formats of lines: jsonl (one object per line), json (an array of objects, or objects one after the other) and plain text.

`datasets` is not used. It infers a type per block: one wrong label changes others, and text that looks like dates becomes
dates. Its errors do not name the line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import numpy as np

from agnews_dist.data.formats.streams import MAX_LINE, open_bytes, open_text, read_lines, split_lines
from agnews_dist.data.formats.table import CHUNK_ROWS, TEXT_NAMES, Chunk, Table, list_columns
from agnews_dist.errors import DataError

_WORDS = re.compile(r"[\w.-]+( [\w.-]+)?")
_FIX = "Write one object with its fields per line, or one array of objects."
_BLOCK = 1 << 16
"""Characters of an array that are read at once, at least."""
_NO_SPACE = re.compile(r"[^ \t\r\n]")


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
        start, lines = 1, self._lines()
        while part := list(islice(lines, CHUNK_ROWS)):
            texts = [line.removesuffix("\n").removesuffix("\r") for line in part]
            if start == 1 and not self._is_sure:
                self._check_first(texts[0])
            yield Chunk(dict.fromkeys(wanted, texts), np.arange(start, start + len(texts), dtype=np.int32))
            start += len(texts)

    def _lines(self) -> Iterator[str]:
        source = self._source
        if not isinstance(source, Path):
            yield from split_lines(source, self.name)
        elif not self.is_stream:
            yield from read_lines(source, self.name)
        else:  # a pipe
            with open_bytes(source, self.name) as file:
                yield from split_lines(file, self.name)

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
        self._texts = list(texts)

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        yield Chunk(dict.fromkeys(wanted, self._texts), np.arange(1, len(self._texts) + 1, dtype=np.int32))


class JsonTable(Table):
    """A file of JSON objects. A key that a row lacks is null there."""

    def __init__(self, path: Path, name: str) -> None:
        """Find the form of the file, and the keys of its first rows."""
        self._path, self.name = path, name
        with open_text(path, name) as file:
            first = _TextWindow(file).skip_space()  # not its line, which may be the whole file
        if not first:
            raise DataError(f"{name} is empty: at least one row is needed. Check how it was written, or remove it.")
        self._read = self._array if first == "[" else self._lines if self._has_lines() else self._values
        keys: dict[str, None] = {}
        one: dict[str, object] | None = None
        for number, (_, row) in enumerate(islice(self._rows(), CHUNK_ROWS)):
            keys |= dict.fromkeys(row)
            one = None if number else row
        if keys and one is not None and _holds_rows(one):
            raise DataError(
                f"{name} is one object with the fields {list_columns(tuple(keys))}, which hold the rows: a file "
                "has one object per row. Write an array of objects, or one per line (pandas: orient='records')."
            )
        if not keys:
            raise DataError(f"{name} has no rows: at least one is needed. Check how it was written, or remove it.")
        self.columns = tuple(keys)
        self.late_columns = {}

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
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
        for number, value in self._read():
            if not isinstance(value, dict):
                raise DataError(
                    f"{self.name} row {number} is {str(value)[:40]!r}, not an object: a row has named fields. Write it as "
                    '{"text": ..., "label": ...}.'
                )
            yield number, cast("dict[str, object]", value)

    def _has_lines(self) -> bool:
        """Return whether the first line is a value of its own."""
        try:
            _DECODER.decode(next(line for line in read_lines(self._path, self.name) if line.strip()))
        except (ValueError, RecursionError):
            return False
        return True

    def _values(self) -> Iterator[tuple[int, object]]:
        """Yield values that follow each other anywhere, as jq prints them over several lines."""
        number = 0
        with open_text(self._path, self.name) as file:
            text = _TextWindow(file)
            while text.skip_space():
                number += 1
                try:
                    value = text.decode()
                except (ValueError, RecursionError) as error:
                    raise self._refuse(number, error) from error
                yield number, value

    def _lines(self) -> Iterator[tuple[int, object]]:
        for number, line in enumerate(read_lines(self._path, self.name), start=1):
            if line.strip():
                try:
                    yield number, _DECODER.decode(line.rstrip())
                except (ValueError, RecursionError) as error:
                    raise self._refuse(number, error) from error

    def _array(self) -> Iterator[tuple[int, object]]:
        """Yield the elements of an array, decoded one at a time: many programs write all of them into one line."""
        number, separator = 1, "["
        with open_text(self._path, self.name) as file:
            text = _TextWindow(file)
            while True:
                found = text.skip_space()
                if found == "]" and separator != "[":
                    break
                if found != separator:
                    reason = f"{separator!r} is expected before it, and {found!r} found" if found else "the array is not closed"
                    raise self._refuse(number, ValueError(reason))
                text.position += 1
                if text.skip_space() == "]" and separator == "[":
                    break
                try:
                    value = text.decode()
                except (ValueError, RecursionError) as error:
                    raise self._refuse(number, error) from error
                yield number, value
                number, separator = number + 1, ","
            text.position += 1
            if text.skip_space():
                rest = text.text[text.position :][:20].strip()
                raise self._refuse(number, ValueError(f"the array is followed by {rest!r}"))

    def _refuse(self, number: int, error: Exception) -> DataError:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            # The position in the row: the parser's own line and column are those of the part that was read.
            reason = f"{error.msg.removesuffix(' at')} at column {error.pos + 1}"
        return DataError(f"{self.name} row {number} is not valid JSON: {reason}. {_FIX}")


def _holds_rows(row: dict[str, object]) -> bool:
    """Return whether an object holds rows itself, in columns or in a list, as pandas and some programs write them."""
    are_columns = len(row) > 1 and all(isinstance(value, (dict, list)) for value in row.values())
    return are_columns or any(
        isinstance(value, list) and bool(value) and all(isinstance(each, (dict, list)) for each in cast("list[object]", value))
        for value in row.values()
    )


class _TextWindow:
    """The part of a text file that is being decoded."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.text, self.position = file, "", 0

    def _grow(self) -> bool:
        """Read on, the more the larger the part is; return whether there was more."""
        more = self._file.read(max(_BLOCK, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def skip_space(self) -> str:
        """Move to the next character that is not white space, and return it; empty at the end."""
        while True:
            match = _NO_SPACE.search(self.text, self.position)
            if match is not None:
                self.position = match.start()
                return match[0]
            self.position = len(self.text)
            if not self._grow():
                return ""

    def decode(self) -> object:
        """Decode the value at the position and move behind it.

        Raises:
            ValueError: it is not JSON.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                # A number may continue behind the part.
                if end < len(self.text) or isinstance(value, (dict, list, str)):
                    self.position = end
                    return value
                reason = ValueError("the array is not closed")
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError):
                    error.pos -= self.position
                reason = error
            if len(self.text) - self.position > MAX_LINE or not self._grow():
                raise reason


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of a JSON text; a key that is there twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice ({', '.join(repr(key) for key, _ in pairs)})")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_to_object)
