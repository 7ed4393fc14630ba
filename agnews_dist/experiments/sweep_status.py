"""status.json of a sweep: what its job, or this task of its job array, has come to. See run/status.py.

`agnews-dist restarts` and `runs` read it. Every task has a file of its own, so that a task that is stopped or killed is started
again by itself. The steps are those of all members that have ended, whichever task has trained them.
"""

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from agnews_dist.distributed.slurm import find_array_task, identify_array, is_restarted
from agnews_dist.errors import Stopped
from agnews_dist.experiments.sweep_directory import SweepDirectory
from agnews_dist.run.status import State, StatusFile, lock_name, read_status, status_file
from agnews_dist.storage.locks import try_lock


def is_own_sweep(path: Path) -> bool:
    """Return whether an earlier start of this job, or another task of its array, has begun the sweep in `path`."""
    job, is_later = identify_array(os.environ), is_restarted(os.environ) or find_array_task(os.environ)[1] > 1
    found = [read_status(path, file.name) for file in path.glob("status*.json")] if is_later and job else []
    return any(status is not None and status.job == job for status in found)


class SweepStatus:
    """Writer of the status, on rank 0: a context around the work, which the first `begin` starts."""

    def __init__(self, directory: SweepDirectory, most_at_once: int) -> None:
        """Read the former status. `directory` exists. `most_at_once`: members that train together at most."""
        path, file = directory.path, status_file(directory.path, os.environ)
        former = read_status(path, file)
        self._most_at_once = most_at_once
        self._directory, self._lock_path = directory, path / lock_name(file)
        self._file = StatusFile(
            lambda: path, attempt=former.attempt if former else 0, step=0, job=identify_array(os.environ), file=file
        )
        self._pace_path = self._lock_path.with_suffix(".pace")
        self._has_begun, self._num_ended = False, len(directory.read_results())
        self.pace = most_at_once
        """Members that may train at once: a quarter of the last start's if that one left no result, else twice as many."""
        with suppress(OSError, ValueError):
            num_ended, pace = map(int, self._pace_path.read_text().split())
            self.pace = max(1, pace // 4) if num_ended == self._num_ended else min(most_at_once, 2 * pace)

    def begin(self) -> None:
        """Record that the sweep runs: model and features are there."""
        if not self._has_begun:
            self._has_begun = True
            self._file.attempt += 1
            self.end("running", "it began")
            self._directory.commit()
            with suppress(OSError):
                self._pace_path.write_text(f"{self._num_ended} {self.pace}\n")

    def end(self, state: State, reason: str) -> None:
        """Record a state. Errors are ignored: the members' results count."""
        self._file.step = sum(result.num_steps for result in self._directory.read_results())
        self._file.try_to_write(state, reason)

    def end_early(self, state: State, reason: str) -> None:
        """Record that the process is about to be ended. A failure before the beginning leaves the status as it is."""
        if state != "failed" or self._has_begun:
            self.end(state, reason)

    def __enter__(self) -> "SweepStatus":
        self._lock = None
        with suppress(OSError):  # it only shows others that the process lives
            self._lock = try_lock(self._lock_path)
        if self._lock is None:  # another job works on the sweep: it was not stopped
            self.pace = self._most_at_once
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.end("finished", "all members have ended")
        elif isinstance(error, Stopped):
            self.end_early("preempted", str(error))
        else:
            self.end_early("failed", str(error).split("\n")[0] or type(error).__name__)
        if self._lock is not None:
            self._lock.close()
