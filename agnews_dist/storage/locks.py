"""Locks on files: the kernel releases them when the handle is closed or its process ends.

`try_lock`, `wait_for_lock`, `locked` and `lock_shared` raise OSError if the file cannot be opened or locked.
"""

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

POLL_INTERVAL_SECONDS = 0.1


def is_open_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def try_lock(path: Path, *, create: bool = True) -> int | None:
    """Lock a file exclusively without waiting; return its handle, or None if another process holds a lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_open_at(handle, path):
            return handle
    except BlockingIOError:
        pass
    except BaseException:
        os.close(handle)
        raise
    # Locked, or removed by its former owner after we opened it.
    os.close(handle)
    return None


def wait_for_lock(path: Path, timeout_seconds: float = float("inf")) -> int | None:
    """Lock a file exclusively, waiting for other processes; return its handle, or None after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while (handle := try_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_SECONDS)
    return handle


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold an exclusive lock on a file in a `with` block, waiting for other processes."""
    handle = wait_for_lock(path)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def lock_shared(path: Path) -> int:
    """Create a file if needed, set its time to now and lock it shared, waiting for exclusive locks; return its handle."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch()
        except FileNotFoundError:
            continue  # the directory was removed since the line before
        except OSError:
            if not path.exists():  # another user's file, or a read-only disk, is good enough for reading
                raise
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if is_open_at(handle, path):
            return handle
        os.close(handle)  # removed while we waited


def is_locked(path: Path) -> bool:
    """Return whether any process holds a lock on a file, or its file system has no locks; False if it cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
