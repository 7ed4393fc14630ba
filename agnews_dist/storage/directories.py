"""Directories: the root of all caches, the space that one takes, the space that is free below one."""

import os
import shutil
from pathlib import Path

BLOCK_BYTES = 512
"""Unit of `st_blocks`, whatever the file system's own block size (POSIX)."""


def cache_root(cache_dir: Path | str | None) -> Path:
    """Return the directory of all caches.

    It is `cache_dir` if that is set, else $XDG_CACHE_HOME/agnews_dist, else ~/.cache/agnews_dist.
    """
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agnews_dist"


def used_disk_bytes(directory: Path) -> int:
    """Return what the entries below `directory` take on disk; reserved space counts, holes do not.

    Raises:
        FileNotFoundError: an entry was removed meanwhile.
    """
    return sum(path.lstat().st_blocks * BLOCK_BYTES for path in directory.rglob("*"))


def free_disk_bytes(directory: Path) -> int:
    """Return the free space where `directory` is or would be created; 0 if that is unknown."""
    for parent in (directory, *directory.absolute().parents):
        try:
            return shutil.disk_usage(parent).free
        except (FileNotFoundError, NotADirectoryError):
            # Tried rather than checked first: another process may remove the directory in between.
            continue
        except OSError:
            return 0
    return 0
