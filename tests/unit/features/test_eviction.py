"""The feature caches below one directory: listing, eviction of the least recently used, protection of those in use."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.processes import TIMEOUT, environment, python

from agnews_dist.features import eviction
from agnews_dist.features.eviction import CacheEntry, evict, list_caches, remove
from agnews_dist.features.store import FeatureFile

ROWS = 4096
CACHE_BYTES = ROWS * 8 * 4
"""Size of the rows; a cache has some other small files."""
SLACK_BYTES = 32 << 10
READER = """
import sys
from pathlib import Path
import torch
from agnews_dist.features.store import FeatureFile
path = Path(sys.argv[1])
file = FeatureFile(path, key=path.name, bounds_S=[0, 4096], width=8, dtype=torch.float32, about={})
rows = file.map_rows()
print("reading", flush=True)
sys.stdin.readline()
print(float(rows.sum()), flush=True)
"""


def key(number: int) -> str:
    return f"{number:064x}"


def build_cache(root: Path, number: int, *, last_used: float, is_complete: bool = True) -> FeatureFile:
    """Build a cache that no process uses."""
    about = {"model": "gpt2", "texts": 3}
    bounds = [0, ROWS // 2, ROWS]
    file = FeatureFile(root / key(number), key=key(number), bounds_S=bounds, width=8, dtype=torch.float32, about=about)
    file.allocate()
    if is_complete:
        file.make_worker(lambda segment: torch.ones(ROWS // 2, 8))()
    file.close()
    os.utime(file.directory / "in-use", (last_used, last_used))
    return file


def numbers(caches: list[CacheEntry]) -> list[int]:
    return [int(cache.key, 16) for cache in caches]


@contextmanager
def reader_of(path: Path):
    """Yield a process that reads the cache."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout.readline() == "reading\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_list_caches_gives_state_size_and_last_use(tmp_path):
    build_cache(tmp_path, 1, last_used=3000)
    build_cache(tmp_path, 2, last_used=1000, is_complete=False)
    file = build_cache(tmp_path, 3, last_used=2000)
    (tmp_path / "notes").mkdir()
    (tmp_path / key(9)).write_text("a file")
    found = list_caches(tmp_path)
    assert numbers(found) == [2, 3, 1]
    assert [(each.is_complete, each.is_used, each.last_used) for each in found] == [
        (False, False, 1000),
        (True, False, 2000),
        (True, False, 3000),
    ]
    assert {each.about["model"] for each in found} == {"gpt2"}
    assert all(CACHE_BYTES <= each.disk_bytes <= CACHE_BYTES + SLACK_BYTES for each in found)
    file.lock()
    [used] = [each for each in list_caches(tmp_path) if each.is_used]
    assert used.path == file.directory
    file.close()
    assert not any(each.is_used for each in list_caches(tmp_path))
    assert list_caches(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"segments": "two"}'])
def test_list_caches_lists_an_unreadable_description_as_unfinished(tmp_path, content):
    file = build_cache(tmp_path, 1, last_used=1000)
    [before] = list_caches(tmp_path)
    assert before.is_complete
    (file.directory / "about.json").write_bytes(content)
    [entry] = list_caches(tmp_path)
    assert not entry.is_complete
    assert entry.disk_bytes > CACHE_BYTES


def test_evict_removes_the_least_recently_used_first(tmp_path):
    for number, last_used in ((1, 3000), (2, 1000), (3, 2000)):
        build_cache(tmp_path, number, last_used=last_used)
    total = sum(each.disk_bytes for each in list_caches(tmp_path))
    assert evict(tmp_path, 1000, total + 1000) == []
    assert numbers(evict(tmp_path, 1000, total + 999)) == [2]
    assert numbers(list_caches(tmp_path)) == [3, 1]
    # A cache to keep counts with the bytes it will need, not with its present size.
    assert numbers(evict(tmp_path, CACHE_BYTES, CACHE_BYTES + SLACK_BYTES, keep={key(3)})) == [1]
    assert numbers(list_caches(tmp_path)) == [3]


def test_evict_removes_nothing_if_the_space_is_not_enough_anyway(tmp_path):
    for number in (1, 2):
        build_cache(tmp_path, number, last_used=1000 + number)
    message = r"2 MB and 0 kB of caches in use exceed engine.feature_cache_gigabytes \(1 MB\)"
    with pytest.raises(OSError, match=message):
        evict(tmp_path, 2_000_000, 1_000_000)
    assert numbers(list_caches(tmp_path)) == [1, 2]
    # The control: with a higher limit both are removed.
    assert numbers(evict(tmp_path, 2_000_000, 2_000_000)) == [1, 2]


@pytest.mark.slow
def test_evict_keeps_a_cache_that_another_process_reads(tmp_path):
    for number in (1, 2):
        build_cache(tmp_path, number, last_used=1000 + number)
    with reader_of(tmp_path / key(1)) as reader:
        os.utime(tmp_path / key(1) / "in-use", (0, 0))  # the least recently used
        assert numbers([each for each in list_caches(tmp_path) if each.is_used]) == [1]
        assert not remove(tmp_path / key(1))
        assert numbers(evict(tmp_path, 0, CACHE_BYTES + SLACK_BYTES)) == [2]
        with pytest.raises(OSError, match="of caches in use"):
            evict(tmp_path, 0, CACHE_BYTES)
        reader.stdin.write("continue\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == f"{float(ROWS * 8)}\n"
        reader.wait(timeout=TIMEOUT)
    assert remove(tmp_path / key(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_remove_takes_a_cache_whose_reader_was_killed(tmp_path):
    build_cache(tmp_path, 1, last_used=1000)
    with reader_of(tmp_path / key(1)) as reader:
        assert not remove(tmp_path / key(1))
        reader.kill()
        reader.wait(timeout=TIMEOUT)
        assert remove(tmp_path / key(1))


def test_mapped_rows_stay_readable_after_removal(tmp_path):
    file = build_cache(tmp_path, 1, last_used=1000)
    rows = file.map_rows()
    file.close()
    assert remove(file.directory)
    assert float(rows.sum()) == ROWS * 8


def test_evict_finishes_removals_that_were_killed(tmp_path):
    build_cache(tmp_path, 1, last_used=1000)
    leftover = tmp_path / ".trash-0123"
    (leftover / "marks").mkdir(parents=True)
    (leftover / "rows.bin").write_bytes(bytes(1000))
    assert numbers(list_caches(tmp_path)) == [1]
    evict(tmp_path, 0, 10 * CACHE_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == [key(1)]


def test_remove_of_a_missing_cache_succeeds(tmp_path):
    assert remove(tmp_path / key(1))


def test_eviction_loads_no_torch():
    code = "import sys, agnews_dist.features.eviction\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    assert python("-c", code).stdout == "False False\n"


def test_job_directory_survives_two_jobs_that_sweep_at_once(tmp_path, monkeypatch):
    """A directory that this job lists may be removed by the other before this job looks inside."""
    root = tmp_path / f"agnews_dist-{os.getuid()}"
    for job in ("one", "other"):
        (root / job / key(1)).mkdir(parents=True)

    def remove_while_another_sweeps(leftover: Path) -> bool:
        for job in ("one", "other"):
            if job != leftover.parent.name:
                shutil.rmtree(root / job, ignore_errors=True)
        return remove(leftover)

    monkeypatch.setattr(eviction, "remove", remove_while_another_sweeps)
    assert eviction.job_directory(tmp_path, "own", sweep=True) == root / "own"
    assert not list(root.iterdir())
