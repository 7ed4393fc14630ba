"""events.jsonl: the events of a run, one JSON object per line, for scripts and plots."""

import errno
import json
import os
from datetime import datetime, timezone
from pathlib import Path

from agnews_dist.errors import UserError
from agnews_dist.events import Event, Progress, Scores
from agnews_dist.storage.atomic import to_json_value


class EventLog:
    """Sink that appends events to a file.

    Each line is `{"event": <class name>, "time": <ISO 8601, UTC>, ...fields}`. NaN and infinities become null, so that every
    JSON parser can read the file. `Progress` is not written. A killed run keeps every event that it emitted. Lines that
    cannot be written are kept in memory and written before the next one.
    """

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        """Open `path` for appending. `keep_bytes`: drop everything after this many bytes first."""
        self._pending: list[bytes] = []
        self._error_number = 0
        self.path = path
        """Path for messages. The directory may have been renamed since."""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            content = os.pread(self._file, os.fstat(self._file).st_size, 0)[:keep_bytes]
            # A kill may leave half a line behind the last whole one.
            self._written = content.rfind(b"\n") + 1
            os.ftruncate(self._file, self._written)
        except OSError as error:
            raise UserError(
                f"cannot open {path} ({error.strerror or error}): the run could not log its steps. "
                "Make its directory writable, or choose another with --run.dir."
            ) from error
        self._is_open = True

    def __call__(self, event: Event) -> None:
        """Write one event, or raise OSError. The next call tries again."""
        if isinstance(event, Progress) or not self._is_open:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"event": type(event).__name__, "time": now, **_list_fields(event)}, allow_nan=False) + "\n"
        self._pending.append(line.encode())
        while self._pending:
            try:
                written = os.pwrite(self._file, self._pending[0], self._written)
                if written < len(self._pending[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                # Half of the line may be written. The next try overwrites it; a resumed run cuts it off.
                self._error_number = error.errno or errno.EIO
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self._written += written
            self._pending.pop(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all lines so far, written or not."""
        return self._written + sum(map(len, self._pending))

    def sync(self, num_bytes: int) -> None:
        """Make the first `num_bytes` survive a power cut, or raise OSError if some could not be written yet."""
        if self._written < num_bytes:
            raise OSError(self._error_number, os.strerror(self._error_number), str(self.path))
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file. Further calls do nothing."""
        if self._is_open:
            self._is_open = False
            os.close(self._file)


def _list_fields(event: Event | Scores) -> dict[str, object]:
    """List an event's fields in order, with those of `scores` in place of `scores`."""
    fields: dict[str, object] = {}
    for name, value in vars(event).items():
        fields |= _list_fields(value) if isinstance(value, Scores) else {name: to_json_value(value)}
    return fields
