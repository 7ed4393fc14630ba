"""Features as one flat file that any number of processes and threads fill, segment by segment.

Processes coordinate through files alone: ranks of a job, two jobs at once, nodes with or without a common file system. Each
segment has one mark file. While a process computes the segment, the mark is its lock, which the kernel releases if that process
dies. Afterwards the mark holds a checksum of the key, the segment's number and its bytes, written after the bytes are on disk.
So one loop builds a file, continues after a kill, verifies a finished file and repairs a damaged one. A verified file is
verified again only after a write to it: a restart would read gigabytes before its first step.
"""

import errno
import hashlib
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agnews_dist.features.eviction import ABOUT, IN_USE, INDEX, MARKS, ROWS, VERIFIED, has_all_segments, mark_path, read_mark
from agnews_dist.storage.locks import LockWait, Say, acquire, lock_shared, try_lock

_WAIT_SECONDS = 0.05
_RECENT_SECONDS = 2.0
"""Above the resolution of file times: two writes within it can leave the same ones."""
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FeatureFile:
    """The rows of a layout's segments, in a directory of their own."""

    def __init__(
        self,
        directory: Path,
        *,
        key: str,
        bounds_S: Sequence[int],
        width: int,
        dtype: torch.dtype,
        about: Mapping[str, Any],
        index: bytes = b"",
        say: Say = lambda _: None,
    ) -> None:
        """Describe the file; nothing is read or written yet.

        `key` (see `piece_key`) is part of every checksum, so rows of another key never pass as these. Segment s is the rows
        `bounds_S[s]` to `bounds_S[s + 1]`, each of `width` numbers. `about` are facts for listings, JSON-ready. `index` names
        the texts (see `PieceIndex`). `say` gets a line about each long wait for another process.
        """
        self.directory = directory
        self._key, self._bounds_S, self._width, self._dtype = key, bounds_S, width, dtype
        self.num_segments = len(bounds_S) - 1
        self.num_bytes = self._offset(self.num_segments)
        self._say = say
        self._about = dict(about) | {"bytes": self.num_bytes, "segments": self.num_segments}
        self._index = index
        self._lock: int | None = None
        self._state_at_start: str | None = None

    @property
    def finished_segments(self) -> frozenset[int]:
        """Segments that are marked as finished; their bytes are not verified."""
        return frozenset(segment for segment in range(self.num_segments) if read_mark(self.directory, segment))

    @property
    def is_complete(self) -> bool:
        """True if every segment is finished (see `has_all_segments`)."""
        return has_all_segments(self.directory, num_segments=self.num_segments, num_bytes=self.num_bytes)

    def allocate(self) -> None:
        """Lock the directory and reserve the whole space, so that a full disk shows before any work.

        Raises:
            OSError: no space, no permission.
        """
        self.lock()
        if self.is_complete and not self._lacks_index():
            return
        (self.directory / MARKS).mkdir(exist_ok=True)
        # A directory with a description has an index.
        self._publish(INDEX, self._index)
        self._publish(ABOUT, json.dumps(self._about, indent=1, allow_nan=False).encode())
        handle = os.open(self.directory / ROWS, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # One process at a time: glibc emulates the reservation by writing, which could overwrite another's segments.
            acquire(handle, self._wait_for(ROWS))
            size = os.fstat(handle).st_size
            try:
                if size < self.num_bytes:
                    _reserve(handle, self.num_bytes)
                else:
                    os.ftruncate(handle, self.num_bytes)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)

    def _lacks_index(self) -> bool:
        try:
            return (self.directory / INDEX).read_bytes() != self._index
        except OSError:
            return True

    def _publish(self, name: str, content: bytes) -> None:
        staging = self.directory / f".{name}.{uuid.uuid4().hex}"
        staging.write_bytes(content)
        staging.replace(self.directory / name)

    def lock(self) -> None:
        """Mark the directory as used now, and protect it from eviction until `close` or the end of this process."""
        if self._lock is None:
            self._lock = lock_shared(self.directory / IN_USE, self._wait_for(IN_USE))

    def _wait_for(self, name: str) -> LockWait:
        return LockWait(self.directory / name, f"features {self.directory.name[:12]}", self._say)

    def close(self) -> None:
        """Release the lock. Mapped rows stay readable, even if the directory is removed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def make_worker(
        self,
        compute: Callable[[int], Tensor],
        on_segment: Callable[[int], None] = lambda _: None,
        *,
        segments: Sequence[int] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> Callable[[], None]:
        """Return a function that completes the file, or some `segments` of it; several threads may run it at once.

        This rank verifies the finished segments s with s % num_ranks == rank and trusts the other ranks for the rest. It
        verifies none if the file has not changed since `mark_as_verified`. So rows may be read when the workers of all ranks
        have returned. The process that gets the lock of a missing or damaged segment computes its rows. One thread at a time
        calls `on_segment`, once for every segment. A rank verifies each of `segments`, if they are given.

        The function raises:
            OSError: no space, no permission, or a process that has a segment's lock shows no sign of life; finished segments
                stay.
        """
        is_trusted = self.begin_verification()
        wanted = range(self.num_segments) if segments is None else segments
        first = rank * len(wanted) // num_ranks
        wait, waited_for = self._wait_for(MARKS), -1
        queue = deque([*wanted[first:], *wanted[:first]])
        guard = threading.Lock()
        failed = threading.Event()
        num_left = len(wanted)

        def must_verify(segment: int) -> bool:
            return segments is not None or (segment % num_ranks == rank and not is_trusted)

        def work() -> None:
            nonlocal num_left, wait, waited_for
            num_locked = 0
            while num_left and not failed.is_set():
                with guard:
                    segment = queue.popleft() if queue else None
                if segment is None:
                    time.sleep(_WAIT_SECONDS)  # other threads of this process have the rest
                    continue
                try:
                    is_finished = self._complete(segment, compute, verify=must_verify(segment))
                except BaseException:
                    failed.set()
                    raise
                with guard:
                    num_locked = 0 if is_finished else num_locked + 1
                    if is_finished:
                        num_left -= 1
                        on_segment(segment)
                    else:
                        queue.append(segment)
                    others_have_the_rest = num_locked > 0 and num_locked >= len(queue)
                    if others_have_the_rest and segment == min(queue):
                        if segment != waited_for:
                            waited_for, wait = segment, self._wait_for(f"{MARKS}/{mark_path(self.directory, segment).name}")
                        wait.look()
                if others_have_the_rest:
                    time.sleep(_WAIT_SECONDS)

        return work

    def read_segment(self, segment: int) -> Tensor | None:
        """Return the rows of one segment; None if it is not finished or does not match its checksum."""
        checksum = read_mark(self.directory, segment)
        if checksum is None:
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
        if self._checksum(segment, content) != checksum:
            return None
        return torch.frombuffer(content, dtype=self._dtype).view(-1, self._width)

    def map_rows(self) -> Tensor:
        """Map all rows into memory: shape (rows, width). The workers of all ranks must have returned."""
        self.lock()
        if not self.num_bytes:
            return torch.empty(0, self._width, dtype=self._dtype)
        # Copy-on-write: torch asks for writable memory, and the file may belong to another user.
        mapped = np.memmap(self.directory / ROWS, dtype=np.uint8, mode="c")
        # A truncated file has damaged segments, which are not read.
        mapped = mapped[: len(mapped) - len(mapped) % (self._width * self._dtype.itemsize)]
        return torch.from_numpy(mapped).view(self._dtype).view(-1, self._width)

    def begin_verification(self) -> bool:
        """Return whether the file has not changed since `mark_as_verified`, so that no row must be read to verify it."""
        self._state_at_start = self._read_state()
        return self._state_at_start is not None and self._state_at_start == self._read_verified()

    def mark_as_verified(self) -> None:
        """Let later runs use the file without verifying it, if nothing has written to it since the verification began.

        The workers of all ranks must have returned.
        """
        state = self._read_state()
        if state is not None and state == self._state_at_start:
            with suppress(OSError):  # another user's
                (self.directory / VERIFIED).write_text(state, encoding="ascii")

    def _read_state(self) -> str | None:
        """Return what differs after every write to the rows: no program can set the time of the last change.

        None: there are none, or the last change is too recent to tell it from the next one.
        """
        try:
            found = (self.directory / ROWS).stat()
        except OSError:
            return None
        if time.time() - found.st_ctime < _RECENT_SECONDS:
            return None
        return f"{self._key} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}\n"

    def _read_verified(self) -> str | None:
        try:
            return (self.directory / VERIFIED).read_text(encoding="ascii")
        except (OSError, ValueError):
            return None

    def _complete(self, segment: int, compute: Callable[[int], Tensor], *, verify: bool) -> bool:
        """Compute and write a segment unless it is finished; return False if another process has its lock."""
        if not verify and read_mark(self.directory, segment):
            return True
        if self.read_segment(segment) is not None:
            return True
        lock = try_lock(mark_path(self.directory, segment))
        if lock is None:
            return False
        try:
            # The previous holder of the lock may have finished the segment.
            if self.read_segment(segment) is None:
                lock.sign()
                checksum = self._write(segment, compute(segment))
                os.ftruncate(lock.handle, 0)
                os.pwrite(lock.handle, checksum.encode(), 0)
                os.fsync(lock.handle)
            return True
        finally:
            lock.close()

    def _write(self, segment: int, rows: Tensor) -> str:
        """Write a segment through to the disk; return its checksum."""
        content = rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        begin = self._offset(segment)
        assert begin + len(content) == self._offset(segment + 1)
        handle = os.open(self.directory / ROWS, os.O_WRONLY | os.O_DSYNC)
        try:
            written = 0
            while written < len(content):
                # Not through a mapping: on a full disk pwrite raises, whereas a mapping kills the process (SIGBUS).
                written += os.pwrite(handle, memoryview(content)[written:], begin + written)
        finally:
            os.close(handle)
        return self._checksum(segment, content)

    def _checksum(self, segment: int, content: bytes | bytearray) -> str:
        digest = hashlib.sha256(f"{self._key} {segment} ".encode())
        digest.update(content)
        return digest.hexdigest()

    def _offset(self, segment: int) -> int:
        return self._bounds_S[segment] * self._width * self._dtype.itemsize


def _reserve(handle: int, num_bytes: int) -> None:
    """Extend a file to `num_bytes`, reserving the space if the system supports that."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(handle, 0, num_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:  # some network file systems
                raise
    os.ftruncate(handle, num_bytes)
