"""Files that lock by being open."""

import os
from pathlib import Path


def is_open_at(handle: int, path: Path) -> bool:
    """Whether an open file is (still) the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
