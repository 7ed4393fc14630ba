"""A feature file is whole, or is made whole: what is missing, damaged, foreign or of another key is computed again."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from feature_builder import KEY, ROWS_PER_SEGMENT, WIDTH, expected, feature_file, rows_of
from support.processes import REPOSITORY

from agnews_dist.features.eviction import IN_USE, ROWS, mark_path, remove
from agnews_dist.features.store import FeatureFile

NUM_SEGMENTS = 6
SEGMENT_BYTES = ROWS_PER_SEGMENT * WIDTH * 4


def fill(file: FeatureFile, *, rank: int = 0, num_ranks: int = 1) -> list[int]:
    """Fill it; the segments that were computed for that."""
    made: list[int] = []

    def compute(segment: int) -> torch.Tensor:
        made.append(segment)
        return rows_of(segment)

    done: list[int] = []
    file.allocate()
    file.worker(compute, rank=rank, num_ranks=num_ranks, done=done.append)()
    assert sorted(done) == list(range(file.num_segments)), "heard of each once"
    return made


@pytest.fixture
def built(tmp_path) -> Path:
    directory = tmp_path / KEY
    file = feature_file(directory, NUM_SEGMENTS)
    assert not file.is_complete
    assert sorted(fill(file)) == list(range(NUM_SEGMENTS))
    assert torch.equal(file.rows(), expected(NUM_SEGMENTS))
    file.close()
    return directory


def test_a_whole_file_is_reused(built):
    file = feature_file(built, NUM_SEGMENTS)
    assert file.is_complete
    assert file.found == frozenset(range(NUM_SEGMENTS))
    before = (built / ROWS).stat().st_mtime_ns
    assert fill(file) == []
    assert (built / ROWS).stat().st_mtime_ns == before
    assert torch.equal(file.rows(), expected(NUM_SEGMENTS))
    assert json.loads((built / "about.json").read_text())["bytes"] == NUM_SEGMENTS * SEGMENT_BYTES


def flip(directory: Path, position: int) -> None:
    with (directory / ROWS).open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def swap_marks(directory: Path) -> None:
    first, second = mark_path(directory, 2), mark_path(directory, 4)
    one, other = first.read_text(), second.read_text()
    first.write_text(other)
    second.write_text(one)


def cut(directory: Path) -> None:
    os.truncate(directory / ROWS, 4 * SEGMENT_BYTES + 10)


DAMAGES = {
    "a bit flipped": (lambda directory: flip(directory, 2 * SEGMENT_BYTES + 5), [2]),
    "the last bit flipped": (lambda directory: flip(directory, NUM_SEGMENTS * SEGMENT_BYTES - 1), [5]),
    "two segments": (lambda directory: [flip(directory, 0), flip(directory, 3 * SEGMENT_BYTES)], [0, 3]),
    "cut off": (cut, [4, 5]),
    "rows gone": (lambda directory: (directory / ROWS).unlink(), [0, 1, 2, 3, 4, 5]),
    "mark gone": (lambda directory: mark_path(directory, 3).unlink(), [3]),
    "mark empty": (lambda directory: mark_path(directory, 3).write_text(""), [3]),
    "mark half written": (lambda directory: mark_path(directory, 3).write_text("0123"), [3]),
    "mark no text": (lambda directory: mark_path(directory, 3).write_bytes(b"\xff" * 64), [3]),
    "mark of zeros": (lambda directory: mark_path(directory, 3).write_text("0" * 64), [3]),
    "marks swapped": (swap_marks, [2, 4]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_only_it_is_computed_again(built, name):
    damage, segments = DAMAGES[name]
    damage(built)
    file = feature_file(built, NUM_SEGMENTS)
    assert sorted(fill(file)) == segments
    assert torch.equal(file.rows(), expected(NUM_SEGMENTS))
    file.close()
    assert fill(feature_file(built, NUM_SEGMENTS)) == []


def test_each_rank_checks_its_part_and_all_parts_together_are_everything(built):
    for segment in range(NUM_SEGMENTS):
        flip(built, segment * SEGMENT_BYTES)
    for rank in range(3):
        assert sorted(fill(feature_file(built, NUM_SEGMENTS), rank=rank, num_ranks=3)) == [rank, rank + 3]
    assert torch.equal(feature_file(built, NUM_SEGMENTS).rows(), expected(NUM_SEGMENTS))


def test_features_of_another_key_do_not_pass(built):
    """The same bytes under another key, as of an older model: every one is computed again."""
    other = feature_file(built, NUM_SEGMENTS, key="b" * 64)
    assert other.read(0) is None
    assert feature_file(built, NUM_SEGMENTS).read(0) is not None
    assert sorted(fill(other)) == list(range(NUM_SEGMENTS))


def test_another_number_of_rows_does_not_pass(built):
    larger = feature_file(built, NUM_SEGMENTS + 2)
    assert not larger.is_complete
    assert sorted(fill(larger)) == [NUM_SEGMENTS, NUM_SEGMENTS + 1]
    assert torch.equal(larger.rows(), expected(NUM_SEGMENTS + 2))


def test_bf16_rows_keep_their_bits(tmp_path):
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    file = FeatureFile(tmp_path / KEY, key=KEY, bounds_S=[0, 3, 8], width=4, dtype=torch.bfloat16, about={})
    file.allocate()
    file.worker(lambda segment: rows[[0, 3][segment] : [3, 8][segment]])()
    assert torch.equal(file.rows(), rows)


def test_what_is_in_use_is_not_removed(built):
    reader = feature_file(built, NUM_SEGMENTS)
    rows = reader.rows()
    assert not remove(built)
    assert reader.is_complete
    reader.close()
    assert remove(built)
    assert not built.exists()
    assert torch.equal(rows, expected(NUM_SEGMENTS)), "what is mapped stays"


def test_an_error_while_computing_ends_all_workers_and_keeps_what_is_done(tmp_path):
    file = feature_file(tmp_path / KEY, NUM_SEGMENTS)
    file.allocate()

    def compute(segment: int) -> torch.Tensor:
        if segment == 3:
            raise OSError(28, "No space left on device")
        return rows_of(segment)

    work = file.worker(compute)
    with pytest.raises(OSError, match="No space left"):
        work()
    work()  # another thread of the same process: ends without working on
    assert file.found == {0, 1, 2}
    assert sorted(fill(feature_file(tmp_path / KEY, NUM_SEGMENTS))) == [3, 4, 5]


def test_a_lack_of_space_shows_before_any_work(tmp_path):
    """A limit on the size of files stands for a full disk."""
    file, before = feature_file(tmp_path / KEY, NUM_SEGMENTS), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_SEGMENTS * SEGMENT_BYTES - 1, before[1]))
    try:
        with pytest.raises(OSError, match=r"\[Errno 27\]|File too large"):
            file.allocate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / KEY / ROWS).stat().st_size == 0, "nothing half reserved"
    assert file.found == frozenset()
    assert sorted(fill(file)) == list(range(NUM_SEGMENTS))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_full_disk_and_a_read_only_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    script = """
import sys, torch
from pathlib import Path
from feature_builder import feature_file, expected
from test_feature_files import fill
directory, num_segments = Path(sys.argv[1]), int(sys.argv[2])
file = feature_file(directory, num_segments)
try:
    print(fill(file), torch.equal(file.rows(), expected(num_segments)))
except OSError as error:
    print(error.strerror)
"""

    def run(num_segments: int) -> str:
        paths = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "unit", REPOSITORY / "tests" / "ranks"]
        done = subprocess.run(
            [sys.executable, "-c", script, str(disk / KEY), str(num_segments)],
            env=os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        assert run(1000) == "No space left on device"
        assert (disk / KEY / ROWS).stat().st_blocks == 0
        assert run(6) == "[0, 1, 2, 3, 4, 5] True"
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert run(6) == "[] True", "somebody else's whole cache can be used"
        assert (disk / KEY / IN_USE).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
