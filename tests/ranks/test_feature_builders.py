"""Independent processes build one feature file together, are killed, and continue it."""

import random
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from feature_builder import expected, feature_file
from support import fork_server
from support.processes import REPOSITORY, TIMEOUT, environment

BUILDER = str(REPOSITORY / "tests" / "ranks" / "feature_builder.py")
NUM_SEGMENTS = 40


def start(directory: Path, log: Path, *, seconds: float = 0.02, threads: int = 1) -> BaseProcess:
    arguments = [str(directory), str(NUM_SEGMENTS), str(seconds), str(threads), str(log)]
    output = directory.with_name("output")
    return fork_server.start([BUILDER, *arguments], environment(), fork_server.Streams(output, output))


def finish(directory: Path, builder: BaseProcess) -> None:
    builder.join(TIMEOUT)
    fork_server.abort(builder)
    assert builder.exitcode == 0, directory.with_name("output").read_text()


def computed(log: Path) -> list[tuple[int, int]]:
    """Return (pid, segment) of every computed segment, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), int(segment)) for pid, segment in map(str.split, lines)]


def wait_for(log: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(computed(log)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_complete(directory: Path) -> None:
    file = feature_file(directory, NUM_SEGMENTS)
    assert file.is_complete
    assert torch.equal(file.map_rows(), expected(NUM_SEGMENTS))
    assert all(file.read_segment(segment) is not None for segment in range(NUM_SEGMENTS)), "every checksum matches"
    file.close()


@pytest.mark.parametrize(("num_builders", "threads"), [(1, 3), (3, 1), (2, 2)])
def test_concurrent_builders_share_the_work(tmp_path, num_builders, threads):
    directory, log = tmp_path / ("a" * 64), tmp_path / "log"
    builders = [start(directory, log, seconds=0.05, threads=threads) for _ in range(num_builders)]
    for builder in builders:
        finish(directory, builder)
    assert_complete(directory)
    found = computed(log)
    assert Counter(segment for _, segment in found) == Counter(range(NUM_SEGMENTS)), "each segment is computed once"
    if num_builders > 1:
        assert len({pid for pid, _ in found}) == num_builders, "every builder computed some"


def test_killed_builder_loses_no_finished_segment(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    directory, log = tmp_path / ("a" * 64), tmp_path / "log"
    num_kills = 5
    for _ in range(num_kills):
        builder = start(directory, log)
        wait_for(log, len(computed(log)) + rng.randint(1, 5))
        time.sleep(rng.random() * 0.03)
        builder.kill()
        builder.join()
    before = computed(log)
    assert not feature_file(directory, NUM_SEGMENTS).is_complete, "killed before the end"
    finish(directory, start(directory, log))
    assert_complete(directory)
    again = Counter(segment for _, segment in computed(log))
    assert set(again) == set(range(NUM_SEGMENTS))
    # A kill loses at most the segment that was being written.
    assert sum(again.values()) - NUM_SEGMENTS <= num_kills
    assert len(before) > num_kills


def test_living_builder_takes_over_the_segment_of_a_killed_one(tmp_path):
    directory, log = tmp_path / ("a" * 64), tmp_path / "log"
    stuck = start(directory, log, seconds=1000)
    while not (directory / "marks" / "00000").exists():
        time.sleep(0.01)
    living = start(directory, log)
    wait_for(log, NUM_SEGMENTS - 1)
    time.sleep(0.3)
    assert living.exitcode is None, "it waits for the segment that the other has locked"
    assert not feature_file(directory, NUM_SEGMENTS).is_complete
    stuck.kill()
    stuck.join()
    finish(directory, living)
    assert_complete(directory)
