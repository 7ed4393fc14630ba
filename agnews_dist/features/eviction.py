"""All feature caches below one directory: list them, hold them within a limit, remove them. Loads no torch.

store.py writes the files; this module defines their names.
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agnews_dist.storage.capacity import gigabytes
from agnews_dist.storage.directories import used_disk_bytes
from agnews_dist.storage.locks import Lock, is_locked, try_lock

ABOUT = "about.json"
FROZEN = "frozen"
"""Entry of about.json: the key of the frozen part (see keys.py)."""
INDEX = "index.npz"
"""The texts of the cache (see piece_index.py)."""
IN_USE = "in-use"
"""File with a shared lock of every process that builds or reads the cache. Its modification time is that of the last use."""
ROWS = "rows.bin"
MARKS = "marks"
"""Directory with one file per segment: its lock, and its checksum when it is finished."""
VERIFIED = "verified"
"""State of the rows when they were last verified: a file that has not changed since is used as it is."""
_SHA256 = re.compile("[0-9a-f]{64}")
"""Name of a cache's directory (see keys.py), and content of a finished segment's mark."""
_TRASH = ".trash-"


@dataclass(frozen=True)
class CacheEntry:
    """One cache in a listing."""

    path: Path
    about: Mapping[str, Any]
    """Content of about.json; empty if it cannot be read."""
    disk_bytes: int
    """Space on disk. An unfinished cache has its full size if the file system can reserve space."""
    last_used: float
    """Seconds since 1970."""
    is_complete: bool
    is_used: bool

    @property
    def key(self) -> str:
        """Key of the features."""
        return self.path.name


def list_caches(root: Path) -> list[CacheEntry]:
    """List the caches below `root`, least recently used first; none if `root` does not exist."""
    try:
        directories = [path for path in root.iterdir() if _SHA256.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: list[CacheEntry] = []
    for directory in directories:
        try:
            found.append(_read_entry(directory))
        except FileNotFoundError:
            continue  # another process has removed it
    return sorted(found, key=lambda entry: (entry.last_used, entry.key))


def list_of_frozen(root: Path, frozen: str) -> list[Path]:
    """List the directories of caches of one frozen part, finished or not, by name."""
    try:
        directories = [path for path in root.iterdir() if _SHA256.fullmatch(path.name)]
    except OSError:  # a builder will report it
        return []
    return sorted(path for path in directories if read_about(path).get(FROZEN) == frozen)


def evict(root: Path, needed_bytes: int, limit_bytes: int, *, keep: Collection[str] = ()) -> list[CacheEntry]:
    """Remove the least recently used caches until the others and `needed_bytes` fit into `limit_bytes`; return them.

    `keep`: keys of the caches that will take `needed_bytes`. Two jobs that evict at the same time do not count each other, so
    they may exceed the limit.

    Raises:
        OSError: the caches in use leave too little space; nothing was removed.
    """
    for leftover in root.glob(f"{_TRASH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    others = [entry for entry in list_caches(root) if entry.key not in keep]
    used_bytes = sum(entry.disk_bytes for entry in others if entry.is_used)
    if used_bytes + needed_bytes > limit_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{gigabytes(needed_bytes)} and {gigabytes(used_bytes)} of caches in use exceed "
            f"engine.feature_cache_gigabytes ({gigabytes(limit_bytes)})",
        )
    removed: list[CacheEntry] = []
    total_bytes = needed_bytes + sum(entry.disk_bytes for entry in others)
    for entry in others:
        if total_bytes > limit_bytes and not entry.is_used and remove(entry.path):
            removed.append(entry)
            total_bytes -= entry.disk_bytes
    return removed


def remove(directory: Path) -> bool:
    """Remove a cache unless a process uses it; return whether it is gone.

    The directory is renamed first, so no process ever opens a partly deleted cache.
    """
    trash = directory.with_name(f"{_TRASH}{uuid.uuid4().hex}")
    lock: Lock | None = None
    try:
        with suppress(FileNotFoundError):  # no process has used it yet
            lock = try_lock(directory / IN_USE, create=False)
            if lock is None:
                return False
        directory.rename(trash)
    except FileNotFoundError:
        return True
    except OSError:  # another user's, or no locks here
        return False
    finally:
        if lock is not None:
            lock.close()
    shutil.rmtree(trash, ignore_errors=True)
    return True


def read_mark(directory: Path, segment: int) -> str | None:
    """Return the checksum of a finished segment; None if it is not finished."""
    try:
        text = mark_path(directory, segment).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if _SHA256.fullmatch(text) else None


def mark_path(directory: Path, segment: int) -> Path:
    """Return the path of a segment's lock and checksum."""
    return directory / MARKS / f"{segment:05}"


def has_all_segments(directory: Path, *, num_segments: int, num_bytes: int) -> bool:
    """Return whether the file has its size and every segment is marked as finished; the bytes are not verified."""
    try:
        has_size = (directory / ROWS).stat().st_size == num_bytes
    except OSError:
        return False
    return has_size and all(read_mark(directory, segment) for segment in range(num_segments))


def _read_entry(directory: Path) -> CacheEntry:
    about = read_about(directory)
    num_segments, num_bytes = about.get("segments"), about.get("bytes")
    in_use = directory / IN_USE
    return CacheEntry(
        path=directory,
        about=about,
        disk_bytes=used_disk_bytes(directory),
        last_used=(in_use if in_use.exists() else directory).stat().st_mtime,
        is_complete=isinstance(num_segments, int)
        and isinstance(num_bytes, int)
        and has_all_segments(directory, num_segments=num_segments, num_bytes=num_bytes),
        is_used=is_locked(in_use),
    )


def read_about(directory: Path) -> Mapping[str, Any]:
    """Read the facts about a cache; nothing if they cannot be read."""
    try:
        content = json.loads((directory / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def job_directory(memory: Path, job: str, *, sweep: bool) -> Path:
    """Return a job's directory in shared memory; `sweep`: first remove directories that killed jobs of this user left there."""
    root = memory / f"agnews_dist-{os.getuid()}"
    if sweep and root.is_dir():
        for directory in list(root.iterdir()):
            # Another job may sweep at the same time, and the directory of a living job is not empty.
            with suppress(OSError):
                if directory.name != job and [each for each in list(directory.iterdir()) if remove(each)]:
                    directory.rmdir()
    return root / job
