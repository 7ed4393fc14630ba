"""A real file system that is full, or read-only: the error comes through, and the checkpoint before it still loads."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

from support.processes import REPOSITORY, environment

MOUNT = 'mount -t tmpfs -o size=16m tmpfs "$1" && shift && exec "$@"'


def test_what_does_not_fit_leaves_what_is_there(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # In a namespace of its own: nothing stays mounted, however the process ends. Who is not root becomes it there.
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    program = [sys.executable, str(Path(__file__).with_name("full_disk.py")), str(disk)]
    done = subprocess.run(
        [*alone, "sh", "-c", MOUNT, "sh", str(disk), *program],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    full, read_only = errno.ENOSPC, errno.EROFS
    expected = {
        "first": (None, 1, [1]),
        "too large": (full, 1, [1]),
        "beside it": (None, 3, [1, 3]),
        "full": (full, 3, [1, 3]),
        "replacing what is there": (full, 3, [1, 3]),
        "after space is freed": (None, 5, [3, 5]),
        "read-only": (read_only, 5, [3, 5]),
        "still read-only": (read_only, 5, [3, 5]),
        "writable again": (None, 6, [5, 6]),
    }
    told = {what: (error, seen) for what, error, seen in json.loads(done.stdout)}
    assert told.keys() == expected.keys()
    for what, (error, newest, steps) in expected.items():
        names = [f"step-{step:08d}" for step in steps]
        seen = {"first and last": [newest, newest], "warnings": [], "names": names}
        assert told[what] == (error, seen), what
    assert list(disk.iterdir()) == [], "it was another file system"
