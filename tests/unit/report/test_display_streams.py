"""Standard streams of a command: not read, closed in the middle, closed from the start."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import TIMEOUT, environment

PRINT = """
import sys, time
from agnews_dist.report.display_streams import background_streams, open_missing_streams

open_missing_streams()
with background_streams("stdout", "stderr"):
    for number in range(int(sys.argv[1])):
        print("line", number, flush=True)
        print("error", number, file=sys.stderr, flush=True)
    print("result", flush=True)
    open(sys.argv[2], "w").write("done")
    if len(sys.argv) > 3:
        # Its reader begins to read now.
        time.sleep(1)
"""


def start(tmp_path: Path, number: int, *more: str, **streams: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PRINT, str(number), str(tmp_path / "done"), *more]
    return subprocess.Popen(command, env=environment(), **streams)  # type: ignore[call-overload]


def test_lines_of_both_streams_keep_their_order_in_one_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert start(tmp_path, 100, stdout=log, stderr=subprocess.STDOUT).wait(TIMEOUT) == 0
    expected = [f"{kind} {number}" for number in range(100) for kind in ("line", "error")]
    assert (tmp_path / "log").read_text().splitlines() == [*expected, "result"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_output_that_is_not_read_delays_nothing_and_says_how_many_lines_are_missing(tmp_path: Path, kind: str) -> None:
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    process = start(tmp_path, 20_000, "wait", stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    # A terminal holds 4 kB, a pipe 64 kB: the process is at its end before anything is read.
    while process.poll() is None and not (tmp_path / "done").exists():
        pass
    content = b""
    while True:
        try:
            chunk = os.read(ours, 1 << 16)
        except OSError:  # Linux reports the other end of a terminal that is closed this way
            break
        if not chunk:
            break
        content += chunk
    os.close(ours)
    assert process.wait(TIMEOUT) == 0
    lines = [line for line in content.decode().split() if line]
    shown = content.decode().count("line ")
    (missing,) = [line for line in content.decode().splitlines() if "missing here" in line]
    assert missing == f"... {20_000 - shown:,} lines of this output are missing here: it was not read for a while"
    assert lines[-2:] == ["19999", "result"], "the last lines are those that count"


@pytest.mark.slow
def test_reader_that_is_gone_and_closed_streams_are_silent(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = start(tmp_path, 2000, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    errors = process.communicate(timeout=TIMEOUT)[1].decode().splitlines()
    assert process.returncode == 0
    assert errors == [f"error {number}" for number in range(2000)]
    assert (tmp_path / "done").read_text() == "done"
    for closed in (">&-", "2>&-", ">&- 2>&- <&-"):
        (tmp_path / "done").unlink()
        command = f'exec "$@" {closed}'
        words = ["bash", "-c", command, "-", sys.executable, "-c", PRINT, "3", str(tmp_path / "done")]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=True)
        # The number of a closed stream is not that of the next file, which would get its lines.
        assert (tmp_path / "done").read_text() == "done", closed
        assert ("Traceback" in done.stderr, "result" in done.stdout) == (False, closed == "2>&-")
