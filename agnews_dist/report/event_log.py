"""events.jsonl: the events of a run, one JSON object per line, for scripts and plots."""

import errno
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from agnews_dist.errors import UserError
from agnews_dist.events import Event, Progress, Scores
from agnews_dist.storage.atomic import to_json_value
from agnews_dist.storage.background import BackgroundWriter

LOG_FILE = "events.jsonl"
SILENT_SECONDS = 5.0
"""Time without an answer of the disk after which a warning is due."""
CLOSE_SECONDS = 30.0
"""Longest wait for the disk at the end."""


class EventLog:
    """Sink that appends events to a file.

    Each line is `{"event": <class name>, "time": <ISO 8601, UTC>, ...fields}`. NaN and infinities become null, so that every
    JSON parser can read the file. `Progress` is not written. A killed run keeps every event that it emitted, unless the disk
    was too slow for it. A thread writes: lines are kept in memory until they are on a full or hanging disk.
    """

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        """Open `path` for appending. `keep_bytes`: drop everything after this many bytes first."""
        self.path = path
        """Path for messages. The directory may have been renamed since."""
        try:
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            content = os.pread(self.handle, os.fstat(self.handle).st_size, 0)[:keep_bytes]
            # A kill may leave half a line behind the last whole one.
            self._kept = content.rfind(b"\n") + 1
            os.ftruncate(self.handle, self._kept)
        except OSError as error:
            raise UserError(
                f"cannot open {path} ({error.strerror or error}): the run could not log its steps. "
                "Make its directory writable, or choose another with --run.dir."
            ) from error
        self.is_in_place: Callable[[], bool] = lambda: True
        """Return False if the file's directory is not where it was. The thread calls this, since the disk may be slow."""
        self.has_moved = False
        """True from a write on at which the directory was not in its place. The caller that follows it sets it back."""
        self._writer = BackgroundWriter(self._write)
        self._is_open = True

    def __call__(self, event: Event) -> None:
        """Write one event, or raise OSError if the disk takes none now. Then it is written later."""
        if isinstance(event, Progress) or not self._is_open:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"event": type(event).__name__, "time": now, **_list_fields(event)}, allow_nan=False) + "\n"
        self._writer.put(line.encode())
        self._writer.settle()
        self._check()

    def _write(self, content: bytes) -> int:
        self.has_moved = self.has_moved or not self.is_in_place()
        # At a position of its own: after half of a failed line the next try overwrites that half.
        return os.pwrite(self.handle, content, self._kept + self._writer.num_written)

    def _check(self) -> None:
        """Raise OSError if lines wait for a disk that is full or has not answered for a while."""
        if (error := self._writer.error) is not None:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self._writer.seconds_behind > SILENT_SECONDS:
            raise OSError(errno.ETIMEDOUT, f"no answer for {SILENT_SECONDS:.0f} s", str(self.path))

    @property
    def num_bytes(self) -> int:
        """Bytes of all lines so far, written or not."""
        return self._kept + self._writer.num_bytes

    def sync(self, num_bytes: int) -> None:
        """Make the first `num_bytes` survive a power cut, however long the disk takes.

        Raises:
            OSError: some could not be written.
        """
        while self._kept + self._writer.num_written < num_bytes:
            self._writer.wait(None)
            if (error := self._writer.error) is not None:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        os.fsync(self.handle)

    def close(self) -> None:
        """Write what is left, waiting for the disk for a bounded time, and close the file. Further calls do nothing."""
        if self._is_open:
            self._is_open = False
            # A thread that still waits for the disk keeps the file.
            if self._writer.close(CLOSE_SECONDS):
                os.close(self.handle)


def _list_fields(event: Event | Scores) -> dict[str, object]:
    """List an event's fields in order, with those of `scores` in place of `scores`."""
    fields: dict[str, object] = {}
    for name, value in vars(event).items():
        fields |= _list_fields(value) if isinstance(value, Scores) else {name: to_json_value(value)}
    return fields
