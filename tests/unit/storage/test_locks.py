"""File locks between processes. The kernel treats two handles of one process like two processes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.processes import environment

from agnews_dist.storage.locks import is_locked, is_open_at, lock_shared, locked, try_lock, wait_for_lock

HOLDER = """
import sys, time
from pathlib import Path
from agnews_dist.storage.locks import try_lock
print(try_lock(Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


def test_try_lock_excludes_other_handles_until_close(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    handle = try_lock(path)
    assert handle is not None
    assert is_locked(path)
    assert try_lock(path) is None
    os.close(handle)
    assert not is_locked(path)
    again = try_lock(path)
    assert again is not None
    os.close(again)


def test_try_lock_excludes_other_processes_until_their_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, env=environment()
    ) as holder:
        assert holder.stdout is not None
        assert int(holder.stdout.readline()) > 0
        assert try_lock(path) is None
        holder.kill()
        holder.wait()
    handle = try_lock(path)
    assert handle is not None, "the kernel released it"
    os.close(handle)


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


def test_is_open_at_notices_removal_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w") as file:
        assert is_open_at(file.fileno(), path)
        path.unlink()
        assert not is_open_at(file.fileno(), path)
        path.touch()
        assert not is_open_at(file.fileno(), path)


def test_lock_shared_admits_readers_and_excludes_owners(tmp_path: Path) -> None:
    path = tmp_path / "new" / "in-use"
    first, second = lock_shared(path), lock_shared(path)
    assert try_lock(path) is None
    os.close(first)
    assert is_locked(path)
    os.close(second)
    assert not is_locked(path)


def test_lock_shared_updates_the_time_of_use(tmp_path: Path) -> None:
    path = tmp_path / "in-use"
    path.touch()
    os.utime(path, (1, 1))
    os.close(lock_shared(path))
    assert path.stat().st_mtime > 1


def test_is_locked_is_false_without_a_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "missing")


def test_wait_for_lock_gives_up_after_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        begin = time.monotonic()
        assert wait_for_lock(path, 0.3) is None
        assert time.monotonic() - begin >= 0.3
    handle = wait_for_lock(path, 0.3)
    assert handle is not None
    os.close(handle)


@pytest.mark.slow
def test_locked_waits_for_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    handle = try_lock(path)
    assert handle is not None
    threading.Timer(0.5, os.close, [handle]).start()
    begin = time.monotonic()
    with locked(path):
        assert time.monotonic() - begin >= 0.4
        assert is_locked(path)
    assert not is_locked(path)
