"""All token caches below one directory, listed and removed. Loads no tokenizer."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from agnews_dist.data.token_cache import describe, is_abandoned

_KEY = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class TokenCache:
    """One cache as it is now, or what a killed builder left of it."""

    key: str
    path: Path
    about: Mapping[str, Any]
    """The content of its meta.json; empty while it is built, or where it cannot be read."""
    disk_bytes: int
    last_used: float
    """Seconds since 1970."""
    is_used: bool
    """Built or opened at this moment; afterwards a job has the tokens in memory and needs it no more."""


def token_caches(root: Path) -> list[TokenCache]:
    """Longest unused first; none where there is no such directory."""
    try:
        keys = {path.name.partition(".building-")[0] for path in root.iterdir() if path.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: list[TokenCache] = []
    for key in filter(_KEY.fullmatch, keys):
        try:
            found.append(_token_cache(root / key))
        except FileNotFoundError:
            continue  # removed or published meanwhile
    return sorted(found, key=lambda cache: (cache.last_used, cache.key))


def remove_token_cache(path: Path) -> bool:
    """Remove it unless it is built or opened at this moment; whether it is gone.

    Raises:
        OSError: this user may not.
    """
    try:
        with FileLock(f"{path}.lock", timeout=0):
            for part in _parts(path):
                if part == path or is_abandoned(part):
                    shutil.rmtree(part)
            return not _parts(path)
    except Timeout:
        return False


def _parts(path: Path) -> list[Path]:
    """The published directory and those of builders."""
    return [part for part in (path, *path.parent.glob(f"{path.name}.building-*")) if part.is_dir()]


def _token_cache(path: Path) -> TokenCache:
    parts = _parts(path)
    if not parts:
        raise FileNotFoundError(path)
    files = [file for part in parts for file in part.rglob("*")]
    return TokenCache(
        key=path.name,
        path=path,
        about=describe(path),
        disk_bytes=sum(file.lstat().st_blocks * 512 for file in files),
        last_used=max(part.stat().st_mtime for part in parts),
        is_used=_is_locked(path.with_name(f"{path.name}.lock")),
    )


def _is_locked(lock: Path) -> bool:
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's: this user cannot tell
        return False
