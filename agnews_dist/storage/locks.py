"""Locks on files: the kernel releases them when the handle is closed or its process ends.

A file system without locks gets a second file that exists while the lock is held. Who waits for a lock watches its holder
(see holders.py), so that a process that is suspended or gone is not waited for. All functions raise OSError if the file
cannot be opened or locked.
"""

import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from agnews_dist.storage.holders import Holder, StuckHolder, find_holder

POLL_SECONDS = 0.1
SPEAK_SECONDS = 5.0
"""Time of waiting after which a line names the holder."""
REPEAT_SECONDS = 30.0
"""Time between later lines."""
STALE_SECONDS = 15.0
"""Time without a heartbeat after which a holder counts as gone or suspended."""
BEAT_SECONDS = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_HELD = ".held"
Say = Callable[[str], None]


class Lock:
    """An exclusive lock that this process holds until `close` or its end."""

    def __init__(self, handle: int, path: Path) -> None:
        """`path`: the locked file; one that ends in `.held` is removed by `close`."""
        self.handle, self._path = handle, path

    def sign(self) -> None:
        """Write this process into the file, and show processes that wait a heartbeat: its modification time."""
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _Heartbeat.add(self.handle)

    def close(self) -> None:
        _Heartbeat.remove(self.handle)
        if self._path.name.endswith(_HELD) and is_open_at(self.handle, self._path):
            self._path.unlink(missing_ok=True)
        os.close(self.handle)


class _Heartbeat:
    """The thread that sets the modification time of all signed lock files of this process to now."""

    _guard = threading.Lock()
    _handles: ClassVar[set[int]] = set()
    _process = 0

    @classmethod
    def add(cls, handle: int) -> None:
        """Begin with a file."""
        with cls._guard:
            cls._handles.add(handle)
            if cls._process != os.getpid():  # the first file, or after a fork, which copies no thread
                cls._process = os.getpid()
                threading.Thread(target=cls._run, name="lock heartbeat", daemon=True).start()

    @classmethod
    def remove(cls, handle: int) -> None:
        """End with a file before its handle is closed."""
        with cls._guard:
            cls._handles.discard(handle)

    @classmethod
    def _run(cls) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with cls._guard:
                for handle in cls._handles:
                    with suppress(OSError):
                        os.utime(handle)


class LockWait:
    """Waiting for one lock: says whom this process waits for, and notices that the holder shows no sign of life."""

    def __init__(self, path: Path, what: str, say: Say) -> None:
        """`what`: subject of the line, such as `token cache PATH`. `say` gets at most one line in REPEAT_SECONDS."""
        self._path, self._what, self._say = path, what, say
        self._begin = self._looked = time.monotonic()
        self._next_line = self._begin + SPEAK_SECONDS
        self._beat, self._still_seconds = 0.0, 0.0

    def look(self) -> None:
        """Call this after each vain try.

        Raises:
            StuckHolder: the holder is suspended, or has shown no sign of life for STALE_SECONDS.
        """
        now = time.monotonic()
        # This process may have been suspended too, which is not the holder's silence.
        passed, self._looked = min(now - self._looked, 10 * POLL_SECONDS), now
        if now < self._next_line and now - self._begin < SPEAK_SECONDS:
            self._still_seconds += passed
            return
        holder = find_holder(_visible_file(self._path))
        self._still_seconds = self._still_seconds + passed if holder.beat == self._beat else 0.0
        self._beat = holder.beat
        if holder.is_suspended or self._still_seconds > STALE_SECONDS:
            raise StuckHolder(holder, self._path)
        if now >= self._next_line:
            self._next_line = now + REPEAT_SECONDS
            self._say(
                f"{self._what}: {holder.name} has the lock {self._path}, waited for {now - self._begin:.0f} s so far. No "
                f"time limit while it works; at most {STALE_SECONDS:.0f} s without a sign of life."
            )


def is_open_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def find_open_path(handle: int) -> Path | None:
    """Return where an open file or directory is now, also after a rename; None: it was removed, or the system cannot tell."""
    with suppress(OSError):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        return path if is_open_at(handle, path) else None
    return None


