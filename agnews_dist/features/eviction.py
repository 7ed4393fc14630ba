"""All feature caches below one directory: listed, held within a limit, removed. Knows no torch.

The files of a cache are those of files.py; the names they share stand here.
"""

import errno
import fcntl
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
from agnews_dist.storage.locks import is_open_at

ABOUT = "about.json"
IN_USE = "in-use"
"""Locked, shared, by everybody who builds or reads the cache; its time is that of the last use."""
ROWS = "rows.bin"
MARKS = "marks"
"""Directory of one file per segment: its lock, and when it is finished its checksum in hexadecimal."""
MARK_CHARACTERS = 64
_KEY = re.compile("[0-9a-f]{64}")
_TRASH = ".trash-"


@dataclass(frozen=True)
class Entry:
    """One cache as it is now."""

    path: Path
    about: Mapping[str, Any]
    """What its builder said of it; empty where that cannot be read."""
    disk_bytes: int
    """What it takes on disk, which is all of it from the start where space can be reserved."""
    last_used: float
    """Seconds since 1970."""
    is_complete: bool
    is_used: bool

    @property
    def key(self) -> str:
        """What the features are a function of."""
        return self.path.name


def entries(root: Path) -> list[Entry]:
    """The caches below `root`, longest unused first; none where there is no such directory."""
    try:
        directories = [path for path in root.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: list[Entry] = []
    for directory in directories:
        try:
            found.append(_entry(directory))
        except FileNotFoundError:
            continue  # removed meanwhile
    return sorted(found, key=lambda entry: (entry.last_used, entry.key))


def make_room(root: Path, needed_bytes: int, limit_bytes: int, *, keep: Collection[str] = ()) -> list[Entry]:
    """Remove the longest unused caches until those of the keys `keep`, which will take `needed_bytes`, fit beside the others.

    Returns what was removed. The limit is a soft one: two jobs that make room at the same time do not count each other.

    Raises:
        OSError: they cannot fit even without all that nobody uses; nothing was removed.
    """
    for leftover in root.glob(f"{_TRASH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    others = [entry for entry in entries(root) if entry.key not in keep]
    present = sum(entry.disk_bytes for entry in others)
    least = sum(entry.disk_bytes for entry in others if entry.is_used)
    removed: list[Entry] = []
    if least + needed_bytes > limit_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{gigabytes(needed_bytes)} are needed beside {gigabytes(least)} of caches in use, and all feature caches may take "
            f"{gigabytes(limit_bytes)} (engine.feature_cache_gigabytes)",
        )
    for entry in others:
        if present + needed_bytes <= limit_bytes:
            break
        if not entry.is_used and remove(entry.path):
            removed.append(entry)
            present -= entry.disk_bytes
    return removed


def remove(directory: Path) -> bool:
    """Remove a cache unless somebody uses it; whether it is gone.

    Renamed first: nobody ever opens half a cache.
    """
    try:
        handle = os.open(directory / IN_USE, os.O_RDONLY)
    except FileNotFoundError:
        handle = None  # nobody has come as far as using it
    except OSError:
        return False
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_open_at(handle, directory / IN_USE):
                return False  # removed and made anew meanwhile: somebody uses it
        trash = directory.with_name(f"{_TRASH}{uuid.uuid4().hex}")
        directory.rename(trash)
    except FileNotFoundError:
        return True
    except OSError:  # in use, or another user's
        return False
    finally:
        if handle is not None:
            os.close(handle)
    shutil.rmtree(trash, ignore_errors=True)
    return True


def read_mark(directory: Path, segment: int) -> str | None:
    """The checksum of a finished segment."""
    try:
        text = mark_path(directory, segment).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if len(text) == MARK_CHARACTERS else None


def mark_path(directory: Path, segment: int) -> Path:
    """A segment's lock and mark."""
    return directory / MARKS / f"{segment:05}"


def is_whole(directory: Path, *, num_segments: int, num_bytes: int) -> bool:
    """Whether every segment was finished; whether its bytes are still right only reading them can tell."""
    try:
        has_rows = (directory / ROWS).stat().st_size == num_bytes
    except OSError:
        return False
    return has_rows and all(read_mark(directory, segment) for segment in range(num_segments))


def _entry(directory: Path) -> Entry:
    about = _read_about(directory)
    num_segments, num_bytes = about.get("segments"), about.get("bytes")
    anchor = directory / IN_USE
    return Entry(
        path=directory,
        about=about,
        disk_bytes=sum(path.lstat().st_blocks * 512 for path in directory.rglob("*")),
        last_used=(anchor if anchor.exists() else directory).stat().st_mtime,
        is_complete=isinstance(num_segments, int)
        and isinstance(num_bytes, int)
        and is_whole(directory, num_segments=num_segments, num_bytes=num_bytes),
        is_used=_is_used(anchor),
    )


def _read_about(directory: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((directory / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _is_used(anchor: Path) -> bool:
    try:
        handle = os.open(anchor, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or no locks here: then nothing is safe to remove
        return True
    finally:
        os.close(handle)
    return False


def shared_directory(memory: Path, name: str, *, sweep: bool) -> Path:
    """A job's directory in the memory that a node's ranks share; `sweep`: remove there what killed jobs of this user left."""
    root = memory / f"agnews_dist-{os.getuid()}"
    if sweep and root.is_dir():
        for job in list(root.iterdir()):
            # Another job may sweep at the same time, and a living one's directory is not empty.
            with suppress(OSError):
                if job.name != name and [leftover for leftover in list(job.iterdir()) if remove(leftover)]:
                    job.rmdir()
    return root / name
