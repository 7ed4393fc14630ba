"""How much memory and disk there is for features: on this rank's device, on its node, below a directory."""

import shutil
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
"""Where the ranks of a node share memory; a file system in memory on Linux, absent elsewhere."""
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)

_OWN_GROUP = Path("/proc/self/cgroup")


def free_host_bytes() -> int:
    """Memory this node could still give: what the system has, or what the job's control group (Slurm, container) leaves."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def free_shared_bytes() -> int:
    """The part of it that ranks of a node can share; 0 where there is no shared-memory file system."""
    return min(free_disk_bytes(SHARED_MEMORY), free_host_bytes()) if SHARED_MEMORY.is_dir() else 0


def free_disk_bytes(directory: Path) -> int:
    """Free space where `directory` is or would be made; 0 if that cannot be told."""
    for place in (directory, *directory.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except (FileNotFoundError, NotADirectoryError):
            continue  # asked, not looked for first: another process may remove it in between
        except OSError:
            return 0
    return 0


def _cgroup_rooms() -> list[int]:
    """What is left below each memory limit that holds for this process: its own control group's and those above it."""
    rooms: list[int] = []
    for root, limit_name, used_name in _CGROUPS:
        for group in _own_groups(root):
            try:
                limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
            except OSError:
                continue
            if limit.isdigit() and used.isdigit():
                rooms.append(max(0, int(limit) - int(used) + _reclaimable(group)))
    return rooms


def _reclaimable(group: Path) -> int:
    """What a group holds of files it has read: counted as used, given back when it is needed."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    value = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _own_groups(root: Path) -> list[Path]:
    """The directories of this process's control group and its parents below `root`, as far as /proc tells."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return []
    paths = [line.split(":", 2)[2].strip("/") for line in lines if line.split(":", 2)[1] in ("", "memory")]
    groups = [root]
    for path in paths:
        parts = path.split("/")
        groups += [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return list(dict.fromkeys(groups))


def gigabytes(num_bytes: int) -> str:
    """In words, never rounded to nothing.

    >>> gigabytes(9_600_000_000), gigabytes(41_000_000), gigabytes(900)
    ('9.6 GB', '41 MB', '1 kB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:,.1f} {unit}" if unit == "GB" else f"{value:.0f} {unit}"
    return f"{-(-num_bytes // 1000)} kB"
