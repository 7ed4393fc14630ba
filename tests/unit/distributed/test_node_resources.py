"""Ranks, threads and cores of a node, for all forms of the variables that clusters set."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import environment, python

from agnews_dist.distributed import node_resources as node
from agnews_dist.distributed.node_resources import Cores, choose_variables, count_devices, find_cores, free_port
from agnews_dist.errors import UserError

EIGHT_CORES = Cores(tuple(range(8)), 8)
JOB = {"SLURM_JOB_ID": "7"}
MODULE = "agnews_dist.distributed.node_resources"


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"CUDA_VISIBLE_DEVICES": " 2 , 3 "}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1c,GPU-77aa"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        # A process sees only one MIG instance, and NCCL does not connect instances of one GPU.
        ({"CUDA_VISIBLE_DEVICES": "MIG-1c3f,MIG-99ab"}, 1),
        # The process sees fewer GPUs than the node has: a container, or the user's choice.
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "8"}, 1),
        ({**JOB, "SLURM_GPUS_ON_NODE": "8"}, 8),
        ({**JOB, "SLURM_GPUS_ON_NODE": "(null)"}, 0),
        (JOB, 0),
    ],
)
def test_count_devices_reads_the_jobs_variables(environ, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("the variables suffice"))
    assert count_devices(environ) == count


def test_count_devices_asks_cuda_without_variables(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count_devices({}) == 3


@pytest.mark.parametrize(
    ("environ", "cores", "expected"),
    [
        ({"NPROC": "2"}, EIGHT_CORES, ("2", "4", "")),
        ({**JOB, "NPROC": "2"}, EIGHT_CORES, ("2", "4", "0,1,2,3 4,5,6,7")),
        ({**JOB, "NPROC": "3"}, EIGHT_CORES, ("3", "2", "0,1 2,3 4,5")),
        ({**JOB, "NPROC": "2", "OMP_NUM_THREADS": "1"}, EIGHT_CORES, ("2", "1", "0,1,2,3 4,5,6,7")),
        ({**JOB, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, EIGHT_CORES, ("4", "2", "0,1 2,3 4,5 6,7")),
        (JOB, EIGHT_CORES, ("1", "8", "")),
        ({**JOB, "NPROC": "16"}, EIGHT_CORES, ("16", "1", "")),
        # Slurm gave four cores but does not confine the job to them, so it is unknown which four.
        ({**JOB, "NPROC": "2"}, Cores(tuple(range(8)), 4), ("2", "2", "")),
    ],
)
def test_choose_variables_divides_threads_and_cores(environ, cores, expected):
    environ = {"CUDA_VISIBLE_DEVICES": "", **environ}
    found = choose_variables(environ, cores, "torchrun")
    assert (found["NPROC"], found["OMP_NUM_THREADS"], found["RANK_CORES"]) == expected


@pytest.mark.parametrize("given", ["0", "two", "-1", "1.5", "auto"])
def test_choose_variables_refuses_a_bad_nproc(given):
    with pytest.raises(UserError, match=rf"^NPROC='{given}': torchrun needs a number of ranks, at least 1\. Set NPROC=2"):
        choose_variables({"NPROC": given}, EIGHT_CORES, "torchrun")


def test_free_port_is_below_the_systems_own_range(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(node, "PORTS", range(port, port + 1))
        with pytest.raises(
            UserError, match=rf"^no port from {port} to {port} is free on .*: the ranks cannot meet\. End programs"
        ):
            free_port()
    monkeypatch.undo()
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists():
        assert int(given.read_text().split()[0]) > free_port()


def test_find_cores_sorts_hardware_threads_of_a_core_together(tmp_path, monkeypatch):
    """Two sockets of two cores with two hardware threads each, numbered as by Linux: second threads come last."""
    for core in range(8):
        topology = tmp_path / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{core % 4 // 2}\n")
        (topology / "core_id").write_text(f"{core % 2}\n")
    monkeypatch.setattr(node, "CORES", tmp_path)
    monkeypatch.setattr(node, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = find_cores({})
    assert cores == Cores((0, 4, 1, 5, 2, 6, 3, 7), 8)
    bound = choose_variables({**JOB, "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}, cores, "torchrun")["RANK_CORES"]
    assert bound == "0,4,1,5 2,6,3,7", "one rank per socket"


@pytest.mark.parametrize(
    ("quota", "slurm_cpus", "count"),
    [
        ("max 100000", None, 8),
        ("400000 100000", None, 4),
        ("50000 100000", None, 1),
        ("400000 100000", "2", 2),
        (None, "6", 6),
        (None, "16", 8),
        (None, "", 8),
    ],
)
def test_find_cores_takes_the_least_limit(quota, slurm_cpus, count, tmp_path, monkeypatch):
    file = tmp_path / "cpu.max"
    if quota:
        file.write_text(quota)
    monkeypatch.setattr(node, "QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = find_cores({} if slurm_cpus is None else {"SLURM_CPUS_ON_NODE": slurm_cpus})
    assert (cores.count, len(cores.allowed), cores.is_exclusive) == (count, 8, count == 8)


def test_main_prints_assignments_for_the_shell():
    environ = environment(NPROC="2", CUDA_VISIBLE_DEVICES="", SLURM_JOB_ID="7", SLURM_CPUS_ON_NODE=str(os.cpu_count()))
    environ.pop("OMP_NUM_THREADS", None)
    script = f'eval "$({sys.executable} -m {MODULE})" && printf "%s|" "$NPROC" "$OMP_NUM_THREADS" "$RANK_CORES"'
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=True)
    num_ranks, threads, cores, _ = done.stdout.split("|")
    assert num_ranks == "2"
    assert int(threads) == max(1, find_cores(environ).count // 2)
    mine = sorted(os.sched_getaffinity(0))
    bound = [int(core) for part in cores.split() for core in part.split(",")]
    assert set(bound) <= set(mine)
    assert len(bound) in (0, len(mine) // 2 * 2)
    failed = python("-m", MODULE, "srun", check=False, NPROC="x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: NPROC='x': srun needs a number of ranks")
