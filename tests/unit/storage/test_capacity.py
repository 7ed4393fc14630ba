"""Free memory: limits of control groups, read from files as the kernel writes them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from agnews_dist.engine.device import free_device_bytes
from agnews_dist.storage import capacity

TERABYTE = 10**12


class CgroupTree:
    """Files of control groups below a directory of the test."""

    def __init__(self, root: Path, limit_name: str, used_name: str) -> None:
        self.root, self._limit_name, self._used_name = root, limit_name, used_name

    def set(self, group: str, limit: str, used: str) -> None:
        directory = self.root / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self._limit_name).write_text(f"{limit}\n")
        (directory / self._used_name).write_text(f"{used}\n")


@pytest.fixture(params=["memory.max memory.current", "memory.limit_in_bytes memory.usage_in_bytes"], ids=["v2", "v1"])
def tree(request, tmp_path, monkeypatch) -> CgroupTree:
    """Files of one version of control groups; the process is in the group `job/step`."""
    names = request.param.split()
    monkeypatch.setattr(capacity, "_CGROUPS", ((tmp_path / "cgroup", *names),))
    own_cgroup = tmp_path / "self"
    own_cgroup.write_text("0::/job/step\n" if names[0] == "memory.max" else "5:cpu:/elsewhere\n3:memory:/job/step\n")
    monkeypatch.setattr(capacity, "_OWN_CGROUP", own_cgroup)
    return CgroupTree(tmp_path / "cgroup", *names)


def test_free_host_bytes_without_a_limit_is_the_systems(tree):
    available = psutil.virtual_memory().available
    assert capacity.free_host_bytes() == pytest.approx(available, rel=0.1)
    tree.set("", "max", "5")
    tree.set("job/step", "9223372036854771712", "5")  # version 1's value for no limit
    assert capacity.free_host_bytes() == pytest.approx(available, rel=0.1)


def test_free_host_bytes_subtracts_used_memory_from_the_limit(tree):
    tree.set("job/step", "5000000", "1200000")
    assert capacity.free_host_bytes() == 3_800_000


@pytest.mark.parametrize("name", ["inactive_file", "total_inactive_file"])
def test_free_host_bytes_includes_inactive_page_cache(tree, name):
    tree.set("job/step", "5000000", "1200000")
    (tree.root / "job" / "step" / "memory.stat").write_text(f"anon 200000\n{name} 700000\nactive_file 9\n")
    assert capacity.free_host_bytes() == 4_500_000


def test_free_host_bytes_takes_the_least_of_all_groups_above(tree):
    tree.set("", "max", "3")
    tree.set("job", "4000000", "3500000")
    tree.set("job/step", "5000000", "1200000")
    assert capacity.free_host_bytes() == 500_000
    # Other processes' groups do not count.
    tree.set("job", "4000000", "0")
    tree.set("other", "10", "0")
    tree.set("elsewhere", "10", "0")
    assert capacity.free_host_bytes() == 3_800_000


def test_free_host_bytes_in_a_container_reads_the_root_group(tree):
    tree.set("", "2000000", "500000")
    assert capacity.free_host_bytes() == 1_500_000


def test_free_host_bytes_is_never_negative(tree):
    tree.set("job/step", "1000", "1200")
    assert capacity.free_host_bytes() == 0


def test_free_host_bytes_ignores_unreadable_files(tree, tmp_path):
    tree.set("job/step", "garbage", "1")
    tree.set("job", "", "")
    (tmp_path / "cgroup" / "job" / "step").joinpath(tree._used_name).unlink()
    assert capacity.free_host_bytes() > 10**6


def test_free_host_bytes_without_control_groups(tree, tmp_path, monkeypatch):
    tree.set("job/step", "1000", "0")
    assert capacity.free_host_bytes() == 1000
    monkeypatch.setattr(capacity, "_OWN_CGROUP", tmp_path / "absent")
    assert capacity.free_host_bytes() > 10**6


def test_own_cgroup_is_read_from_proc():
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("no /proc/self/cgroup here")
    assert capacity._OWN_CGROUP.read_text() == Path(f"/proc/{os.getpid()}/cgroup").read_text()


def test_free_device_bytes_of_a_cpu_rank_is_its_share_of_the_host(tree):
    tree.set("job/step", "9000", "0")
    assert free_device_bytes(torch.device("cpu"), 4) == 2250
    assert free_device_bytes(torch.device("cpu"), 1) == 9000


def test_free_shared_bytes_is_limited_by_file_system_and_host(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "SHARED_MEMORY", tmp_path)
    assert 0 < capacity.free_shared_bytes() <= shutil.disk_usage(tmp_path).free
    tree.set("job/step", "9000", "0")
    assert capacity.free_shared_bytes() == 9000
    monkeypatch.setattr(capacity, "SHARED_MEMORY", tmp_path / "absent")
    assert capacity.free_shared_bytes() == 0


@pytest.mark.parametrize("taken", [0, 300])
def test_peak_is_that_of_the_process_and_not_of_its_parent(taken):
    """In MB. The parent holds 500 when it starts the process."""
    child = "from agnews_dist.storage.capacity import peak_resident_bytes as peak; bytearray({} * 10**6); print(peak())"
    parent = (
        "import subprocess, sys; kept = bytearray(5 * 10**8); sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", parent, child.format(taken)], capture_output=True, text=True, check=True)
    assert taken < int(done.stdout) / 1e6 < taken + 100


def allocate_with_torch():
    torch.empty(2**60, dtype=torch.uint8)


def allocate_with_python():
    bytearray(2**62)


@pytest.mark.parametrize("allocate", [allocate_with_torch, allocate_with_python])
def test_failed_allocation_is_out_of_memory(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert capacity.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x5 and 4x4)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_other_errors_without_memory_have_known_texts(error, expected):
    assert capacity.is_out_of_memory(error) is expected
