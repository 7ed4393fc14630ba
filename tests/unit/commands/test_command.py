"""Frame around commands: imports without garbage collection, crashes with a place."""

import gc
import re
import signal
from pathlib import Path

import pytest
from support import fork_server
from support.processes import in_a_terminal, python
from support.settings import errors_of

from agnews_dist.commands import predict, train
from agnews_dist.commands.arguments import load
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


UNTIL_TORCH = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported", file=sys.stderr, flush=True)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from agnews_dist.__main__ import main
sys.exit(main(sys.argv[1:]) - 130)
"""
LOADING = "agnews_dist 0.1.0: loading PyTorch and embedded"


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare"])
def test_first_line_comes_before_torch(command: str) -> None:
    words = ["-c", UNTIL_TORCH, command, "--model.name", "embedded"]
    lines = in_a_terminal(*words, TERM="dumb").splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [LOADING, "torch is imported", "interrupted"]
    quiet = python(*words, "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "torch is imported\ninterrupted\n")


def test_first_line_of_predict_is_for_terminals_only() -> None:
    words = ["-c", UNTIL_TORCH, "predict", "--model.name", "embedded", "text"]
    assert in_a_terminal(*words, TERM="dumb").splitlines()[0].endswith(LOADING)
    piped = python(*words)
    assert (piped.stdout, piped.stderr) == ("", "torch is imported\ninterrupted\n")


def test_quiet_and_verbose_choose_the_amount_of_output() -> None:
    for words, expected in (
        ([], "normal"),
        (["--quiet"], "quiet"),
        (["--verbose"], "verbose"),
        (["--quiet", "false"], "normal"),
    ):
        assert load(words, train.COMMAND.options).verbosity == expected
    assert load(["--quiet"], predict.COMMAND.options).verbosity == "quiet"
    assert errors_of(["--quiet", "--optim.lr", "-1", "--verbose"], train.COMMAND.options) == [
        "--quiet and --verbose: they contradict each other. Remove one of them.",
        *errors_of(["--optim.lr", "-1"]),
    ]
