"""Plain texts for `predict`: one per line of a file or stream, or the arguments of a command."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from agnews_dist.data.columns import TEXT_NAMES
from agnews_dist.data.formats.streams import read_lines, split_lines
from agnews_dist.data.formats.table import CHUNK_ROWS, Chunk, Table
from agnews_dist.errors import DataError

_WORDS = re.compile(r"[\w.-]+( [\w.-]+)?")


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
