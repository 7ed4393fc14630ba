"""A run's directory: its name is checked and locked before any work, so that no result is lost or overwritten."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from agnews_dist.errors import UserError
from agnews_dist.run.status import is_sweep
from agnews_dist.storage import atomic
from agnews_dist.storage.holders import StuckHolder
from agnews_dist.storage.locks import (
    Lock,
    LockWait,
    Say,
    describe_holder,
    find_open_path,
    is_locked,
    is_open_at,
    try_lock,
    wait_for_lock,
)

CONFIG_FILE = "config.yaml"
"""The first file of a run. A directory without it is not a run's, and is never deleted."""
LOCK_SECONDS = 22.0
"""Time to wait for another process's lock: that process may be an earlier start of the same job, about to end.

On a file system without locks this is long enough to notice that the process is gone.
"""


def new_names(model_name: str, now: datetime) -> Iterator[str]:
    """Yield names made from model and time: `gpt2-20260131-235959`, and for more starts in one second `...-2`, `...-3`."""
    first = f"{Path(model_name).name or 'run'}-{now:%Y%m%d-%H%M%S}"
    yield first
    for number in count(2):
        yield f"{first}-{number}"


def is_in_use(runs: Path, name: str) -> bool:
    """Return whether a process has the name of a run."""
    return is_locked(_lock_path(runs, name))


def _lock_path(runs: Path, name: str) -> Path:
    return runs / f".{name}.lock"