def try_lock(path: Path, *, create: bool = True) -> Lock | None:
    """Lock a file exclusively without waiting; return None if another process holds a lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_open_at(handle, path):
            return Lock(handle, path)
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(handle)
        if create and error.errno in _NO_LOCKS:
            return _create_held_file(path)
        raise
    # Locked, or removed by its former owner after we opened it.
    os.close(handle)
    return None


def wait_for_lock(path: Path, wait: LockWait, timeout_seconds: float = float("inf")) -> Lock | None:
    """Lock a file exclusively and sign it, waiting for other processes; return None after `timeout_seconds`.

    Raises:
        StuckHolder: the holder shows no sign of life. On a file system without locks its file is removed instead.
    """
    deadline = time.monotonic() + timeout_seconds
    while (lock := try_lock(path)) is None:
        if time.monotonic() > deadline:
            return None
        try:
            wait.look()
        except StuckHolder as stuck:
            held = _visible_file(path)
            if held == path or stuck.holder.is_suspended:
                raise
            _remove_held_file(held)
        time.sleep(POLL_SECONDS)
    lock.sign()
    return lock


@contextmanager
def locked_or_bypassed(path: Path, what: str, say: Say) -> Generator[None]:
    """Hold an exclusive lock in a `with` block, waiting for processes that work and bypassing one that is suspended or gone.

    The processes that bypass it exclude each other by a lock on `<path>-1`, and so on. So the block must publish its result
    atomically: the bypassed process may continue later.
    """
    number, name = 0, path
    while True:
        try:
            lock = wait_for_lock(name, LockWait(name, what, say))
            break
        except StuckHolder as stuck:
            say(f"{what}: {stuck.strerror}. It is not waited for any longer.")
            number += 1
            name = path.with_name(f"{path.name}-{number}")
    assert lock is not None
    try:
        yield
    finally:
        if number:
            name.unlink(missing_ok=True)
        lock.close()


def lock_shared(path: Path, wait: LockWait) -> int:
    """Create a file if needed, set its time to now and lock it shared, waiting for exclusive locks; return its handle.

    Raises:
        StuckHolder: the holder of an exclusive lock shows no sign of life.
    """
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
        try:
            acquire(handle, wait, fcntl.LOCK_SH)
            if is_open_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed while we waited


def acquire(handle: int, wait: LockWait, kind: int = fcntl.LOCK_EX) -> None:
    """Lock an open file until its handle is closed, waiting for other processes.

    Raises:
        StuckHolder: the holder shows no sign of life.
    """
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            wait.look()
            time.sleep(POLL_SECONDS)


def is_locked(path: Path) -> bool:
    """Return whether any process holds a lock on a file; False if it cannot be opened.

    On a file system without locks: whether it has been used there, or an exclusive lock is held.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS or not path.name.endswith(".lock") or _visible_file(path) != path
    finally:
        os.close(handle)
    return False


def describe_holder(path: Path) -> Holder:
    """Return the process that holds an exclusive lock on `path`, as far as it can be known."""
    return find_holder(_visible_file(path))


def _visible_file(path: Path) -> Path:
    """Return the file that shows the holder."""
    held = path.with_name(path.name + _HELD)
    return held if held.exists() else path


def _create_held_file(path: Path) -> Lock | None:
    """Create the file that replaces a lock; None if another process has it. That of a dead process of this host is removed."""
    held = path.with_name(path.name + _HELD)
    try:
        return Lock(os.open(held, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), held)
    except FileExistsError:
        if find_holder(held).is_dead:
            _remove_held_file(held)
        return None


def _remove_held_file(held: Path) -> None:
    """Remove the file of a process that is gone. A rename first: only one of several processes can do it."""
    aside = held.with_name(f"{held.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        before = held.stat()
        held.rename(aside)
        if not os.path.samestat(before, aside.stat()):
            # Another process has removed it, and a third one has locked since.
            with suppress(FileExistsError):
                os.link(aside, held)
        aside.unlink()
