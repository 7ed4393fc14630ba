"""Background writer: the caller never waits for a pipe that is not read, and what is written keeps its order."""

import os
import select
import threading
import time
from functools import partial

import pytest

from agnews_dist.storage import background
from agnews_dist.storage.background import BackgroundWriter


@pytest.fixture
def pipe():
    """Both ends of a pipe that holds 64 kB."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read_all(end: int, until: bytes) -> bytes:
    """Read up to `until`, or to a pause of seconds: then the writer has no more."""
    content = b""
    while not content.endswith(until) and select.select([end], [], [], 10)[0]:
        content += os.read(end, 1 << 16)
    return content


def test_everything_is_written_in_order(pipe) -> None:
    writer = BackgroundWriter(partial(os.write, pipe[1]))
    for number in range(1000):
        writer.put(b"%d\n" % number)
    assert writer.close(60)
    assert read_all(pipe[0], b"999\n") == b"".join(b"%d\n" % number for number in range(1000))
    assert (writer.num_pending, writer.num_bytes) == (0, writer.num_written)


def test_nothing_waits_for_a_pipe_that_is_not_read_and_the_last_lines_survive(pipe) -> None:
    gaps: list[int] = []

    def describe(number: int) -> bytes:
        gaps.append(number)
        return b"gap\n"

    writer = BackgroundWriter(partial(os.write, pipe[1]), keep_bytes=10_000, describe_gap=describe)
    begin = time.monotonic()
    for number in range(20_000):
        writer.put(b"line %05d\n" % number)
        writer.settle()
    # One moment of patience, not 20,000.
    assert time.monotonic() - begin < background.IMPATIENT_SECONDS
    assert 0 < writer.num_pending <= 10_000 + (1 << 17), "what the thread holds, and what waits"
    assert writer.seconds_behind > 0
    assert not writer.wait(0.01)
    lines = read_all(pipe[0], b"line 19999\n").splitlines()
    assert lines[-1] == b"line 19999"
    assert writer.close(60)
    (place,) = [i for i, line in enumerate(lines) if line == b"gap"]
    shown = [int(line[5:]) for line in lines if line != b"gap"]
    assert gaps == [20_000 - len(shown)]
    assert shown == [*range(place), *range(place + gaps[0], 20_000)]


def test_failed_writes_are_tried_again_and_half_written_ones_completed() -> None:
    written, fails = bytearray(), threading.Event()
    fails.set()

    def write(content: bytes) -> int:
        if fails.is_set():
            raise OSError(28, "No space left on device")
        written.extend(content[:3])
        return min(3, len(content))

    writer = BackgroundWriter(write)
    writer.put(b"first\n")
    assert not writer.wait(60)
    assert writer.error is not None
    assert writer.error.strerror == "No space left on device"
    fails.clear()
    writer.put(b"second\n")
    assert writer.close(60)
    assert written == b"first\nsecond\n"
    assert writer.error is None
    writer.put(b"after close\n")
    assert writer.num_pending == 0
