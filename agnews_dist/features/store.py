"""One split's features as one flat file that any number of processes and threads fill, segment by segment.

Nobody needs to know of anybody: ranks of a job, two jobs at once, nodes with or without a common file system meet at the files
alone. A segment has one small file that is its lock while somebody computes it (the kernel frees it when its holder dies) and
its mark afterwards: the checksum of the segment's key, number and bytes, written when those are on disk. So to build, to go on
after a kill, to check what is there, and to mend what is damaged are the same loop.
"""

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agnews_dist.features.eviction import ABOUT, IN_USE, MARKS, ROWS, is_whole, mark_path, read_mark
from agnews_dist.storage.locks import is_open_at

_WAIT_SECONDS = 0.05
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FeatureFile:
    """The rows of a layout's segments below one directory."""

    def __init__(
        self,
        directory: Path,
        *,
        key: str,
        bounds_S: Sequence[int],
        width: int,
        dtype: torch.dtype,
        about: Mapping[str, Any],
    ) -> None:
        """Nothing is read or written yet.

        Args:
            directory: this file's own; its name should be the key.
            key: what the rows are a function of; part of every checksum, so that nothing else passes for them.
            bounds_S: segment s is the rows `bounds_S[s]` to `bounds_S[s + 1]`.
            width: numbers per row.
            dtype: their type.
            about: what a listing says of the file; JSON-ready.
        """
        self.directory = directory
        self._key, self._bounds_S, self._width, self._dtype = key, list(bounds_S), width, dtype
        self.num_segments = len(self._bounds_S) - 1
        self.num_bytes = self._offset(self.num_segments)
        self._about = dict(about) | {"bytes": self.num_bytes, "segments": self.num_segments}
        self._in_use: int | None = None

    @property
    def found(self) -> frozenset[int]:
        """The segments that are marked."""
        marked = (segment for segment in range(self.num_segments) if read_mark(self.directory, segment))
        return frozenset(marked)

    @property
    def is_complete(self) -> bool:
        """Whether every segment is marked and the file has its size; nothing is checked against the checksums."""
        return is_whole(self.directory, num_segments=self.num_segments, num_bytes=self.num_bytes)

    def allocate(self) -> None:
        """Reserve the whole space, so that a lack of it shows before any work, and keep others from removing the directory.

        Raises:
            OSError: no space, no permission.
        """
        self.hold()
        if self.is_complete:
            return
        (self.directory / MARKS).mkdir(exist_ok=True)
        staging = self.directory / f".{ABOUT}.{uuid.uuid4().hex}"
        staging.write_text(json.dumps(self._about, indent=1), encoding="utf-8")
        staging.replace(self.directory / ABOUT)
        handle = os.open(self.directory / ROWS, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # One at a time: where the C library imitates the reservation, it writes where others may fill already.
            fcntl.flock(handle, fcntl.LOCK_EX)
            before = os.fstat(handle).st_size
            try:
                if before < self.num_bytes:
                    _reserve(handle, self.num_bytes)
                else:
                    os.ftruncate(handle, self.num_bytes)
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)

    def hold(self) -> None:
        """Mark the directory as used now, and as in use until `close` or the end of this process."""
        anchor = self.directory / IN_USE
        while self._in_use is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                anchor.touch()
            except FileNotFoundError:
                continue  # removed since the line before
            except OSError:
                if not anchor.exists():  # else somebody else's, or on a read-only disk: good enough for reading
                    raise
            handle = os.open(anchor, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH)
            if is_open_at(handle, anchor):
                self._in_use = handle
            else:
                os.close(handle)  # removed while we waited for the lock

    def close(self) -> None:
        """Others may remove the directory from now on; what is mapped stays readable."""
        if self._in_use is not None:
            os.close(self._in_use)
            self._in_use = None

    def worker(
        self,
        compute: Callable[[int], Tensor | None],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        done: Callable[[int], None] = lambda _: None,
    ) -> Callable[[], None]:
        """A function that returns when all segments are there; any number of threads may run it at once.

        Of the segments that are marked, this rank checks those whose number is `rank` modulo `num_ranks` and trusts the other
        ranks for the rest, which therefore must have finished too before anyone reads. Missing and damaged segments are
        computed by whoever gets their lock; `compute` may put one off with None. `done` hears of every segment once, from one
        thread at a time.

        The function raises:
            OSError: no space, no permission; the segments that are marked stay.
        """
        first = rank * self.num_segments // num_ranks
        todo = deque([*range(first, self.num_segments), *range(first)])
        guard = threading.Lock()
        failed = threading.Event()
        num_left = self.num_segments

        def work() -> None:
            nonlocal num_left
            num_busy = 0
            while num_left and not failed.is_set():
                with guard:
                    segment = todo.popleft() if todo else None
                if segment is None:
                    time.sleep(_WAIT_SECONDS)  # other threads of this process have the rest
                    continue
                try:
                    is_there = self._ensure(segment, compute, checks=segment % num_ranks == rank)
                except BaseException:
                    failed.set()
                    raise
                with guard:
                    num_busy = 0 if is_there else num_busy + 1
                    if is_there:
                        num_left -= 1
                        done(segment)
                    else:
                        todo.append(segment)
                    others_have_the_rest = num_busy > 0 and num_busy >= len(todo)
                if others_have_the_rest:
                    time.sleep(_WAIT_SECONDS)

        return work

    def read(self, segment: int) -> Tensor | None:
        """The rows of one segment if they are there and whole."""
        digest = read_mark(self.directory, segment)
        if digest is None:
            return None
        begin, end = self._offset(segment), self._offset(segment + 1)
        content = bytearray(end - begin)
        try:
            with (self.directory / ROWS).open("rb") as file:
                file.seek(begin)
                if file.readinto(content) != len(content):
                    return None
        except OSError:
            return None
        if self._digest(segment, content) != digest:
            return None
        return torch.frombuffer(content, dtype=self._dtype).view(-1, self._width)

    def rows(self) -> Tensor:
        """All rows, memory-mapped: shape (rows, width). Call when every worker of every rank is done."""
        self.hold()
        if not self.num_bytes:
            return torch.empty(0, self._width, dtype=self._dtype)
        # Copy-on-write: a file that this user may not write opens too, and torch asks for writable memory.
        mapped = np.memmap(self.directory / ROWS, dtype=np.uint8, mode="c")
        return torch.from_numpy(mapped).view(self._dtype).view(-1, self._width)

    def _ensure(self, segment: int, compute: Callable[[int], Tensor | None], *, checks: bool) -> bool:
        """Make sure that a segment is there; False: somebody else is at it."""
        if not checks and read_mark(self.directory, segment):
            return True
        return self.obtain(segment, compute) is not None

    def obtain(self, segment: int, compute: Callable[[int], Tensor | None]) -> Tensor | None:
        """The rows of a segment, computed and brought to disk if they are not there whole; None: somebody else is at it.

        Raises:
            OSError: they cannot be written.
        """
        rows = self.read(segment)
        if rows is not None:
            return rows
        handle = os.open(mark_path(self.directory, segment), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            # Whoever had the lock before may have done it.
            rows = self.read(segment)
            if rows is None and (rows := compute(segment)) is not None:
                os.ftruncate(handle, 0)
                digest = self._write(segment, rows)
                os.pwrite(handle, digest.encode(), 0)
                os.fsync(handle)
            return rows
        finally:
            os.close(handle)

    def _write(self, segment: int, rows: Tensor) -> str:
        """Bring a segment to disk; returns its checksum."""
        content = rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        begin = self._offset(segment)
        assert begin + len(content) == self._offset(segment + 1)
        handle = os.open(self.directory / ROWS, os.O_WRONLY | os.O_DSYNC)
        try:
            written = 0
            while written < len(content):
                # Not through a mapping: where space runs out this raises, and a mapping kills the process.
                written += os.pwrite(handle, memoryview(content)[written:], begin + written)
        finally:
            os.close(handle)
        return self._digest(segment, content)

    def _digest(self, segment: int, content: bytes | bytearray) -> str:
        digest = hashlib.sha256(f"{self._key} {segment} ".encode())
        digest.update(content)
        return digest.hexdigest()

    def _offset(self, segment: int) -> int:
        return int(self._bounds_S[segment]) * self._width * self._dtype.itemsize


def _reserve(handle: int, num_bytes: int) -> None:
    """Grow a file to its size, with the space for it where the system can promise that."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(handle, 0, num_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:  # some network file systems
                raise
    os.ftruncate(handle, num_bytes)
