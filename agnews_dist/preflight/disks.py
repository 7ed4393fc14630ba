"""Check that a run can use its directories: write, fsync, rename, map, lock and remove a real file in each."""

import errno
import fcntl
import mmap
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from agnews_dist.preflight.findings import Finding
from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.directories import free_disk_bytes

PROBE_BYTES = 1 << 20
SHARED_SECONDS = 5.0
"""Wait for a file written on another node: network file systems may show it some seconds later."""


def probe_directory(name: str, directory: Path, needed_bytes: int, *, optional_bytes: int = 0) -> Finding:
    """Check that `directory` takes what the run writes there. Leaves nothing behind.

    `optional_bytes`: written in addition to `needed_bytes` if there is space.
    """
    check, num_bytes = f"disk: {name}", needed_bytes + optional_bytes
    try:
        has_locks = _write_and_read(find_existing(directory))
    except OSError as error:
        return _explain_failure(check, directory, error)
    free = free_disk_bytes(directory)
    found = f"{directory}: {gigabytes(free)} free, the run writes about {gigabytes(num_bytes)}"
    if free < num_bytes:
        verdict = "fail" if free < needed_bytes else "warn"
        return Finding(check, verdict, found, "Free some space, or choose another directory")
    if not has_locks:
        return Finding(check, "warn", f"{found}; it has no file locks, so features are not kept there", "Mount it with locks")
    return Finding(check, "ok", found)


def find_existing(directory: Path) -> Path:
    """Return `directory`, or the nearest parent that exists: the run would create `directory` there."""
    return next(path for path in (directory, *directory.parents) if os.path.lexists(path))


def _write_and_read(directory: Path) -> bool:
    """Do everything that a run does with its files; return whether files can be locked. Raises OSError."""
    has_locks = True
    content = os.urandom(PROBE_BYTES)
    partial, complete = (directory / f".doctor-{uuid.uuid4().hex}" for _ in range(2))
    try:
        with partial.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                has_locks = False
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(complete)
        with complete.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            if mapped[:] != content:
                raise OSError(errno.EIO, "corrupt: a file reads back differently", str(complete))
        return has_locks
    finally:
        partial.unlink(missing_ok=True)
        complete.unlink(missing_ok=True)


def _explain_failure(check: str, directory: Path, error: OSError) -> Finding:
    why, remedy = error.strerror or str(error), "Choose a directory that this user may write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, remedy = f"full: {why}", "Free some space there, or choose another directory"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        why = f"not writable: {why}"
    return Finding(check, "fail", f"{directory} is {why}", remedy)


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
