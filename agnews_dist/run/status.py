"""status.json: the state of a run, for the scripts that decide whether to start it again.

Exit codes are no use for that: torchrun turns each of them into 1. If the file says `running` but no process runs, the run
was killed, which counts as failed.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

import psutil

from agnews_dist.distributed.slurm import find_array_task
from agnews_dist.errors import UserError
from agnews_dist.report.result_files import write_json

FILE = "status.json"
PLAN = "plan.json"
"""First file of a sweep. Its directory holds the status of every process group that works in it."""
State = Literal["running", "finished", "preempted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """The content of status.json."""

    state: State
    attempt: int
    """Starts of this run so far, from 1."""
    step: int
    """Optimiser steps that a new start would not repeat: those of the newest checkpoint, or of the whole finished run."""
    reason: str
    """The cause of the state, for people."""
    job: str | None
    """Name that all starts of one job share (see `identify_job`; of a sweep `identify_array`)."""
    host: str
    pid: int
    time: str
    """ISO 8601, UTC."""


def is_sweep(directory: Path) -> bool:
    """Return whether a directory is that of a sweep."""
    return (directory / PLAN).is_file()


def status_file(directory: Path, environ: Mapping[str, str]) -> str:
    """Return the name of this job's status file: the tasks of an array share a sweep, and each has its own."""
    position = find_array_task(environ)[0] if is_sweep(directory) else 0
    return FILE if position == 0 else f"status-{position}.json"


def lock_name(file: str) -> str:
    """Return the name of the file that a sweep's process locks while it lives."""
    return f".{file}.lock"


def read_status(directory: Path, file: str = FILE) -> Status | None:
    """Read the status of the run in `directory`; None: it has no readable one."""
    try:
        content = json.loads((directory / file).read_bytes())
        return Status(**cast("dict[str, Any]", content))
    except (OSError, ValueError, TypeError):
        return None


def runs_of_job(runs: Path, job: str | None, *, sweeps: bool = False) -> list[str]:
    """Return the names of the runs below `runs` that `job` left unfinished, newest first. `sweeps`: of sweeps instead."""
    found: list[tuple[str, str]] = []
    for path in runs.glob(f"*/{FILE}") if job is not None else ():
        status = read_status(path.parent)
        is_own = status is not None and status.job == job and status.state != "finished"
        if status is not None and is_own and is_sweep(path.parent) == sweeps:
            found.append((status.time, path.parent.name))
    return [name for _, name in sorted(found, reverse=True)]


def has_process(status: Status) -> bool:
    """Return whether the process of a run is on this host: a directory that was moved has its lock elsewhere."""
    return status.host == socket.gethostname() and psutil.pid_exists(status.pid)


class StatusFile:
    """Writer of this run's status. Only rank 0 has one."""

    def __init__(self, locate: Callable[[], Path], *, attempt: int, step: int, job: str | None, file: str = FILE) -> None:
        """`locate` returns where the run's directory is now."""
        self._locate, self.attempt, self.step, self._job, self._file = locate, attempt, step, job, file

    def write(self, state: State, reason: str) -> None:
        """Replace the file, whole or not at all."""
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
        write_json(self._locate() / self._file, asdict(status))

    def try_to_write(self, state: State, reason: str) -> None:
        """Write, ignoring errors: then the old file stays, and its stale state `running` counts as failed."""
        with suppress(UserError):
            self.write(state, reason)
