"""File locks between processes. The kernel treats two handles of one process like two processes."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.processes import TIMEOUT, environment
from support.tools import requires_tool

from agnews_dist.storage import locks
from agnews_dist.storage.holders import StuckHolder, find_holder
from agnews_dist.storage.locks import (
    LockWait,
    find_open_path,
    is_locked,
    is_open_at,
    lock_shared,
    locked_or_bypassed,
    try_lock,
    wait_for_lock,
)

HOLDER = """
import sys, time
from pathlib import Path
from agnews_dist.storage.locks import LockWait, wait_for_lock
path = Path(sys.argv[1])
lock = wait_for_lock(path, LockWait(path, "the test", print))
print("locked", flush=True)
sys.stdin.read()
"""
NO_LOCKS = Path(locks.__file__).parents[2] / "tests" / "support" / "no_locks.c"


@contextmanager
def holder_of(path: Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that has the lock until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(**extra),
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        try:
            yield holder
        finally:
            holder.kill()


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of the real limits become tenths."""
    monkeypatch.setattr(locks, "SPEAK_SECONDS", 0.5)
    monkeypatch.setattr(locks, "REPEAT_SECONDS", 1.0)
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.5)


def test_try_lock_excludes_other_handles_until_close(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path)
    assert lock is not None
    assert is_locked(path)
    assert try_lock(path) is None
    lock.close()
    assert not is_locked(path)
    again = try_lock(path)
    assert again is not None
    again.close()


def test_try_lock_excludes_other_processes_until_their_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder_of(path) as holder:
        assert try_lock(path) is None
        assert find_holder(path).name == f"process {holder.pid} on {socket.gethostname()}"
        holder.kill()
        holder.wait()
    lock = try_lock(path)
    assert lock is not None, "the kernel released it"
    lock.close()


def test_try_lock_without_create_needs_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "lock", create=False)
    assert not (tmp_path / "lock").exists()


def test_try_lock_refuses_a_file_that_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner removes the lock file at its end, after another process has opened it."""
    path = tmp_path / "lock"
    open_file = os.open

    def open_and_remove(*arguments: object) -> int:
        handle = open_file(*arguments)  # type: ignore[arg-type]
        path.unlink()
        return handle

    monkeypatch.setattr(os, "open", open_and_remove)
    assert try_lock(path) is None


def test_open_files_are_found_after_a_move_and_not_after_removal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        assert is_open_at(file.fileno(), path)
        assert not is_open_at(file.fileno(), path / "below")
        path.rename(tmp_path / "moved")
        assert find_open_path(file.fileno()) == tmp_path / "moved"
        (tmp_path / "moved").unlink()
        assert not is_open_at(file.fileno(), path)
        path.touch()
        assert not is_open_at(file.fileno(), path)
        assert find_open_path(file.fileno()) is None


def wait_in(path: Path) -> LockWait:
    return LockWait(path, "the test", lambda _: None)


def test_lock_shared_admits_readers_and_excludes_owners(tmp_path: Path) -> None:
    path = tmp_path / "new" / "in-use"
    first, second = lock_shared(path, wait_in(path)), lock_shared(path, wait_in(path))
    assert try_lock(path) is None
    os.close(first)
    assert is_locked(path)
    os.close(second)
    assert not is_locked(path)


def test_lock_shared_updates_the_time_of_use(tmp_path: Path) -> None:
    path = tmp_path / "in-use"
    path.touch()
    os.utime(path, (1, 1))
    os.close(lock_shared(path, wait_in(path)))
    assert path.stat().st_mtime > 1


def test_is_locked_is_false_without_a_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "missing")


@pytest.mark.slow
def test_wait_for_lock_gives_up_after_the_timeout_or_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path)
    assert lock is not None
    begin = time.monotonic()
    assert wait_for_lock(path, wait_in(path), 0.3) is None
    assert time.monotonic() - begin >= 0.3
    threading.Timer(0.5, lock.close).start()
    with closing(wait_for_lock(path, wait_in(path))):  # type: ignore[type-var]
        assert time.monotonic() - begin >= 0.4
        assert is_locked(path)
    assert not is_locked(path)


@pytest.mark.slow
@pytest.mark.usefixtures("short_times")
def test_holder_that_works_is_waited_for_with_lines_and_a_suspended_one_is_bypassed(tmp_path: Path) -> None:
    path, lines = tmp_path / "key.lock", list[str]()
    with holder_of(path) as holder:
        name = f"process {holder.pid} on {socket.gethostname()}"
        # Longer than STALE_SECONDS: the heartbeat of a process that only waits for input counts.
        assert wait_for_lock(path, LockWait(path, "token cache x", lines.append), 4.0) is None
        assert len(lines) in (3, 4)
        assert lines[0].startswith(f"token cache x: {name} has the lock {path}, waited for ")
        assert lines[0].endswith("No time limit while it works; at most 2 s without a sign of life.")
        os.kill(holder.pid, signal.SIGSTOP)
        lines.clear()
        with locked_or_bypassed(path, "token cache x", lines.append):
            # Others that bypass it exclude each other.
            assert try_lock(tmp_path / "key.lock-1") is None
        assert lines == [f"token cache x: {name}, which has the lock {path}, is suspended. It is not waited for any longer."]
        assert [each.name for each in tmp_path.iterdir()] == ["key.lock"]
        # A run's name cannot be bypassed, nor can a shared lock: they report who has it.
        with pytest.raises(StuckHolder, match=rf"{name}, which has the lock {path}, is suspended"):
            os.close(lock_shared(path, wait_in(path)))


@pytest.mark.slow
@pytest.mark.usefixtures("short_times")
def test_holder_on_another_host_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"process 1 on elsewhere\n")
        begin = time.monotonic()
        with pytest.raises(StuckHolder, match=r"process 1 on elsewhere, which has the lock .*, shows no sign of life"):
            wait_for_lock(path, wait_in(path))
        assert time.monotonic() - begin > locks.STALE_SECONDS
        # Without a name in the file, the kernel knows the process.
        file.truncate(0)
        assert find_holder(path).pid == os.getpid()


LOCK_TWICE = """
import os, sys
from pathlib import Path
from agnews_dist.storage.locks import LockWait, is_locked, try_lock, wait_for_lock

path = Path(sys.argv[1])
lock = wait_for_lock(path, LockWait(path, "the test", print), 60)
assert try_lock(path) is None and is_locked(path)
lock.close()
assert not is_locked(path) and not path.with_name("a.lock.held").exists()
print("right")
"""


@pytest.mark.slow
@requires_tool("gcc")
def test_file_system_without_locks_has_one_owner_at_a_time(tmp_path: Path) -> None:
    library, path = tmp_path / "no_locks.so", tmp_path / "a.lock"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, NO_LOCKS], check=True)
    extra = {"LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", LOCK_TWICE, str(path)]

    def lock_twice() -> str:
        return subprocess.run(
            command, env=environment(**extra), stdout=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False
        ).stdout

    assert lock_twice() == "right\n"
    with holder_of(path, **extra) as holder:
        threading.Timer(1.0, holder.kill).start()
        # A process that was killed leaves the file. On the same host that is seen at once.
        assert lock_twice() == "right\n"
    (tmp_path / "a.lock.held").write_text("process 1 on elsewhere\n")
    assert "the test: process 1 on elsewhere has the lock" in lock_twice(), "a line, then its heartbeat is awaited"
    assert not (tmp_path / "a.lock.held").exists()
