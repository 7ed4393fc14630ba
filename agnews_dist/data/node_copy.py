"""A token cache's copy on the node: one process copies it and reads the shared file system once, all others open the copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from agnews_dist.data.token_cache import DamagedCache, Stored, publish, read_stored
from agnews_dist.events import Emit, Warned


def open_copy(shared: Path, node_root: Path, make_shared: Callable[[], Stored], emit: Emit) -> tuple[Path, Stored]:
    """(directory, content) of the copy of `shared` below `node_root`; of `shared` itself, with a warning, if none can be kept.

    `make_shared` opens the shared cache, and builds it where it is absent or damaged. The name of `shared` is the cache's key.
    """
    key = shared.name
    local = node_root / key
    try:
        with FileLock(node_root / f"{key}.lock"):
            try:
                return local, read_stored(local, key)
            except (FileNotFoundError, DamagedCache):
                return local, _copied(shared, local, key, make_shared)
    except (OSError, DamagedCache) as error:
        reason = getattr(error, "strerror", None) or error
        emit(Warned(message=f"no tokens can be kept in {node_root} ({reason}): they are read from {shared}."))
        return shared, make_shared()


def _copied(shared: Path, local: Path, key: str, make_shared: Callable[[], Stored]) -> Stored:
    """Copy first and verify the copy: a whole cache is read once."""

    def copy(place: Path) -> None:
        for file in shared.iterdir():
            shutil.copyfile(file, place / file.name)

    if shared.is_dir():
        publish(local, copy)
        try:
            return read_stored(local, key)
        except DamagedCache:
            pass  # as the shared one is, which is about to be mended
    make_shared()
    publish(local, copy)
    return read_stored(local, key)
