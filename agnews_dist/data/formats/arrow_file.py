"""parquet and arrow files, read in chunks by pyarrow. Only wanted columns are read."""

import json
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agnews_dist.data.formats.streams import check_content, open_bytes, split_suffix
from agnews_dist.data.formats.table import CHUNK_ROWS, Chunk, Table, check_unique
from agnews_dist.data.hugging_face import translate_errors
from agnews_dist.errors import DataError

_SEARCH_BYTES = 1 << 20
"""Bytes of a parquet file that are searched at once."""


@contextmanager
def _reading(name: str) -> Generator[None]:
    """Turn pyarrow's exceptions inside the block into DataError."""
    try:
        with translate_errors(lambda reason: DataError(f"{name} cannot be read: {reason}. Copy or download the file again.")):
            yield
    except MemoryError as error:
        raise DataError(
            f"{name} cannot be read: {error}. Write it in smaller batches, or copy it again if it is damaged."
        ) from error


class _Columns(Mapping[str, list[object]]):
    """Columns of a pyarrow RecordBatch, which become Python objects when they are asked for."""

    def __init__(self, batch: Any, name: str) -> None:
        self._batch, self._name = batch, name
        self._found: dict[str, list[object]] = {}

    def __getitem__(self, column: str) -> list[object]:
        if column not in self._found:
            with _reading(self._name):
                self._found[column] = self._batch.column(column).to_pylist()
        return self._found[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns


class _ArrowTable(Table):
    """Base of tables that pyarrow reads batch by batch."""

    _features: Mapping[str, Any] | None = None
    """Column -> type of the `datasets` library, as JSON; None: as the file's metadata says."""

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        check_unique(self.name, self.columns, wanted)
        start = 1
        batches = self._batches(list(wanted))
        while True:
            with _reading(self.name):
                batch = next(batches, None)
                if batch is None:
                    return
            row_N = np.arange(start, start + batch.num_rows, dtype=np.int32)
            yield Chunk(_Columns(batch, self.name), row_N, batch)
            start += batch.num_rows

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the names that `datasets` has written into the file's metadata."""
        return read_class_names(self.schema, column, self._features) or super().class_names(column)

    @abstractmethod
    def _batches(self, wanted: list[str]) -> Iterator[Any]:
        """Yield record batches with at least the columns `wanted`."""


def read_class_names(schema: Any, column: str, features: Mapping[str, Any] | None = None) -> tuple[str, ...] | None:
    """Return the names of a column's classes in the types of `datasets`, as JSON: `features`, or the schema's metadata."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        names = (features or json.loads(metadata or b"null")["info"]["features"])[column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


class ParquetTable(_ArrowTable):
    """A parquet file."""

    def __init__(self, path: Path, name: str) -> None:
        from pyarrow.parquet import ParquetFile

        self._path, self.name = path, name
        with _reading(name), _open_seekable(path, name, b"PAR1") as source:
            file = ParquetFile(source)
            self.schema = file.schema_arrow
            self.columns = tuple(self.schema.names)
            self._check_not_joined(source, file.metadata)

    def _check_not_joined(self, source: Any, metadata: Any) -> None:
        """Check that no file was put before this one: pyarrow reads the last footer, and the rows of the first by it.

        Only indices and filters lie between the columns and the footer. A file that was put before makes this part longer by
        its own size.
        """
        chunks = (metadata.row_group(i).column(j) for i in range(metadata.num_row_groups) for j in range(metadata.num_columns))
        starts = ((chunk.dictionary_page_offset or chunk.data_page_offset, chunk) for chunk in chunks)
        end = max((start + chunk.total_compressed_size for start, chunk in starts), default=4)
        num_between = source.size() - metadata.serialized_size - 8 - end
        for begin in range(0, num_between, _SEARCH_BYTES):
            source.seek(begin)
            found = source.read(min(_SEARCH_BYTES, num_between - begin) + 8).find(b"PAR1PAR1")
            if found >= 0:
                raise refuse_joined(self.name, source.size() - begin - found - 4)

    def _batches(self, wanted: list[str]) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        with _open_seekable(self._path, self.name, b"PAR1") as source:
            file = ParquetFile(source)
            # One by one: pyarrow keeps what it has read until the last of the groups that it is given.
            for group in range(file.num_row_groups):
                yield from file.iter_batches(batch_size=CHUNK_ROWS, row_groups=[group], columns=wanted)


class ArrowTable(_ArrowTable):
    """An arrow file (also called feather), or an arrow stream."""

    def __init__(self, path: Path, name: str, features: Mapping[str, Any] | None = None) -> None:
        """Read the schema; `features`: column -> its type in the `datasets` library, if the file does not say it."""
        self._path, self.name, self._features = path, name, features
        with _reading(name), _open_seekable(path, name, b"ARROW1") as source:
            self._check_not_joined(source)
            source.seek(0)
            self.schema = _open_ipc(source).schema
            self.columns = tuple(self.schema.names)

    def _check_not_joined(self, source: Any) -> None:
        """Check that the footer, which pyarrow reads, is right behind the batches of the first file."""
        import pyarrow as pa

        source.seek(max(0, source.size() - 10))
        num_footer, mark = int.from_bytes(source.read(4), "little"), source.read()
        source.seek(0)
        if source.read(6) != b"ARROW1" or mark != b"ARROW1":
            return  # a stream, which is checked where it ends
        source.seek(8)  # behind the padded mark, an arrow file is a stream
        for _ in pa.ipc.MessageReader.open_stream(source):
            pass
        num_more = source.size() - 10 - num_footer - source.tell()
        if num_more > 64:  # more than an alignment, less than a file
            raise refuse_joined(self.name, num_more)

    def _batches(self, wanted: list[str]) -> Iterator[Any]:
        with _open_seekable(self._path, self.name, b"ARROW1") as source:
            reader = _open_ipc(source)
            is_file = hasattr(reader, "num_record_batches")
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                selected = batch.select(wanted)
                selected.validate(full=True)  # damaged offsets would end the process
                for begin in range(0, batch.num_rows, CHUNK_ROWS):
                    yield selected.slice(begin, CHUNK_ROWS)
            if not is_file:
                self._check_end(source)

    def _check_end(self, source: Any) -> None:
        """Check that a stream has its end mark, and nothing behind it: pyarrow accepts one that was cut off or joined."""
        end = source.tell()
        source.seek(max(0, end - 8))
        mark = source.read(8)
        if end < source.size():
            raise refuse_joined(self.name, source.size() - end)
        if mark[-4:] != b"\0\0\0\0" or mark[:4] not in (b"\xff\xff\xff\xff", b"\0\0\0\0"):
            raise DataError(
                f"{self.name} has no mark at the end of its arrow stream: it was cut off, and rows may be lost. Copy or write "
                "it again."
            )


def refuse_joined(name: str, num_more: int) -> DataError:
    """Return the error for a file with other content behind its end."""
    return DataError(
        f"{name} has {num_more:,} bytes behind its end: files were probably joined, and rows would be lost. Give each as a "
        "file of its own."
    )


@contextmanager
def _open_seekable(path: Path, name: str, mark: bytes) -> Generator[Any]:
    """Open a file that pyarrow may read at any place; a compressed one is decompressed in memory. `mark`: its first bytes."""
    import pyarrow as pa

    if not path.stat().st_size:
        raise DataError(f"{name} is empty: at least one row is needed. Check how it was written, or remove it.")
    if split_suffix(path)[1]:
        with open_bytes(path, name) as file:
            content = file.read()
            check_content(content[:32], name, own=(mark,))
            yield pa.BufferReader(content)
        return
    try:
        # Parquet is decoded piece by piece; mapped, the whole file would count as this process's memory.
        source = pa.memory_map(str(path)) if mark == b"ARROW1" else pa.OSFile(str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions.") from error
    with source:
        check_content(source.read(32), name, own=(mark,))
        source.seek(0)
        yield source


def _open_ipc(source: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)
