"""Publishing files and directories whole or not at all.

Everything is written under a hidden name next to the target, fsynced and renamed; then the parent directory is fsynced.
A kill or a loss of power at any instant leaves the old content, or the new.
"""

import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from errno import EINVAL
from pathlib import Path
from typing import Any, cast

import numpy as np

from agnews_dist.errors import UserError


def write_text(path: Path, pieces: Iterable[str]) -> None:
    """Write the joined pieces to `path`, whole or not at all.

    Raises:
        UserError: the file cannot be written (no directory, no permission, no space).
    """
    try:
        with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): the run's results would be lost. "
            "Make its directory writable, free space there, or choose another with --run.dir."
        ) from error


@contextmanager
def new_file(path: Path, *, is_durable: bool = True) -> Generator[Path]:
    """Yield a hidden name to write to; publish it as `path` when the block ends, or remove it if the block raises.

    `is_durable`: survive a loss of power. False for what can be made again: on a slow disk every fsync takes seconds.

    Raises:
        OSError: it cannot be written; `path` is as it was, unless only the last fsync failed.
    """
    temporary = _hidden_name(path)
    try:
        yield temporary
        if is_durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if is_durable:
        sync(path.parent)


@contextmanager
def new_directory(path: Path, *, staging: Path | None = None, sync_files: bool = True) -> Generator[Path]:
    """Yield a hidden directory to fill; publish it as `path` when the block ends, or remove it if the block raises.

    `staging`: its name, by default one that `sweep` finds. `sync_files`: fsync its files too, unless the block has done so.

    Raises:
        OSError: something cannot be written; `path` is as it was, unless only the last fsync failed.
    """
    staging = staging or _hidden_name(path)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)
    try:
        staging.mkdir()
        yield staging
        for file in staging.iterdir() if sync_files else ():
            sync(file)
        sync(staging)
        replace(staging, path)
    except BaseException:
        _remove(staging)
        raise


def replace(staging: Path, path: Path, *, aside: Path | None = None) -> None:
    """Rename a directory to `path` and remove what was there; in between that has the name `aside`.

    Raises:
        OSError: it cannot be renamed; `path` is as it was, unless only the fsync failed.
    """
    old = _set_aside(path, aside or _hidden_name(path, "old-"))
    try:
        staging.rename(path)
    except OSError:
        if old is not None:
            with suppress(OSError):
                old.rename(path)
        raise
    # The rename must be on disk before anything that depends on it changes: a loss of power could undo it until then.
    sync(path.parent)
    if old is not None:
        _remove(old)


def discard(paths: Collection[Path]) -> None:
    """Remove files and directories, ignoring errors; none is ever half removed under its name."""
    hidden: list[Path] = []
    for path in paths:
        with suppress(OSError):
            old = _set_aside(path, _hidden_name(path, "old-"))
            hidden += [] if old is None else [old]
    for directory in {path.parent for path in hidden}:
        # A loss of power could otherwise undo the rename and keep what is removed below.
        with suppress(OSError):
            sync(directory)
    for path in hidden:
        _remove(path)


def sweep(directory: Path, name: str) -> None:
    """Remove what killed processes left half written or half removed, ignoring errors; no other process may be writing.

    `name`: regular expression of the names that were to be published.
    """
    leftover = re.compile(rf"\.(old-)?{name}\.[0-9a-f]{{32}}")
    with suppress(OSError):
        for path in list(directory.iterdir()):
            if leftover.fullmatch(path.name):
                _remove(path)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot fsync a directory: its entries are on disk already.
        if error.errno != EINVAL:
            raise
    finally:
        os.close(handle)


def _set_aside(path: Path, aside: Path) -> Path | None:
    """Rename `path` to `aside` and return that; None if `path` does not exist."""
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    return aside


def _hidden_name(path: Path, prefix: str = "") -> Path:
    """Return an unused name next to `path` that `sweep` finds: a rename is atomic only within one file system."""
    return path.with_name(f".{prefix}{path.name}.{uuid.uuid4().hex}")


def _remove(path: Path) -> None:
    """Remove a directory with its content, or a file, ignoring errors."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def to_json_value(value: object, convert_other: Callable[[object], Any] | None = None) -> Any:
    """Convert to what strict JSON can hold: tuples become lists, numpy scalars numbers, NaN and infinities null.

    Records (dataclasses) become objects. `convert_other`: converts values that have no JSON form.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.generic):
        return to_json_value(value.item(), convert_other)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item, convert_other) for key, item in cast(Mapping[object, object], value).items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item, convert_other) for item in cast("list[object] | tuple[object, ...]", value)]
    if is_dataclass(value):
        return to_json_value(vars(value), convert_other)
    if convert_other is not None:
        return convert_other(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
