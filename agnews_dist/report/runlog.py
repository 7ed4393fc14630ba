"""events.jsonl: everything a run said, one JSON object per line, for scripts and plots."""

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from agnews_dist.errors import UserError
from agnews_dist.events import Event, Progress
from agnews_dist.report.files import plain


class RunLog:
    """Sink that appends events to a file.

    Each line is `{"event": <class name>, "time": <ISO 8601, UTC>, ...fields}`. NaN and infinities are written as null,
    so that every JSON parser reads the file. `Progress` is left out: it is of interest only while it happens. The file
    is line-buffered: a killed run keeps every event it emitted.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, so that a resumed run continues its log.

        Raises:
            UserError: the file cannot be opened for writing.
        """
        try:
            if path.exists():
                _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8", newline="\n", buffering=1)
        except OSError as error:
            raise UserError(
                f"cannot open {path} ({error.strerror or error}): the run would leave no record of its steps. "
                "Make its directory writable, or choose another with --run.dir."
            ) from error

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, Progress):
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        # Not asdict(), which copies deeply: a mapping that cannot be copied would fail for nothing.
        fields = {field.name: plain(getattr(event, field.name)) for field in dataclasses.fields(event)}
        self._file.write(json.dumps({"event": type(event).__name__, "time": now, **fields}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without newline, which a process killed while writing left: new events must not join it."""
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


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
