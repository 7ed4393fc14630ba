"""Memory of this process, and free memory of its node: the system's, or what control groups (Slurm, containers) leave of it."""

import ctypes
import re
import resource
import sys
from pathlib import Path

import psutil

from agnews_dist.storage.directories import free_disk_bytes

SHARED_MEMORY = Path("/dev/shm")
"""Memory that the ranks of a node share: a file system on Linux, absent elsewhere."""
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""(root, file of the limit, file of the usage) of versions 2 and 1."""
_OWN_CGROUP = Path("/proc/self/cgroup")
_OWN_STATUS = Path("/proc/self/status")
_NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
"""Words of torch's errors without memory: CPU allocator, C++ standard library, CUDA, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation failed: Python's own, or a RuntimeError of torch."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(map(str(error).__contains__, _NO_MEMORY)))


def free_host_bytes() -> int:
    """Return the memory that this process can still get: the least of the system's and of its control groups'."""
    return min([psutil.virtual_memory().available, *_free_cgroup_bytes()])


def resident_bytes() -> int:
    """Return the memory of this process."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Return the most memory that this process ever held."""
    # ru_maxrss of Linux begins with what the parent held when it started this process: a notebook, a launcher.
    if _OWN_STATUS.is_file() and (found := re.search(r"VmHWM:\s+(\d+)", _OWN_STATUS.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Return memory that this process has freed to the system. glibc keeps it in pieces, which large tensors may not fit in."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_shared_bytes() -> int:
    """Return the part of it that the ranks of a node can share; 0 without a shared-memory file system."""
    return min(free_disk_bytes(SHARED_MEMORY), free_host_bytes()) if SHARED_MEMORY.is_dir() else 0


def _free_cgroup_bytes() -> list[int]:
    """Return what is free below each memory limit of this process: those of its control group and of the groups above."""
    free: list[int] = []
    for root, limit_name, used_name in _CGROUPS:
        for group in _own_cgroups(root):
            try:
                limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
            except OSError:
                continue
            if limit.isdigit() and used.isdigit():
                free.append(max(0, int(limit) - int(used) + _reclaimable_bytes(group)))
    return free


def _reclaimable_bytes(group: Path) -> int:
    """Return the inactive page cache of a group: the kernel counts it as used and gives it back on demand."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    value = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _own_cgroups(root: Path) -> set[Path]:
    """Return the directories of this process's control group and of its parents below `root`."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return set()
    groups = {root}
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            group = root / path.strip("/")
            groups |= {each for each in (group, *group.parents) if each.is_relative_to(root)}
    return groups


def gigabytes(num_bytes: int) -> str:
    """Format a byte count; at least 1 kB unless it is 0.

    >>> gigabytes(9_600_000_000), gigabytes(41_000_000), gigabytes(900)
    ('9.6 GB', '41 MB', '1 kB')
    """
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:,.1f} GB"
    if num_bytes >= 10**6:
        return f"{num_bytes / 10**6:.0f} MB"
    return f"{-(-num_bytes // 1000)} kB"
