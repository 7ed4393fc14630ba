"""Text files that appear whole or not at all, and the JSON that goes into them."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from agnews_dist.errors import UserError


def write_text(path: Path, pieces: Iterable[str]) -> None:
    """Write the joined pieces to `path` so that a crash at any moment leaves the old file or the whole new one.

    Raises:
        UserError: the file cannot be written (no directory, no permission, no space).
    """
    # Beside the target: a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): the run's results would be lost. "
            "Make its directory writable, free space there, or choose another with --run.dir."
        ) from error


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: object) -> Any:
    """`value` as what strict JSON can say: tuples become lists, numpy scalars numbers, NaN and infinities null.

    Raises:
        TypeError: something else is inside.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast(Mapping[object, object], value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("list[object] | tuple[object, ...]", value)]
    raise TypeError(f"{type(value).__name__} has no JSON form")
