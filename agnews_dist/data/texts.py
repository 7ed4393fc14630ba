"""Many texts as UTF-8 bytes, in memory or in an unnamed file: ten million do not fit in memory as Python strings."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, overload

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import DataError

MEMORY_BYTES = 1 << 26
"""Bytes that are kept in memory; more go to a file."""


class _File:
    """A file without a name, closed with its last user."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __del__(self) -> None:
        with suppress(OSError):  # on a full disk it cannot write the rest
            self._file.close()

    def add(self, content: bytearray) -> None:
        self._file.write(content)
        self._file.flush()

    def read(self, begin: int, num_bytes: int) -> bytes:
        # Not mapped: pages that are read would count as this process's memory.
        return os.pread(self._file.fileno(), num_bytes, begin)

    def read_all(self) -> bytes:
        self._file.seek(0)
        return self._file.read()


class Texts(Sequence[str]):
    """N texts, decoded when they are read."""

    def __init__(self, content: bytes | _File, begin_N: NDArray[np.int64], end_N: NDArray[np.int64]) -> None:
        """Wrap UTF-8 bytes, or a file of them; text i is `content[begin_N[i]:end_N[i]]`."""
        self._content, self._begin_N, self._end_N = content, begin_N, end_N

    def __len__(self) -> int:
        return len(self._begin_N)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.encoded(i).decode() for i in range(*index.indices(len(self)))]
        return self.encoded(index).decode()

    def __iter__(self) -> Iterator[str]:
        return (self.encoded(i).decode() for i in range(len(self)))

    def encoded(self, index: int) -> bytes:
        """Return the UTF-8 bytes of a text."""
        begin, end = self._begin_N[index], self._end_N[index]
        return self._content[begin:end] if isinstance(self._content, bytes) else self._content.read(begin, end - begin)

    def take(self, ids: NDArray[np.int64]) -> "Texts":
        """Select the texts `ids`, in that order, without a copy of their bytes."""
        return Texts(self._content, self._begin_N[ids], self._end_N[ids])

    def __reduce__(self) -> tuple[Callable[..., "Texts"], tuple[bytes, NDArray[np.int64], NDArray[np.int64]]]:
        """Pickle the bytes themselves: a file without a name is of this process alone."""
        content = self._content if isinstance(self._content, bytes) else self._content.read_all()
        return _restore, (content, self._begin_N, self._end_N)

    @staticmethod
    def of(texts: Sequence[str]) -> "Texts":
        """Return the texts of a list."""
        writer = TextWriter()
        for text in texts:
            writer.add(text.encode())
        return writer.finish()


def _restore(content: bytes, begin_N: NDArray[np.int64], end_N: NDArray[np.int64]) -> Texts:
    """Restore pickled texts; many are put into a file, as they were."""
    if len(content) <= MEMORY_BYTES:
        return Texts(content, begin_N, end_N)
    writer = TextWriter()
    writer.add(content)
    return Texts(writer.finish()._content, begin_N, end_N)  # pyright: ignore[reportPrivateUsage]


class TextWriter:
    """Collector of texts: in memory, and beyond `MEMORY_BYTES` in a file that is gone when its process ends."""

    def __init__(self, directory: Path | None = None) -> None:
        """Start without texts; `directory`: place of the file, if it can be written. Else it is in the system's (TMPDIR)."""
        self._directory = directory
        self._pending = bytearray()
        self._file: _File | None = None
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
        self._pack_ends()
        offsets = np.concatenate(self._ends)
        if self._file is None:
            return Texts(bytes(self._pending), offsets[:-1], offsets[1:])
        self._flush()
        return Texts(self._file, offsets[:-1], offsets[1:])

    def _pack_ends(self) -> None:
        self._ends.append(np.array(self._new_ends, dtype=np.int64))
        self._new_ends = []

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.add(self._pending)
        except OSError as error:
            place = self._directory or tempfile.gettempdir()
            raise DataError(
                f"texts of {self._num_bytes / 1e9:.1f} GB cannot be kept in {place}: {error.strerror or error}. "
                "Free space there, or set another --data.cache_dir."
            ) from error
        self._pending = bytearray()

    def _open(self) -> _File:
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            return _File(tempfile.TemporaryFile(dir=self._directory))
        except OSError:
            self._directory = None
            return _File(tempfile.TemporaryFile())
