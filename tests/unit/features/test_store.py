"""Feature files: missing, damaged and foreign segments are computed again, and only those."""

import fcntl
import json
import os
import re
import resource
import subprocess
import time
from pathlib import Path

import pytest
import torch
from feature_builder import KEY, ROWS_PER_SEGMENT, WIDTH, expected, feature_file, rows_of
from support import fork_server
from support.processes import REPOSITORY

from agnews_dist.features import store
from agnews_dist.features.eviction import IN_USE, ROWS, VERIFIED, mark_path, remove
from agnews_dist.features.store import FeatureFile
from agnews_dist.storage import locks

NUM_SEGMENTS = 6
SEGMENT_BYTES = ROWS_PER_SEGMENT * WIDTH * 4


def fill(file: FeatureFile, *, rank: int = 0, num_ranks: int = 1) -> list[int]:
    """Complete the file; return the segments that were computed."""
    computed: list[int] = []

    def compute(segment: int) -> torch.Tensor:
        computed.append(segment)
        return rows_of(segment)

    reported: list[int] = []
    file.allocate()
    file.make_worker(compute, rank=rank, num_ranks=num_ranks, on_segment=reported.append)()
    assert sorted(reported) == list(range(file.num_segments)), "each segment was reported once"
    return computed


@pytest.fixture
def built(tmp_path) -> Path:
    directory = tmp_path / KEY
    file = feature_file(directory, NUM_SEGMENTS)
    assert not file.is_complete
    assert sorted(fill(file)) == list(range(NUM_SEGMENTS))
    assert torch.equal(file.map_rows(), expected(NUM_SEGMENTS))
    file.close()
    return directory


def test_worker_computes_nothing_for_a_complete_file(built):
    file = feature_file(built, NUM_SEGMENTS)
    assert file.is_complete
    assert file.finished_segments == frozenset(range(NUM_SEGMENTS))
    before = (built / ROWS).stat().st_mtime_ns
    assert fill(file) == []
    assert (built / ROWS).stat().st_mtime_ns == before
    assert torch.equal(file.map_rows(), expected(NUM_SEGMENTS))
    assert json.loads((built / "about.json").read_text())["bytes"] == NUM_SEGMENTS * SEGMENT_BYTES


def flip_bit(directory: Path, position: int) -> None:
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


def truncate(directory: Path) -> None:
    os.truncate(directory / ROWS, 4 * SEGMENT_BYTES + 10)


