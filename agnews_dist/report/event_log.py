"""events.jsonl: everything a run said, one JSON object per line, for scripts and plots."""

import dataclasses
import errno
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from agnews_dist.errors import UserError
from agnews_dist.events import Event, Progress
from agnews_dist.storage.atomic import plain


class EventLog:
    """Sink that appends events to a file.

    Each line is `{"event": <class name>, "time": <ISO 8601, UTC>, ...fields}`. NaN and infinities are written as null,
    so that every JSON parser reads the file. `Progress` is left out: it is of interest only while it happens. A killed run
    keeps every event it emitted. Lines that cannot be written wait, and go before the next one.
    """

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        """Open `path` for appending, so that a resumed run continues its log; `keep_bytes`: cut off what is behind them.

        Raises:
            UserError: the file cannot be opened for writing.
        """
        self._pending: list[bytes] = []
        self._refused = 0
        self.path = path
        """As messages name it; the directory may have been renamed since."""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._written = _whole_lines(self._file, keep_bytes)
            os.ftruncate(self._file, self._written)
        except OSError as error:
            raise UserError(
                f"cannot open {path} ({error.strerror or error}): the run would leave no record of its steps. "
                "Make its directory writable, or choose another with --run.dir."
            ) from error
        self._is_open = True

    def __call__(self, event: Event) -> None:
        """Write one event.

        Raises:
            OSError: it cannot be written now; it is kept for the next call.
        """
        if isinstance(event, Progress) or not self._is_open:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        # Not asdict(), which copies deeply: a mapping that cannot be copied would fail for nothing.
        fields = {field.name: plain(getattr(event, field.name)) for field in dataclasses.fields(event)}
        line = json.dumps({"event": type(event).__name__, "time": now, **fields}, allow_nan=False) + "\n"
        self._pending.append(line.encode())
        self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:
            try:
                written = os.pwrite(self._file, self._pending[0], self._written)
                if written < len(self._pending[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                # Half of the line may be there: it goes first, to the same place, or is cut off by who continues the log.
                self._refused = error.errno or errno.EIO
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self._written += written
            self._pending.pop(0)

    @property
    def num_bytes(self) -> int:
        """Of all lines so far, those that wait included."""
        return self._written + sum(map(len, self._pending))

    def sync(self, num_bytes: int) -> None:
        """Have the first `num_bytes` survive a power cut.

        Raises:
            OSError: some of their lines could not be written yet.
        """
        if self._written < num_bytes:
            raise OSError(self._refused, os.strerror(self._refused), str(self.path))
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        if self._is_open:
            self._is_open = False
            os.close(self._file)

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole_lines(file: int, limit: int | None) -> int:
    """Bytes up to the end of the last whole line, at most `limit`: a process killed while writing leaves half a line, which
    new events must not join."""
    content = os.pread(file, os.fstat(file).st_size, 0)[:limit]
    return content.rfind(b"\n") + 1


def read_run_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run log, oldest first; tuples come back as lists, non-finite numbers as None.

    A torn last line (the run was killed while writing, or is writing now) is left out.

    Raises:
        UserError: there is no such file, or a whole line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): a run's events are in its events.jsonl. "
            "Give the path of a run's log."
        ) from error
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            event: object = json.loads(line)
        except ValueError:  # malformed JSON, or bytes that are no UTF-8
            event = None
        if not isinstance(event, dict):
            raise UserError(
                f"{path} line {number} is no JSON object, {line[:60]!r}: no run wrote it, or it was damaged since. "
                "Remove that line."
            )
        events.append(event)
    return events
