"""A directory of this node's own in which tokens and features are copied, when asked: `--node_cache`.

The file system that nodes share is then read once per node, whatever the number of ranks and epochs. Names in it are hashes of
the content, so that jobs of one user share it and nothing in it can be stale. All of it stays when the job ends: with the job's
own $SLURM_TMPDIR a cluster removes it; in a file system in memory, such as /dev/shm, that is the tokens alone.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from agnews_dist.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
"""Where the ranks of a node share memory; a file system in memory on Linux, absent elsewhere."""
IN_MEMORY = ("tmpfs", "ramfs")
HELP = "Read tokens and features from a copy in this directory of the node; 'auto': $SLURM_TMPDIR, $TMPDIR or /dev/shm."


def choose_node_cache(wanted: str, environ: Mapping[str, str]) -> Path | None:
    """Where it is to be; None: none is wanted.

    Raises:
        UserError: `auto` finds nothing that can be written.
    """
    if not wanted:
        return None
    if wanted != "auto":
        return Path(wanted).expanduser()
    places = [environ[name] for name in ("SLURM_TMPDIR", "TMPDIR") if environ.get(name)]
    usable = [place for place in (*map(Path, places), SHARED_MEMORY) if os.access(place, os.W_OK | os.X_OK)]
    if not usable:
        raise UserError(
            f"--node_cache auto: none of {', '.join([*places, str(SHARED_MEMORY)])} can be written, so there is nowhere to "
            "copy to. Name a directory of the node, or leave it out."
        )
    return usable[0] / f"agnews_dist-node-{os.getuid()}"


def node_cache(wanted: str, environ: Mapping[str, str]) -> Path | None:
    """The directory, made; None: none is wanted.

    Raises:
        UserError: it cannot be made.
    """
    directory = choose_node_cache(wanted, environ)
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--node_cache {directory} cannot be made ({error.strerror or error}): tokens and features would be read over the "
            "network again and again. Name a directory that every node has and this user may write."
        ) from error
    return directory


def is_memory(directory: Path) -> bool:
    """Whether what is copied there takes memory instead of a disk: /dev/shm, and on nodes without a disk /tmp as well."""
    there = directory.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    nearest = max((place for place in mounts if place == there or place in there.parents), default=None)
    return nearest is not None and mounts[nearest] in IN_MEMORY


def cache_root(cache_dir: Path | str | None) -> Path:
    """The directory of all caches: `cache_dir`, or $XDG_CACHE_HOME or ~/.cache, /agnews_dist."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agnews_dist"
