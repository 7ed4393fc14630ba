"""How much memory and disk there is: limits of control groups, read from real files, and places that do not exist."""

import os
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from agnews_dist.engine.device import free_device_bytes
from agnews_dist.storage import capacity as room

TERABYTE = 10**12


class Tree:
    """Control groups as the kernel shows them, below a directory of the test's own; the process's own group is real."""

    def __init__(self, root: Path, limit_name: str, used_name: str) -> None:
        self.root, self._limit_name, self._used_name = root, limit_name, used_name

    def set(self, group: str, limit: str, used: str) -> None:
        directory = self.root / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self._limit_name).write_text(f"{limit}\n")
        (directory / self._used_name).write_text(f"{used}\n")


@pytest.fixture(params=["memory.max memory.current", "memory.limit_in_bytes memory.usage_in_bytes"], ids=["v2", "v1"])
def tree(request, tmp_path, monkeypatch) -> Tree:
    """One version's tree alone, the process in the group `job/step`."""
    names = request.param.split()
    monkeypatch.setattr(room, "_CGROUPS", ((tmp_path / "cgroup", *names),))
    where = tmp_path / "self"
    where.write_text("0::/job/step\n" if names[0] == "memory.max" else "5:cpu:/elsewhere\n3:memory:/job/step\n")
    monkeypatch.setattr(room, "_OWN_CGROUP", where)
    return Tree(tmp_path / "cgroup", *names)


def test_without_a_limit_the_system_decides(tree):
    available = psutil.virtual_memory().available
    assert room.free_host_bytes() == pytest.approx(available, rel=0.1)
    tree.set("", "max", "5")
    tree.set("job/step", "9223372036854771712", "5")  # how version 1 says that there is none
    assert room.free_host_bytes() == pytest.approx(available, rel=0.1)


def test_a_limit_leaves_what_is_not_used(tree):
    tree.set("job/step", "5000000", "1200000")
    assert room.free_host_bytes() == 3_800_000


@pytest.mark.parametrize("name", ["inactive_file", "total_inactive_file"])
def test_what_was_read_of_files_is_given_back_when_it_is_needed(tree, name):
    tree.set("job/step", "5000000", "1200000")
    (tree.root / "job" / "step" / "memory.stat").write_text(f"anon 200000\n{name} 700000\nactive_file 9\n")
    assert room.free_host_bytes() == 4_500_000


def test_the_tightest_of_the_groups_above_holds(tree):
    tree.set("", "max", "3")
    tree.set("job", "4000000", "3500000")
    tree.set("job/step", "5000000", "1200000")
    assert room.free_host_bytes() == 500_000
    # The negative control: a group of others does not hold.
    tree.set("job", "4000000", "0")
    tree.set("other", "10", "0")
    tree.set("elsewhere", "10", "0")
    assert room.free_host_bytes() == 3_800_000


def test_a_container_whose_own_group_is_the_root(tree):
    tree.set("", "2000000", "500000")
    assert room.free_host_bytes() == 1_500_000


def test_more_used_than_allowed_is_nothing_left(tree):
    tree.set("job/step", "1000", "1200")
    assert room.free_host_bytes() == 0


def test_files_that_say_nothing_are_passed_over(tree, tmp_path):
    tree.set("job/step", "garbage", "1")
    tree.set("job", "", "")
    (tmp_path / "cgroup" / "job" / "step").joinpath(tree._used_name).unlink()
    assert room.free_host_bytes() > 10**6


def test_a_system_without_control_groups(tree, tmp_path, monkeypatch):
    tree.set("job/step", "1000", "0")
    assert room.free_host_bytes() == 1000
    monkeypatch.setattr(room, "_OWN_CGROUP", tmp_path / "absent")
    assert room.free_host_bytes() > 10**6


def test_this_process_group_is_read_from_where_the_kernel_tells_it():
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("no /proc/self/cgroup here")
    assert room._OWN_CGROUP.read_text() == Path(f"/proc/{os.getpid()}/cgroup").read_text()


def test_a_rank_without_gpu_has_its_part_of_the_host(tree):
    tree.set("job/step", "9000", "0")
    assert free_device_bytes(torch.device("cpu"), 4) == 2250
    assert free_device_bytes(torch.device("cpu"), 1) == 9000


def test_the_space_where_a_directory_would_be_made(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert free > 0
    assert room.free_disk_bytes(tmp_path / "a" / "b" / "c") == pytest.approx(free, rel=0.1)
    assert room.free_disk_bytes(Path("relative") / "of" / "the" / "working" / "directory") > 0


def test_another_file_system_has_its_own_space(tmp_path):
    """The negative control: it is the space there, not that of some disk."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    free = shutil.disk_usage(shared).free
    assert abs(free - shutil.disk_usage(tmp_path).free) > 10**8, "the case needs two that differ"
    assert room.free_disk_bytes(shared / "new") == pytest.approx(free, abs=10**7)


def test_shared_memory_is_a_part_of_the_hosts_and_absent_is_none(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SHARED_MEMORY", tmp_path)
    assert 0 < room.free_shared_bytes() <= shutil.disk_usage(tmp_path).free
    tree.set("job/step", "9000", "0")
    assert room.free_shared_bytes() == 9000
    monkeypatch.setattr(room, "SHARED_MEMORY", tmp_path / "absent")
    assert room.free_shared_bytes() == 0
