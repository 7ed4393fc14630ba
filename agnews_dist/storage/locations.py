"""Where caches are kept."""

import os
from pathlib import Path


def cache_root(cache_dir: Path | str | None) -> Path:
    """The directory of all caches: `cache_dir`, or $XDG_CACHE_HOME or ~/.cache, /agnews_dist."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agnews_dist"
