"""Check that a run can use its directories: write, fsync, rename, map, lock and remove a real file in each."""

import errno
import fcntl
import mmap
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from agnews_dist.preflight.findings import Finding
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.directories import free_disk_bytes

PROBE_BYTES = 1 << 20
SLOW_SECONDS = 2.0
"""Limit for one file of PROBE_BYTES. A checkpoint is hundreds of times larger."""
SHARED_SECONDS = 5.0
"""Wait for a file written on another node: network file systems may show it some seconds later."""


def probe_directory(name: str, directory: Path, needed_bytes: int, *, optional_bytes: int = 0) -> Finding:
    """Check that `directory` takes what the run writes there. Leaves nothing behind but the directory.

    `optional_bytes`: written in addition to `needed_bytes` if there is space.
    """
    check, start = f"disk: {name}", time.perf_counter()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_and_read(directory)
    except OSError as error:
        failure = _explain_failure(check, directory, error)
        is_optional = not needed_bytes and directory.is_dir()
        return replace(failure, verdict="warn") if is_optional else failure
    seconds, free = time.perf_counter() - start, free_disk_bytes(directory)
    found = f"{directory}: {gigabytes(free)} free, the run writes about {gigabytes(needed_bytes + optional_bytes)}"
    if free < needed_bytes + optional_bytes:
        remedy = "Free some space, or choose another directory"
        return Finding(check=check, verdict="fail" if free < needed_bytes else "warn", found=found, remedy=remedy)
    if seconds > SLOW_SECONDS:
        remedy = "Choose a faster file system: export and evaluation wait for the disk, checkpoints do not"
        return Finding(check=check, verdict="warn", found=f"{found}; 1 MiB took {seconds:.1f} s", remedy=remedy)
    return Finding(check=check, verdict="ok", found=found)


def list_missing_parents(directory: Path) -> list[Path]:
    """Return the directories that creating `directory` would create, innermost first. Call it before the first probe."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def remove_empty(directories: Sequence[Path]) -> None:
    """Remove the directories that are still empty, in this order. Call it when no rank writes there any more."""
    for path in directories:
        with suppress(OSError):  # another process has written into it
            path.rmdir()


def _write_and_read(directory: Path) -> None:
    """Do everything that a run does with its files.

    Raises:
        OSError: a step failed; `strerror` names the step if the system's message does not.
    """
    content = os.urandom(PROBE_BYTES)
    partial, complete = (directory / f".doctor-{uuid.uuid4().hex}" for _ in range(2))
    try:
        with partial.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(error.errno, f"without file locks: {error.strerror}", str(partial)) from error
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(complete)
        with complete.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            if mapped[:] != content:
                raise OSError(errno.EIO, "corrupt: a file reads back differently", str(complete))
    finally:
        partial.unlink(missing_ok=True)
        complete.unlink(missing_ok=True)


def _explain_failure(check: str, directory: Path, error: OSError) -> Finding:
    why, remedy = error.strerror or str(error), "Choose a directory that this user may write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, remedy = f"full: {why}", "Free some space there, or choose another directory"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        why = f"not writable: {why}"
    return Finding(check=check, verdict="fail", found=f"{directory} is {why}", remedy=remedy)


def wait_for_file(path: Path) -> bool:
    """Wait up to SHARED_SECONDS for another rank's file. Returns whether it appeared."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with suppress(OSError):
            # Listing the directory makes an NFS client ask the server; looking up one name may use its cache.
            if path.name in os.listdir(path.parent):  # noqa: PTH208
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
