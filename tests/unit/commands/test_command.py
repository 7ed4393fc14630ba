"""Frame around commands: imports without garbage collection, crashes with a place."""

import gc
import signal
from pathlib import Path

import pytest
from support import fork_server

from agnews_dist.commands.command import importing


def test_importing_pauses_garbage_collection_and_excludes_what_was_imported() -> None:
    def import_and_fail() -> None:
        with importing():
            assert not gc.isenabled()
            raise ImportError

    before = gc.get_freeze_count()
    with pytest.raises(ImportError):
        import_and_fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


TRUNCATED_MAPPING = """
import faulthandler, mmap, os, sys
from agnews_dist.commands.arguments import Command
from agnews_dist.commands.command import run_command

def read_mapped_file(world, loaded):
    with open(sys.argv[1], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        os.truncate(sys.argv[1], 0)
        print(mapped[5000])

faulthandler.disable()  # the tests' own processes enable it
run_command(Command("train", "Train.", ()), [], read_mapped_file)
"""


def test_mapped_file_that_is_truncated_ends_the_process_with_the_place_that_read_it(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"x" * 8192)
    done = fork_server.run_python("-c", TRUNCATED_MAPPING, str(tmp_path / "model"), check=False)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr
    assert "read_mapped_file" in done.stderr
