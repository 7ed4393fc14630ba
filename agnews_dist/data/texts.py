"""Many texts as UTF-8 bytes, in memory or in an unnamed file: ten million do not fit in memory as Python strings."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, overload

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import DataError

MEMORY_BYTES = 1 << 26
"""Bytes that are kept in memory; more go to a file."""


class Texts(Sequence[str]):
    """N texts, decoded when they are read."""

    def __init__(self, content: bytes | mmap.mmap, begin_N: NDArray[np.int64], end_N: NDArray[np.int64]) -> None:
        """Wrap UTF-8 `content`; text i is `content[begin_N[i]:end_N[i]]`."""
        self._content, self._begin_N, self._end_N = content, begin_N, end_N
        self._num_read = 0

    def __len__(self) -> int:
        return len(self._begin_N)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            pairs = zip(self._begin_N[index].tolist(), self._end_N[index].tolist(), strict=True)
            encoded = [self._content[begin:end] for begin, end in pairs]
            self._count_read(sum(map(len, encoded)))
            return [text.decode() for text in encoded]
        return self.encoded(index).decode()

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), 1000):
            yield from self[begin : begin + 1000]

    def encoded(self, index: int) -> bytes:
        """Return the UTF-8 bytes of a text."""
        text = self._content[self._begin_N[index] : self._end_N[index]]
        self._count_read(len(text))
        return text

    def _count_read(self, num_bytes: int) -> None:
        """Take the pages of the file out of this process now and then; they can be read again."""
        self._num_read += num_bytes
        if self._num_read > MEMORY_BYTES and isinstance(self._content, mmap.mmap):
            self._num_read = 0
            if hasattr(mmap, "MADV_DONTNEED"):
                self._content.madvise(mmap.MADV_DONTNEED)

    def take(self, ids: NDArray[np.int64]) -> "Texts":
        """Select the texts `ids`, in that order, without a copy of their bytes."""
        return Texts(self._content, self._begin_N[ids], self._end_N[ids])

    @staticmethod
    def of(texts: Sequence[str]) -> "Texts":
        """Return the texts of a list."""
        writer = TextWriter()
        for text in texts:
            writer.add(text.encode())
        return writer.finish()


class TextWriter:
    """Collector of texts: in memory, and beyond `MEMORY_BYTES` in a file that is gone when its process ends."""

    def __init__(self, directory: Path | None = None) -> None:
        """Start without texts; `directory`: place of the file, if it can be written. Else it is in the system's (TMPDIR)."""
        self._directory = directory
        self._pending = bytearray()
        self._file: IO[bytes] | None = None
        self._num_bytes = 0
        self._ends: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._new_ends: list[int] = []

    def add(self, text: bytes) -> None:
        """Add one text.

        Raises:
            DataError: the space does not suffice.
        """
        self._pending += text
        self._num_bytes += len(text)
        self._new_ends.append(self._num_bytes)
        if len(self._new_ends) >= 100_000:
            self._pack_ends()
        if len(self._pending) > MEMORY_BYTES:
            self._flush()

    def finish(self) -> Texts:
        """Return all texts."""
        self._pack_ends()
        offsets = np.concatenate(self._ends)
        if self._file is None:
            content: bytes | mmap.mmap = bytes(self._pending)
        else:
            self._flush()
            content = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._file.close()  # the map keeps it
        return Texts(content, offsets[:-1], offsets[1:])

    def _pack_ends(self) -> None:
        self._ends.append(np.array(self._new_ends, dtype=np.int64))
        self._new_ends = []

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(self._pending)
            self._file.flush()
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):  # it writes what is left
                    self._file.close()
            place = self._directory or tempfile.gettempdir()
            raise DataError(
                f"texts of {self._num_bytes / 1e9:.1f} GB cannot be kept in {place}: {error.strerror or error}. "
                "Free space there, "
                "or set another --data.cache_dir."
            ) from error
        self._pending = bytearray()

    def _open(self) -> IO[bytes]:
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self._directory)
        except OSError:
            self._directory = None
            return tempfile.TemporaryFile()
