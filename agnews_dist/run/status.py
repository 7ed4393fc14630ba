"""status.json: how a run stands, for the scripts that decide whether to start it again.

torchrun turns every exit code into 1, so codes cannot tell. A file that says `running` when nothing runs any more means that
the run was killed: failed.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

from agnews_dist.errors import UserError
from agnews_dist.report.result_files import write_json

FILE = "status.json"
State = Literal["running", "finished", "preempted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What status.json holds."""

    state: State
    attempt: int
    """Starts of this run so far, from 1."""
    step: int
    """Optimiser steps that a new start would not repeat: those of the newest checkpoint, or of the whole finished run."""
    reason: str
    """Why it is in this state, in words."""
    job: str | None
    """What starts of one job have in common (see `identify_job`)."""
    host: str
    pid: int
    time: str
    """ISO 8601, UTC."""


def read_status(directory: Path) -> Status | None:
    """The status of the run in `directory`; None if it has none that can be read."""
    try:
        content = json.loads((directory / FILE).read_bytes())
        return Status(**cast("dict[str, Any]", content))
    except (OSError, ValueError, TypeError):
        return None


def run_of_job(runs: Path, job: str | None) -> str | None:
    """The name of the newest run below `runs` that `job` left unfinished."""
    found: list[tuple[str, str]] = []
    for path in runs.glob(f"*/{FILE}") if job is not None else ():
        status = read_status(path.parent)
        if status is not None and status.job == job and status.state != "finished":
            found.append((status.time, path.parent.name))
    return max(found)[1] if found else None


class StatusFile:
    """The status of the run of this process; only rank 0 has one."""

    def __init__(self, directory: Path, *, attempt: int, step: int, job: str | None) -> None:
        """`directory`: that of the run, which may be renamed: set it anew."""
        self.directory, self.attempt, self.step, self._job = directory, attempt, step, job

    def write(self, state: State, reason: str) -> None:
        """Replace the file, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        status = Status(
            state=state,
            attempt=self.attempt,
            step=self.step,
            reason=reason,
            job=self._job,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        )
        write_json(self.directory / FILE, asdict(status))

    def try_to_write(self, state: State, reason: str) -> None:
        """As `write`; where that fails the old file stays, and its state, now stale, means the same as failed."""
        try:
            self.write(state, reason)
        except UserError:
            return
