"""Can the run leave here what it has to leave? A file written, fsynced, renamed, mapped, locked and removed again, for real."""

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
from agnews_dist.storage.capacity import free_disk_bytes, gigabytes

PROBE_BYTES = 1 << 20
SLOW_SECONDS = 2.0
"""For one such file; a checkpoint's is hundreds of times as large."""
SHARED_SECONDS = 5.0
"""Network file systems may hide a new file from other nodes for some seconds."""


def probe(what: str, directory: Path, needed_bytes: int, *, better: int = 0) -> Finding:
    """Whether `directory` can take what the run writes there, about `needed_bytes`; leaves nothing behind but the directory.

    `better`: what it writes besides if there is room for it.
    """
    check, start = f"disk: {what}", time.perf_counter()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_and_read(directory)
    except OSError as error:
        refusal = _refusal(check, directory, error)
        is_optional = not needed_bytes and directory.is_dir()
        return replace(refusal, verdict="warn") if is_optional else refusal
    seconds, free = time.perf_counter() - start, free_disk_bytes(directory)
    found = f"{directory}: {gigabytes(free)} free, the run writes about {gigabytes(needed_bytes + better)}"
    if free < needed_bytes + better:
        remedy = "Free some space, or choose another directory"
        return Finding(check=check, verdict="fail" if free < needed_bytes else "warn", found=found, remedy=remedy)
    if seconds > SLOW_SECONDS:
        remedy = "Checkpoints are written beside training, but evaluate and export wait: choose a faster file system"
        return Finding(check=check, verdict="warn", found=f"{found}; 1 MiB took {seconds:.1f} s", remedy=remedy)
    return Finding(check=check, verdict="ok", found=found)


def missing_parents(directory: Path) -> list[Path]:
    """What making `directory` would make, innermost first; noted before the first probe."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def remove_empty(directories: Sequence[Path]) -> None:
    """Remove those of them that are still empty, in this order; when no rank writes there any more."""
    for path in directories:
        with suppress(OSError):  # somebody else's file in it meanwhile
            path.rmdir()


def _write_and_read(directory: Path) -> None:
    """All that a run does with its files there.

    Raises:
        OSError: some of it cannot be done; `strerror` says which where the system does not.
    """
    content = os.urandom(PROBE_BYTES)
    begun, whole = (directory / f".doctor-{uuid.uuid4().hex}" for _ in range(2))
    try:
        with begun.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(error.errno, f"no file locks: {error.strerror}", str(begun)) from error
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        begun.rename(whole)
        with whole.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            if mapped[:] != content:
                raise OSError(errno.EIO, "what was written is not what is read", str(whole))
    finally:
        begun.unlink(missing_ok=True)
        whole.unlink(missing_ok=True)


def _refusal(check: str, directory: Path, error: OSError) -> Finding:
    why, remedy = error.strerror or str(error), "Choose a directory that this user may write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, remedy = f"full: {why}", "Free some space there, or choose another directory"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        why = f"not writable: {why}"
    return Finding(check=check, verdict="fail", found=f"{directory} is {why}", remedy=remedy)


def leave_mark(directory: Path, name: str) -> bool:
    """Leave a file for other ranks to find; whether that went well."""
    try:
        (directory / name).touch()
    except OSError:
        return False
    return True


def find_mark(directory: Path, name: str) -> bool:
    """Whether another rank's file is seen from here."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with suppress(OSError):
            # Listing the directory makes NFS ask the server.
            if name in os.listdir(directory):  # noqa: PTH208 (a mark in a directory of thousands of runs)
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def remove_mark(directory: Path, name: str) -> None:
    """Take the file away again."""
    with suppress(OSError):
        (directory / name).unlink()
