"""Where a node's own copies go, and that tokens opened from a copy are the cache's, read from there once."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from test_tokens import check_tokens, flip, opened, small_corpus, warned
from watching import opens

from agnews_dist.errors import DataError, UserError
from agnews_dist.events import Event
from agnews_dist.model.embedded import embedded_tokenizer
from agnews_dist.storage import locations as module
from agnews_dist.storage.locations import is_memory, node_cache

CORPUS = small_corpus("The market rose.", "A team won.")


def test_none_is_wanted(tmp_path):
    assert node_cache("", {"SLURM_TMPDIR": str(tmp_path)}) is None
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_jobs_directory_then_tmpdir_then_memory(tmp_path, monkeypatch):
    job, tmp, memory = (tmp_path / name for name in ("job", "tmp", "memory"))
    for directory in (job, tmp, memory):
        directory.mkdir()
    monkeypatch.setattr(module, "SHARED_MEMORY", memory)
    name = f"agnews_dist-node-{os.getuid()}"
    both = {"SLURM_TMPDIR": str(job), "TMPDIR": str(tmp)}
    assert node_cache("auto", both) == job / name
    assert (job / name).is_dir()
    assert not list(tmp.iterdir())
    assert node_cache("auto", {**both, "SLURM_TMPDIR": ""}) == tmp / name
    assert node_cache("auto", {"TMPDIR": str(tmp_path / "absent")}) == memory / name
    memory.rename(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"^--node_cache auto: none of /absent, .*/memory can be written, .* leave it out"
    ):
        node_cache("auto", {"TMPDIR": "/absent"})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"^--node_cache .*/file/below cannot be made \(Not a directory\): .* every node has"
    ):
        node_cache(str(tmp_path / "file" / "below"), {})
    assert node_cache(str(tmp_path / "a" / "b"), {}) == tmp_path / "a" / "b"


def test_memory_is_known_by_its_file_system(tmp_path, monkeypatch):
    assert is_memory(Path("/dev/shm/mine/below"))
    assert is_memory(Path("/dev/shm"))
    assert not is_memory(Path("/dev/shmall"))
    (tmp_path / "link").symlink_to("/dev/shm")
    assert is_memory(tmp_path / "link" / "mine")
    # A node without a disk has /tmp in memory; a disk may be mounted below what is not one, and the other way round.
    mounts = [("/", "ext4"), ("/a", "tmpfs"), ("/a/b", "xfs"), ("/scratch", "lustre")]
    parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: parts if all else [])
    found = {path: is_memory(Path(path)) for path in ("/a/c", "/a", "/a/b/c", "/ab", "/scratch/me")}
    assert found == {"/a/c": True, "/a": True, "/a/b/c": False, "/ab": False, "/scratch/me": False}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        psutil, "disk_partitions", lambda **_: [SimpleNamespace(mountpoint=str(tmp_path), fstype="ramfs")]
    )
    assert is_memory(Path("mine"))


@pytest.fixture
def cached(tmp_path) -> Path:
    """A token cache made by a former run."""
    return opened(CORPUS, tmp_path / "shared").path


@pytest.fixture
def node(tmp_path) -> Path:
    directory = tmp_path / "node"
    directory.mkdir()
    return directory


def test_a_copy_is_made_once_and_reads_each_file_once(cached, node):
    with opens() as counted:
        stores = [opened(CORPUS, cached.parent, node_dir=node) for _ in range(3)]
    assert [counted[file] for file in cached.iterdir()] == [1] * len(list(cached.iterdir()))
    for store in stores:
        assert store.path == node / cached.name
        assert store.was_cached
        check_tokens(store, CORPUS, embedded_tokenizer())
    with opens() as counted:
        opened(CORPUS, cached.parent)
    assert counted[cached / "train-tokens.npy"] > 1, "the count tells"


def test_the_copy_is_enough_when_the_cache_is_gone(cached, node):
    opened(CORPUS, cached.parent, node_dir=node)
    shutil.rmtree(cached.parent)
    assert opened(CORPUS, cached.parent, node_dir=node).was_cached
    assert not cached.parent.exists()


def test_without_a_cache_one_is_built_for_the_other_nodes_too(tmp_path, node):
    store = opened(CORPUS, tmp_path / "shared", node_dir=node)
    assert not store.was_cached
    assert opened(CORPUS, tmp_path / "shared").was_cached
    assert store.path.parent == node
    check_tokens(store, CORPUS, embedded_tokenizer())


def test_damage_is_not_copied_and_a_damaged_copy_is_made_again(cached, node):
    flip(cached / "train-tokens.npy", -1)
    events: list[Event] = []
    store = opened(CORPUS, cached.parent, node_dir=node, emit=events.append)
    assert ["is damaged" in message for message in warned(events)] == [True]
    check_tokens(store, CORPUS, embedded_tokenizer())
    check_tokens(opened(CORPUS, cached.parent), CORPUS, embedded_tokenizer())
    flip(store.path / "train-tokens.npy", -1)
    events.clear()
    check_tokens(opened(CORPUS, cached.parent, node_dir=node, emit=events.append), CORPUS, embedded_tokenizer())
    assert warned(events) == [], "the user has lost nothing"


def test_without_room_for_a_copy_the_cache_is_used(cached, node):
    # As a file system without space does, and works for root: the copy cannot be written.
    (node / f"{cached.name}.lock").mkdir()
    events: list[Event] = []
    store = opened(CORPUS, cached.parent, node_dir=node, emit=events.append)
    (message,) = warned(events)
    assert message.startswith(f"no tokens can be kept in {node} (")
    assert message.endswith(f"): they are read from {cached}.")
    assert store.path == cached
    check_tokens(store, CORPUS, embedded_tokenizer())


def test_a_cache_that_can_be_neither_read_nor_written_is_named(tmp_path, node):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"token cache .*/file/cache cannot be written"):
        opened(CORPUS, tmp_path / "file" / "cache", node_dir=node)
