"""Plain text: one text per line, for `predict`."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from agnews_dist.data.formats.streams import read_lines
from agnews_dist.data.formats.table import CHUNK_ROWS, Chunk, Table


class TextTable(Table):
    """A file with one text per line, as a table with the column `text`."""

    columns = ("text",)

    def __init__(self, path: Path, name: str) -> None:
        """Remember the file."""
        self._path, self.name = path, name

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Yield the lines without their ends; see `Table`."""
        lines, start = read_lines(self._path, self.name), 1
        while part := list(islice(lines, CHUNK_ROWS)):
            texts = [line.removesuffix("\n").removesuffix("\r") for line in part]
            yield Chunk(dict.fromkeys(wanted, texts), np.arange(start, start + len(texts), dtype=np.int32))
            start += len(texts)
