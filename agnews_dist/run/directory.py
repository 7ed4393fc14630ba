"""The run's directory: named, checked and claimed before any work, so that no result is lost or overwritten by accident."""

import os
import shutil
import socket
import tempfile
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

from agnews_dist.errors import UserError
from agnews_dist.storage import atomic
from agnews_dist.storage.locks import try_lock

# What a run writes first; its presence tells a run's directory from anything else that must not be deleted.
MARK = "config.yaml"
LOCK_SECONDS = 10.0
"""How long a claim waits for another process to let go of the name: one of the same job that is being killed."""


def run_name(name: str | None, model_name: str, now: datetime) -> str:
    """`name`, or one made from the model and the time: `gpt2-20260131-235959`.

    Raises:
        UserError: the name would leave the directory of runs.
    """
    if name is None:
        return f"{Path(model_name).name or 'run'}-{now:%Y%m%d-%H%M%S}"
    if not name or Path(name).name != name or name in {".", ".."}:
        raise UserError(
            f"run.name {name!r} is no plain directory name: the run would be written outside run.dir. Use letters, digits, "
            "'-', '_' and '.', and set --run.dir for the place."
        )
    return name


class RunDirectory:
    """The name of a run that has not begun: a context; `lock()`, then `take()` or `go_on()`, and `keep()` once nothing can be
    refused any more.

    Until then everything is written to a hidden directory beside it, so that a run refused for a bad row, or killed while it
    starts, neither blocks its own name nor costs the results it was to replace. A run that goes on writes nothing until then.
    """

    def __init__(self, runs: Path, name: str, *, overwrite: bool, config_yaml: str) -> None:
        """Nothing is touched before `take()`."""
        self.directory = runs / name
        self.staging = runs / f".{name}.starting"
        """Where the run writes until `keep()` renames it; files opened there stay open."""
        self._replaced = runs / f".{name}.replaced"
        self.overwrite, self._config_yaml = overwrite, config_yaml
        """Whether results under this name may be lost."""
        self._is_taken, self._goes_on = False, False
        self._lock: int | None = None
        self._lock_path = runs / f".{name}.lock"

    def lock(self, patience: float = LOCK_SECONDS) -> None:
        """Keep every other process from writing under this name, until this one ends; an owner has `patience` seconds to end.

        Raises:
            UserError: another process does so already, or nothing can be written there.
        """
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + patience
            while (handle := try_lock(self._lock_path)) is None:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.directory} is being written by another process ({self._lock_path.read_text().strip()}): two "
                        "runs would overwrite each other. Wait for its end, or choose another --run.name."
                    )
                time.sleep(0.2)
            self._lock = handle
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def path(self) -> Path:
        """Where the run's files are at this moment."""
        return self.staging if self._is_taken else self.directory

    def go_on(self) -> None:
        """The run that is there is continued; its files stay as they are until `keep()`."""
        self._goes_on = True

    def take(self) -> None:
        """Create the hidden directory with the resolved config in it.

        Raises:
            UserError: the run exists and `overwrite` is not set, its place holds no run, or nothing can be written there.
        """
        try:
            if self._replaced.exists() and not self.directory.exists():
                # A start was killed in the middle of `keep()`.
                self._replaced.rename(self.directory)
            if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
                self._check_replaceable()
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            self._is_taken = True
            # Permission bits do not tell (root, read-only mounts, quotas): only a write does.
            (self.staging / MARK).write_text(self._config_yaml, encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.directory} cannot be written ({error.strerror or error}): the run would have nowhere to leave its "
            "results. Set --run.dir to a writable directory."
        )

    def _check_replaceable(self) -> None:
        if not self.overwrite:
            raise UserError(
                f"{self.directory} exists: its results would be lost. Choose another --run.name, or pass --run.overwrite; what "
                "was stopped before its end goes on with --checkpoint.resume auto."
            )
        if not (self.directory / MARK).is_file():
            raise UserError(
                f"{self.directory} holds no {MARK}: it is not a run's directory, so run.overwrite does not delete it. Choose "
                "another --run.name, or remove it yourself."
            )

    def keep(self) -> None:
        """The run begins: its directory gets its name, and what it replaces is deleted.

        Raises:
            UserError: a run that goes on cannot be written.
        """
        if self._goes_on:
            atomic.write_text(self.directory / MARK, [self._config_yaml])
        elif self._is_taken:
            shutil.rmtree(self._replaced, ignore_errors=True)
            atomic.replace(self.staging, self.directory, aside=self._replaced)
            self._is_taken = False

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_taken:
            shutil.rmtree(self.staging, ignore_errors=True)
        if self._lock is not None:
            # Whoever waits for it sees that it is gone, and makes a new one.
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def open_output(directory: Path, *, overwrite: bool) -> None:
    """Make sure that `evaluate` can leave its scores in `directory`, before they are computed.

    Raises:
        UserError: it cannot be written, is a training run's, or holds other scores and `overwrite` is not set.
    """
    if (directory / MARK).is_file():
        raise UserError(
            f"{directory} is a run's directory: the scores would replace the result.json of its training. Set --output to "
            "another directory."
        )
    if (directory / "result.json").exists() and not overwrite:
        raise UserError(
            f"{directory} holds a result.json: other scores would be replaced. Set --output to another directory, or pass "
            "--run.overwrite."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: only a write does.
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}): the scores would be lost. Set --output to a writable "
            "directory."
        ) from error
