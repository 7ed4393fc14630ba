"""Feature caches together: the listing says what is there, room is made from the longest unused, and nothing in use goes."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.processes import environment, python

from agnews_dist.features import eviction as shelf
from agnews_dist.features.eviction import Entry, entries, make_room, remove
from agnews_dist.features.store import FeatureFile

ROWS = 4096
CACHE_BYTES = ROWS * 8 * 4
"""Of the rows alone; a cache takes some blocks more."""
SLACK = 32 << 10
USER = """
import sys
from pathlib import Path
import torch
from agnews_dist.features.store import FeatureFile
path = Path(sys.argv[1])
file = FeatureFile(path, key=path.name, bounds_S=[0, 4096], width=8, dtype=torch.float32, about={})
rows = file.rows()
print("using", flush=True)
sys.stdin.readline()
print(float(rows.sum()), flush=True)
"""


def key(number: int) -> str:
    return f"{number:064x}"


def built(root: Path, number: int, *, last_used: float, is_whole: bool = True) -> FeatureFile:
    """A cache of this number that nobody uses any more."""
    about = {"model": "gpt2", "split": "train", "texts": 3}
    bounds = [0, ROWS // 2, ROWS]
    file = FeatureFile(root / key(number), key=key(number), bounds_S=bounds, width=8, dtype=torch.float32, about=about)
    file.allocate()
    if is_whole:
        file.worker(lambda segment: torch.ones(ROWS // 2, 8))()
    file.close()
    os.utime(file.directory / "in-use", (last_used, last_used))
    return file


def numbers(caches: list[Entry]) -> list[int]:
    return [int(cache.key, 16) for cache in caches]


@contextmanager
def user_of(path: Path):
    """A process that reads the cache."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout.readline() == "using\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_listing_says_what_is_there(tmp_path):
    built(tmp_path, 1, last_used=3000)
    built(tmp_path, 2, last_used=1000, is_whole=False)
    user = built(tmp_path, 3, last_used=2000)
    (tmp_path / "somebody's notes").mkdir()
    (tmp_path / key(9)).write_text("a file")
    found = entries(tmp_path)
    assert numbers(found) == [2, 3, 1]
    assert [(each.is_complete, each.is_used, each.last_used) for each in found] == [
        (False, False, 1000),
        (True, False, 2000),
        (True, False, 3000),
    ]
    assert {each.about["model"] for each in found} == {"gpt2"}
    assert all(CACHE_BYTES <= each.disk_bytes <= CACHE_BYTES + SLACK for each in found)
    user.hold()
    [held] = [each for each in entries(tmp_path) if each.is_used]
    assert held.path == user.directory
    user.close()
    assert not any(each.is_used for each in entries(tmp_path))
    assert entries(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"segments": "two"}'])
def test_an_unreadable_description_is_listed_as_unfinished(tmp_path, content):
    file = built(tmp_path, 1, last_used=1000)
    [whole] = entries(tmp_path)
    assert whole.is_complete
    (file.directory / "about.json").write_bytes(content)
    [entry] = entries(tmp_path)
    assert not entry.is_complete
    assert entry.disk_bytes > CACHE_BYTES


def test_room_is_made_from_the_longest_unused(tmp_path):
    for number, last_used in ((1, 3000), (2, 1000), (3, 2000)):
        built(tmp_path, number, last_used=last_used)
    total = sum(each.disk_bytes for each in entries(tmp_path))
    assert make_room(tmp_path, 1000, total + 1000) == []
    assert numbers(make_room(tmp_path, 1000, total + 999)) == [2]
    assert numbers(entries(tmp_path)) == [3, 1]
    # What is to be there in the end counts with the bytes it needs, not with what it has.
    assert numbers(make_room(tmp_path, CACHE_BYTES, CACHE_BYTES + SLACK, keep={key(3)})) == [1]
    assert numbers(entries(tmp_path)) == [3]


def test_what_cannot_fit_costs_nothing(tmp_path):
    for number in (1, 2):
        built(tmp_path, number, last_used=1000 + number)
    with pytest.raises(OSError, match=r"2 MB are needed .*all feature caches may take 1 MB"):
        make_room(tmp_path, 2_000_000, 1_000_000)
    assert numbers(entries(tmp_path)) == [1, 2]
    # The control: with room for it, both go.
    assert numbers(make_room(tmp_path, 2_000_000, 2_000_000)) == [1, 2]


def test_what_another_process_uses_stays_until_that_ends(tmp_path):
    for number in (1, 2):
        built(tmp_path, number, last_used=1000 + number)
    with user_of(tmp_path / key(1)) as user:
        os.utime(tmp_path / key(1) / "in-use", (0, 0))  # the longest unused, by its time
        assert numbers([each for each in entries(tmp_path) if each.is_used]) == [1]
        assert not remove(tmp_path / key(1))
        assert numbers(make_room(tmp_path, 0, CACHE_BYTES + SLACK)) == [2]
        with pytest.raises(OSError, match="of caches in use"):
            make_room(tmp_path, 0, CACHE_BYTES)
        user.stdin.write("go on\n")
        user.stdin.flush()
        assert user.stdout.readline() == f"{float(ROWS * 8)}\n"
        user.wait(timeout=60)
    assert remove(tmp_path / key(1))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_user_protects_nothing(tmp_path):
    built(tmp_path, 1, last_used=1000)
    with user_of(tmp_path / key(1)) as user:
        assert not remove(tmp_path / key(1))
        user.kill()
        user.wait(timeout=60)
        assert remove(tmp_path / key(1))


def test_what_is_mapped_outlives_its_removal(tmp_path):
    file = built(tmp_path, 1, last_used=1000)
    rows = file.rows()
    file.close()
    assert remove(file.directory)
    assert float(rows.sum()) == ROWS * 8


def test_killed_removals_are_finished(tmp_path):
    built(tmp_path, 1, last_used=1000)
    leftover = tmp_path / ".trash-0123"
    (leftover / "marks").mkdir(parents=True)
    (leftover / "rows.bin").write_bytes(bytes(1000))
    assert numbers(entries(tmp_path)) == [1]
    make_room(tmp_path, 0, 10 * CACHE_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == [key(1)]


def test_what_is_gone_is_gone(tmp_path):
    assert remove(tmp_path / key(1))


def test_the_shelf_loads_no_torch():
    code = "import sys, agnews_dist.features.eviction\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    assert python("-c", code).stdout == "False False\n"


def test_two_jobs_that_sweep_shared_memory_at_once(tmp_path, monkeypatch):
    """What one finds, the other may have taken away when it looks inside: that is no failure of this node's memory."""
    root = tmp_path / f"agnews_dist-{os.getuid()}"
    for job in ("one", "other"):
        (root / job / key(1)).mkdir(parents=True)

    def sweeping_beside(leftover: Path) -> bool:
        for job in ("one", "other"):
            if job != leftover.parent.name:
                shutil.rmtree(root / job, ignore_errors=True)
        return remove(leftover)

    monkeypatch.setattr(shelf, "remove", sweeping_beside)
    assert shelf.shared_directory(tmp_path, "mine", sweep=True) == root / "mine"
    assert not list(root.iterdir())