DAMAGES = {
    "a bit flipped": (lambda directory: flip_bit(directory, 2 * SEGMENT_BYTES + 5), [2]),
    "the last bit flipped": (lambda directory: flip_bit(directory, NUM_SEGMENTS * SEGMENT_BYTES - 1), [5]),
    "two segments": (lambda directory: [flip_bit(directory, 0), flip_bit(directory, 3 * SEGMENT_BYTES)], [0, 3]),
    "truncated": (truncate, [4, 5]),
    "rows missing": (lambda directory: (directory / ROWS).unlink(), [0, 1, 2, 3, 4, 5]),
    "mark missing": (lambda directory: mark_path(directory, 3).unlink(), [3]),
    "mark empty": (lambda directory: mark_path(directory, 3).write_text(""), [3]),
    "mark half written": (lambda directory: mark_path(directory, 3).write_text("0123"), [3]),
    "mark not text": (lambda directory: mark_path(directory, 3).write_bytes(b"\xff" * 64), [3]),
    "mark of zeros": (lambda directory: mark_path(directory, 3).write_text("0" * 64), [3]),
    "marks swapped": (swap_marks, [2, 4]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_worker_computes_damaged_segments_again_and_no_others(built, name):
    damage, segments = DAMAGES[name]
    damage(built)
    file = feature_file(built, NUM_SEGMENTS)
    assert sorted(fill(file)) == segments
    assert torch.equal(file.map_rows(), expected(NUM_SEGMENTS))
    file.close()
    assert fill(feature_file(built, NUM_SEGMENTS)) == []


@pytest.fixture
def verified(built, monkeypatch) -> Path:
    """A file that a later run has opened, which verifies all segments."""
    monkeypatch.setattr(store, "_RECENT_SECONDS", 0.03)
    time.sleep(0.05)
    file = feature_file(built, NUM_SEGMENTS)
    assert fill(file) == []
    file.mark_as_verified()
    file.close()
    return built


def test_file_is_not_marked_as_verified_by_its_builder_or_right_after_a_write(built, monkeypatch):
    file = feature_file(built, NUM_SEGMENTS)
    assert fill(file) == []
    file.mark_as_verified()
    monkeypatch.setattr(store, "_RECENT_SECONDS", 0.0)
    mark_path(built, 1).unlink()
    file = feature_file(built, NUM_SEGMENTS)
    assert fill(file) == [1]
    file.mark_as_verified()
    assert not (built / VERIFIED).exists()


def test_worker_reads_no_rows_of_a_file_that_is_as_it_was_verified(verified, monkeypatch):
    built = verified
    with monkeypatch.context() as patch:
        patch.setattr(FeatureFile, "read_segment", lambda *_: pytest.fail("rows were read"))
        assert fill(feature_file(built, NUM_SEGMENTS)) == []
    # Times that were set back, as by a restored backup, are no proof.
    before = (built / ROWS).stat()
    flip_bit(built, 0)
    os.utime(built / ROWS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fill(feature_file(built, NUM_SEGMENTS)) == [0]


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in ("mark of zeros", "marks swapped")])
def test_worker_notices_damage_after_the_file_was_verified(verified, name):
    damage, segments = DAMAGES[name]
    damage(verified)
    time.sleep(0.05)
    file = feature_file(verified, NUM_SEGMENTS)
    assert sorted(fill(file)) == segments
    file.mark_as_verified()
    assert torch.equal(file.map_rows(), expected(NUM_SEGMENTS))
    assert fill(feature_file(verified, NUM_SEGMENTS)) == []


def test_file_that_changes_under_a_trusting_worker_is_verified_next_time(verified):
    file = feature_file(verified, NUM_SEGMENTS)
    assert fill(file) == []
    flip_bit(verified, 0)
    time.sleep(0.05)
    file.mark_as_verified()
    assert fill(feature_file(verified, NUM_SEGMENTS)) == [0]


def test_workers_of_all_ranks_verify_every_segment(built):
    for segment in range(NUM_SEGMENTS):
        flip_bit(built, segment * SEGMENT_BYTES)
    for rank in range(3):
        assert sorted(fill(feature_file(built, NUM_SEGMENTS), rank=rank, num_ranks=3)) == [rank, rank + 3]
    assert torch.equal(feature_file(built, NUM_SEGMENTS).map_rows(), expected(NUM_SEGMENTS))


def test_read_segment_rejects_rows_of_another_key(built):
    """The same bytes under another key, for example of an older model, are all computed again."""
    other = feature_file(built, NUM_SEGMENTS, key="b" * 64)
    assert other.read_segment(0) is None
    assert feature_file(built, NUM_SEGMENTS).read_segment(0) is not None
    assert sorted(fill(other)) == list(range(NUM_SEGMENTS))


def test_worker_extends_a_file_with_fewer_segments(built):
    larger = feature_file(built, NUM_SEGMENTS + 2)
    assert not larger.is_complete
    assert sorted(fill(larger)) == [NUM_SEGMENTS, NUM_SEGMENTS + 1]
    assert torch.equal(larger.map_rows(), expected(NUM_SEGMENTS + 2))


def test_map_rows_returns_bf16_bits_unchanged(tmp_path):
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    file = FeatureFile(tmp_path / KEY, key=KEY, bounds_S=[0, 3, 8], width=4, dtype=torch.bfloat16, about={})
    file.allocate()
    file.make_worker(lambda segment: rows[[0, 3][segment] : [3, 8][segment]])()
    assert torch.equal(file.map_rows(), rows)


def test_lock_protects_a_file_from_removal(built):
    reader = feature_file(built, NUM_SEGMENTS)
    rows = reader.map_rows()
    assert not remove(built)
    assert reader.is_complete
    reader.close()
    assert remove(built)
    assert not built.exists()
    assert torch.equal(rows, expected(NUM_SEGMENTS)), "mapped rows stay readable"


def test_worker_stops_at_an_error_and_keeps_finished_segments(tmp_path):
    file = feature_file(tmp_path / KEY, NUM_SEGMENTS)
    file.allocate()

    def compute(segment: int) -> torch.Tensor:
        if segment == 3:
            raise OSError(28, "No space left on device")
        return rows_of(segment)

    work = file.make_worker(compute)
    with pytest.raises(OSError, match="No space left"):
        work()
    work()  # as another thread would: it returns without computing
    assert file.finished_segments == {0, 1, 2}
    assert sorted(fill(feature_file(tmp_path / KEY, NUM_SEGMENTS))) == [3, 4, 5]


@pytest.mark.slow
def test_worker_does_not_wait_for_a_process_that_shows_no_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SPEAK_SECONDS", 0.3)
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.5)
    lines: list[str] = []
    file = feature_file(tmp_path / KEY, NUM_SEGMENTS)
    file._say = lines.append
    file.allocate()
    with mark_path(tmp_path / KEY, 2).open("w+b", buffering=0) as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        mark.write(b"process 1 on elsewhere\n")
        with pytest.raises(OSError, match=r"process 1 on elsewhere, which has the lock .*marks/00002, shows no sign of life"):
            fill(file)
        assert file.finished_segments == {0, 1, 3, 4, 5}
        assert re.match(rf"features {KEY[:12]}: process 1 on elsewhere has the lock .*marks/00002, waited for", lines[0])
    assert fill(feature_file(tmp_path / KEY, NUM_SEGMENTS)) == [2], "its unfinished mark is no checksum"


def test_allocate_fails_on_a_full_disk_before_any_work(tmp_path):
    """Imitate a full disk by a limit on the size of files."""
    file, before = feature_file(tmp_path / KEY, NUM_SEGMENTS), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_SEGMENTS * SEGMENT_BYTES - 1, before[1]))
    try:
        with pytest.raises(OSError, match=r"\[Errno 27\]|File too large"):
            file.allocate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / KEY / ROWS).stat().st_size == 0, "no space stays reserved"
    assert file.finished_segments == frozenset()
    assert sorted(fill(file)) == list(range(NUM_SEGMENTS))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_worker_on_a_full_disk_and_on_a_read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    script = """
import sys, torch
from pathlib import Path
from feature_builder import feature_file, expected
from test_store import fill
directory, num_segments = Path(sys.argv[1]), int(sys.argv[2])
file = feature_file(directory, num_segments)
try:
    print(fill(file), torch.equal(file.map_rows(), expected(num_segments)))
except OSError as error:
    print(error.strerror)
"""

    def run(num_segments: int) -> str:
        paths = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "unit" / "features", REPOSITORY / "tests" / "ranks"]
        path = ":".join(map(str, paths))
        return fork_server.run_python("-c", script, str(disk / KEY), str(num_segments), PYTHONPATH=path).stdout.strip()

    try:
        assert run(1000) == "No space left on device"
        assert (disk / KEY / ROWS).stat().st_blocks == 0
        assert run(6) == "[0, 1, 2, 3, 4, 5] True"
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert run(6) == "[] True", "a complete cache of another user can be read"
        assert (disk / KEY / IN_USE).exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
