"""The process that holds a lock: who it is, and whether it still works."""

import errno
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

_OWNER = re.compile(rb"process (\d+) on (\S+)\n")
_LOCKS = Path("/proc/locks")
"""Locks of processes on this machine: `1: FLOCK  ADVISORY  WRITE 4711 fe:01:131 0 EOF`."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lock, as far as this process can see it."""

    pid: int | None
    """None: unknown."""
    host: str
    beat: float
    """Modification time of the lock file, which a living holder renews."""

    @property
    def name(self) -> str:
        """Name for messages: `process 4711 on node3`."""
        return "another process" if self.pid is None else f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """True if it runs on this host, so that its state can be read."""
        return self.pid is not None and self.host == socket.gethostname()

    @property
    def is_suspended(self) -> bool:
        """True if it is stopped: by Ctrl-Z, SIGSTOP or Slurm."""
        return self.is_here and _read_state(self.pid) in ("T", "t")

    @property
    def is_dead(self) -> bool:
        """True if it ran on this host and has ended."""
        return self.is_here and _read_state(self.pid) in ("", "Z", "X")


class StuckHolder(OSError):  # noqa: N818
    """The holder of a lock is suspended or shows no sign of life. `strerror` names it."""

    def __init__(self, holder: Holder, path: Path) -> None:
        state = "is suspended" if holder.is_suspended else "shows no sign of life"
        super().__init__(errno.EBUSY, f"{holder.name}, which has the lock {path}, {state}")
        self.holder = holder


def find_holder(path: Path) -> Holder:
    """Return the holder of a lock on `path`: the process that its file names, or the one that the kernel lists."""
    try:
        with path.open("rb") as file:  # opened again: a network file system then asks its server for the time
            status, match = os.fstat(file.fileno()), _OWNER.match(file.read(200))
    except OSError:
        return Holder(None, "", 0.0)
    if match:
        return Holder(int(match[1]), match[2].decode(errors="replace"), status.st_mtime)
    return Holder(_find_in_kernel(status), socket.gethostname(), status.st_mtime)


def _find_in_kernel(status: os.stat_result) -> int | None:
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        entries = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return None
    pids = [int(entry[4]) for entry in entries if len(entry) > 5 and entry[3] == "WRITE" and entry[5] == device]
    return next((pid for pid in pids if pid > 0), None)


def _read_state(pid: int | None) -> str:
    """Return the state of a process of this host as one letter (proc(5)); empty: it has ended, or /proc cannot tell."""
    try:
        # The name before the state is in brackets and may have any characters.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "" if Path("/proc/self/stat").exists() else "?"
