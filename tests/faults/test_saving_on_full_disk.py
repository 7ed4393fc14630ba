"""Saving to a full or read-only file system raises the error, and the previous checkpoint still loads."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

from support.processes import REPOSITORY, TIMEOUT, environment

MOUNT = 'mount -t tmpfs -o size=16m tmpfs "$1" && shift && exec "$@"'


def test_save_without_space_keeps_the_existing_checkpoints(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # A namespace of its own: nothing stays mounted, however the process ends. Other users become root in it.
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    program = [sys.executable, str(Path(__file__).with_name("save_on_full_disk.py")), str(disk)]
    done = subprocess.run(
        [*alone, "sh", "-c", MOUNT, "sh", str(disk), *program],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    full, read_only = errno.ENOSPC, errno.EROFS
    expected = {
        "first": (None, 1, [1]),
        "too large": (full, 1, [1]),
        "second": (None, 3, [1, 3]),
        "full": (full, 3, [1, 3]),
        "replacing an existing one": (full, 3, [1, 3]),
        "after space is freed": (None, 5, [3, 5]),
        "read-only": (read_only, 5, [3, 5]),
        "still read-only": (read_only, 5, [3, 5]),
        "writable again": (None, 6, [5, 6]),
    }
    outcomes = {what: (error, seen) for what, error, seen in json.loads(done.stdout)}
    assert outcomes.keys() == expected.keys()
    for what, (error, newest, steps) in expected.items():
        names = [f"step-{step:08d}" for step in steps]
        seen = {"first and last": [newest, newest], "warnings": [], "names": names}
        assert outcomes[what] == (error, seen), what
    assert list(disk.iterdir()) == [], "the saves went to another file system"
