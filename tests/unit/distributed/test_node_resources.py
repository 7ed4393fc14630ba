"""What one node gets: ranks, threads and cores from what the job shows, in every spelling that clusters have for it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import environment, python

from agnews_dist.distributed import node_resources as node
from agnews_dist.distributed.node_resources import Cores, count_devices, find_cores, free_port, settings
from agnews_dist.errors import UserError

EIGHT = Cores(tuple(range(8)), 8)
JOB = {"SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"CUDA_VISIBLE_DEVICES": " 2 , 3 "}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1c,GPU-77aa"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        # A process sees one instance only, and NCCL does not connect instances of one GPU.
        ({"CUDA_VISIBLE_DEVICES": "MIG-1c3f,MIG-99ab"}, 1),
        # What a process sees is less than what the node has: a container, or a user's own choice.
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "8"}, 1),
        ({**JOB, "SLURM_GPUS_ON_NODE": "8"}, 8),
        ({**JOB, "SLURM_GPUS_ON_NODE": "(null)"}, 0),
        (JOB, 0),
    ],
)
def test_gpus_are_counted_from_what_the_job_shows(environ, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("the environment tells"))
    assert count_devices(environ) == count


def test_without_a_word_cuda_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count_devices({}) == 3


@pytest.mark.parametrize(
    ("environ", "cores", "expected"),
    [
        ({"NPROC": "2"}, EIGHT, ("2", "4", "")),
        ({**JOB, "NPROC": "2"}, EIGHT, ("2", "4", "0,1,2,3 4,5,6,7")),
        ({**JOB, "NPROC": "3"}, EIGHT, ("3", "2", "0,1 2,3 4,5")),
        ({**JOB, "NPROC": "2", "OMP_NUM_THREADS": "1"}, EIGHT, ("2", "1", "0,1,2,3 4,5,6,7")),
        ({**JOB, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, EIGHT, ("4", "2", "0,1 2,3 4,5 6,7")),
        (JOB, EIGHT, ("1", "8", "")),
        ({**JOB, "NPROC": "16"}, EIGHT, ("16", "1", "")),
        # Slurm gave four cores and confines to none: which four are ours, nobody can say.
        ({**JOB, "NPROC": "2"}, Cores(tuple(range(8)), 4), ("2", "2", "")),
    ],
)
def test_threads_and_cores_are_divided(environ, cores, expected):
    environ = {"CUDA_VISIBLE_DEVICES": "", **environ}
    found = settings(environ, cores, "torchrun")
    assert (found["NPROC"], found["OMP_NUM_THREADS"], found["RANK_CORES"]) == expected


@pytest.mark.parametrize("given", ["0", "two", "-1", "1.5", "auto"])
def test_a_count_that_is_none(given):
    message = rf"^NPROC='{given}' is no count: torchrun would not know how many ranks to start\. Give a number"
    with pytest.raises(UserError, match=message):
        settings({"NPROC": given}, EIGHT, "torchrun")


def test_a_free_port_is_none_that_the_system_gives_away(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(node, "PORTS", range(port, port + 1))
        with pytest.raises(
            UserError, match=rf"^no port from {port} to {port} is free on .*: the ranks .* End what listens"
        ):
            free_port()
    monkeypatch.undo()
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists():
        assert int(given.read_text().split()[0]) > free_port()


def test_siblings_are_neighbours(tmp_path, monkeypatch):
    """Two sockets of two physical cores with two threads each, numbered as Linux does: first all cores, then their twins."""
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
    bound = settings({**JOB, "NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}, cores, "torchrun")["RANK_CORES"]
    assert bound == "0,4,1,5 2,6,3,7", "a rank to each socket"


@pytest.mark.parametrize(
    ("quota", "of_job", "count"),
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
def test_the_least_of_all_limits_holds(quota, of_job, count, tmp_path, monkeypatch):
    file = tmp_path / "cpu.max"
    if quota:
        file.write_text(quota)
    monkeypatch.setattr(node, "QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = find_cores({} if of_job is None else {"SLURM_CPUS_ON_NODE": of_job})
    assert (cores.count, len(cores.allowed), cores.are_ours) == (count, 8, count == 8)


def test_the_shell_can_evaluate_it():
    environ = environment(NPROC="2", CUDA_VISIBLE_DEVICES="", SLURM_JOB_ID="7", SLURM_CPUS_ON_NODE=str(os.cpu_count()))
    environ.pop("OMP_NUM_THREADS", None)
    script = f'eval "$({sys.executable} -m agnews_dist.distributed.node_resources)" && printf "%s|" "$NPROC" "$OMP_NUM_THREADS" "$RANK_CORES"'
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=True)
    num_ranks, threads, cores, _ = done.stdout.split("|")
    assert num_ranks == "2"
    assert int(threads) == max(1, find_cores(environ).count // 2)
    mine = sorted(os.sched_getaffinity(0))
    bound = [int(core) for part in cores.split() for core in part.split(",")]
    assert set(bound) <= set(mine)
    assert len(bound) in (0, len(mine) // 2 * 2)
    failed = python("-m", "agnews_dist.distributed.node_resources", "srun", check=False, NPROC="x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: NPROC='x' is no count: srun would not know")