class RunDirectory:
    """The directory of one run: `lock()`, for a new run `create()`, then `commit()`, at the end `close()`.

    Before `commit()` a new run writes to a hidden staging directory, and a resumed run writes nothing. If the run is
    refused or killed before that, its name stays free, and the results that it was to replace are kept.
    """

    def __init__(self, runs: Path, name: str, *, overwrite: bool, config_yaml: str) -> None:
        """Touch nothing on disk yet. `overwrite`: existing results under this name may be lost."""
        self.directory = runs / name
        self.staging = runs / f".{name}.starting"
        """Hidden directory in which a new run writes until `commit()` renames it. Files opened there stay valid."""
        self._replaced = runs / f".{name}.replaced"
        self.overwrite, self._config_yaml = overwrite, config_yaml
        self.path = self.directory
        """The directory that holds the run's files, as far as is known (see `locate`)."""
        self._handle: int | None = None
        """The open directory: it shows a move or a removal."""
        self._notice: str | None = None
        self._lock: Lock | None = None
        self._lock_path = _lock_path(runs, name)

    def lock(self, timeout_seconds: float = LOCK_SECONDS, say: Say = lambda _: None) -> None:
        """Lock the name until this process ends. Wait at most `timeout_seconds` for another process's lock.

        Raises:
            UserError: another process keeps the lock, or the directory cannot be written.
        """
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            wait = LockWait(self._lock_path, f"run {self.directory}", say)
            self._lock = wait_for_lock(self._lock_path, wait, timeout_seconds)
            if self._lock is None:
                raise UserError(
                    f"{self.directory} is being written by another process: {describe_holder(self._lock_path).name}. Wait for "
                    "its end, or choose another --run.name."
                )
        except StuckHolder as stuck:
            raise UserError(
                f"{self.directory} is being written by another process: {stuck.strerror}. Let it continue, end it, or "
                "choose another --run.name."
            ) from stuck
        except OSError as error:
            raise self._unwritable(error) from error

    def refuse_sweep(self) -> None:
        """Raise UserError if the name is that of a sweep, whose processes have other locks."""
        if is_sweep(self.directory):
            raise UserError(f"{self.directory}: it is a sweep, and not a run. Choose another --run.name.")

    def reserve(self) -> bool:
        """Lock a new name and create its staging directory, both without waiting; return False if the name is taken.

        Creating the directory is atomic also among hosts that do not see each other's locks.

        Raises:
            UserError: the directory cannot be written.
        """
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._lock = try_lock(self._lock_path)
            if self._lock is None:
                return False
            self._lock.sign()
            if not self.directory.exists() and not self._replaced.exists():
                with suppress(FileExistsError):
                    self.staging.mkdir()
                    self.path = self.staging
                    return True
        except OSError as error:
            raise self._unwritable(error) from error
        self.close()
        return False

    def create(self) -> None:
        """Create the staging directory, unless `reserve` has done so, and write the resolved config to it.

        Raises:
            UserError: the run exists and may not be overwritten, the directory is not a run's, or it cannot be written.
        """
        try:
            if self._replaced.exists() and not self.directory.exists():
                # An earlier start was killed in the middle of `commit()`.
                self._replaced.rename(self.directory)
            if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
                self._check_replaceable()
            if self.path != self.staging:
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir(parents=True)
                self.path = self.staging
            # Only a write shows that writing works: permission bits say nothing of root, read-only mounts and quotas.
            (self.staging / CONFIG_FILE).write_text(self._config_yaml, encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"run.dir {self.directory.parent}: {self.directory} cannot be written ({error.strerror or error}). Set --run.dir "
            "to a writable directory."
        )

    def _check_replaceable(self) -> None:
        if not self.overwrite:
            raise UserError(
                f"{self.directory} exists: its results would be lost. Choose another --run.name, pass --run.overwrite, or "
                "continue it with --checkpoint.resume auto."
            )
        if not (self.directory / CONFIG_FILE).is_file():
            raise UserError(
                f"{self.directory} holds no {CONFIG_FILE}: run.overwrite deletes only directories of runs. Choose another "
                "--run.name, or remove it yourself."
            )

    def commit(self) -> None:
        """Name the directory of a new run, and delete the run that it replaces. For a resumed run, write the config."""
        if self.path == self.directory:
            atomic.write_text(self.directory / CONFIG_FILE, [self._config_yaml])
        else:
            # One may have begun since `create`.
            self.refuse_sweep()
            shutil.rmtree(self._replaced, ignore_errors=True)
            atomic.replace(self.staging, self.directory, aside=self._replaced)
            self.path = self.directory

        with suppress(OSError):  # without it, moves are not noticed
            self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    @property
    def is_in_place(self) -> bool:
        """False if the directory was moved, removed or replaced since `commit()`. Any thread may ask."""
        return self._handle is None or is_open_at(self._handle, self.path)

    def locate(self) -> Path:
        """Return where the run's files are now: the run follows a directory that is moved. Any thread may call this.

        Raises:
            UserError: the directory was removed.
        """
        if self._handle is not None and not self.is_in_place:
            found = find_open_path(self._handle)
            if found is None:
                raise UserError(
                    f"run {self.path}: its directory was removed while the run writes there, so its results would be lost. "
                    "Start it again."
                )
            self._notice = f"run {self.path}: its directory was moved to {found}, and the run continues there."
            self.path = found
        return self.path

    def take_notice(self) -> str | None:
        """Return a message about a move that `locate` found, once."""
        notice, self._notice = self._notice, None
        return notice

    def close(self) -> None:
        """Release the name; a run that has not begun leaves nothing."""
        if self.path == self.staging:
            shutil.rmtree(self.staging, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._lock is not None:
            # A waiting process notices that the file is gone, and creates a new one.
            (find_open_path(self._lock.handle) or self._lock_path).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def check_output(directory: Path, *, overwrite: bool, file: str = "result.json") -> None:
    """Check that a command can write its scores to `directory`, before they are computed. `file`: their name.

    Raises:
        UserError: it cannot be written, is a training run's, or holds other scores and `overwrite` is not set.
    """
    if (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"--output {directory}: this is a run's directory, whose files would be replaced. Set --output to another "
            "directory."
        )
    if (directory / file).exists() and not overwrite:
        raise UserError(
            f"--output {directory}: holds a {file} of other scores. Set --output to another directory, or pass --run.overwrite."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Only a write shows that writing works.
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(
            f"--output {directory}: cannot be written ({error.strerror or error}). Set it to a writable directory."
        ) from error
