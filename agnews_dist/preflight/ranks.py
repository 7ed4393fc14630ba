"""Compare the ranks: versions, settings, devices, cores and directories. Functions that take a `World` are collective."""

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from agnews_dist.distributed import collectives
from agnews_dist.distributed.node_resources import Cores, find_cores
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.preflight.disks import wait_for_file
from agnews_dist.preflight.findings import Finding, format_ranks
from agnews_dist.preflight.machine import DeviceInfo
from agnews_dist.report.result_files import versions


@dataclass(frozen=True)
class RankFacts:
    """Facts about a rank that are compared with other ranks."""

    host: str
    device: DeviceInfo
    cores: Cores
    threads: int
    versions: Mapping[str, str]
    settings: Mapping[str, object]


def collect_facts(device: DeviceInfo, settings: Mapping[str, object]) -> RankFacts:
    """Return the facts about this rank."""
    return RankFacts(socket.gethostname(), device, find_cores(os.environ), torch.get_num_threads(), versions(), settings)


def compare_ranks(check: str, by_rank: Sequence[Mapping[str, object]], remedy: str) -> Finding:
    """Check that all ranks have the same values. Otherwise list each name with its values and the ranks unlike rank 0."""
    first = by_rank[0]
    differences: list[str] = []
    odd: set[int] = set()
    for name in sorted({name for own in by_rank for name in own}):
        unlike = [rank for rank, own in enumerate(by_rank) if own.get(name) != first.get(name)]
        if unlike:
            odd.update(unlike)
            values = ", ".join(dict.fromkeys(str(by_rank[rank].get(name, "absent")) for rank in unlike))
            where = format_ranks(unlike, len(by_rank) + 1)
            differences.append(f"{name} {first.get(name, 'absent')} on rank 0, {values} on {where}")
    if not differences:
        return Finding(check=check, verdict="ok", found="the same on all ranks")
    return Finding(check=check, verdict="fail", found="; ".join(differences), remedy=remedy, ranks=tuple(sorted(odd)))


def check_world(expected: int | None, world: World, hosts: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Check the number of ranks and nodes; `expected`: ranks that the user named."""
    num_nodes = len(set(hosts))
    found = f"{world.num_ranks} rank(s) on {num_nodes} node(s): {', '.join(dict.fromkeys(hosts))}"
    if expected is not None and expected != world.num_ranks:
        remedy = "Check --nproc_per_node and --nnodes (NPROC and NODES), and the GPUs and nodes that the job was given"
        return Finding(check="world", verdict="fail", found=f"{found}, {expected} were expected", remedy=remedy)
    of_step, of_job = (environ.get(name, "") for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES"))
    if "SLURM_STEP_ID" in environ and of_step.isdecimal() and int(of_step) != num_nodes:
        remedy = "Start one torchrun per node: srun --ntasks-per-node=1 launch/node.sh"
        found = f"{found}; Slurm gave the step {of_step} node(s)"
        return Finding(check="world", verdict="fail", found=found, remedy=remedy)
    if of_job.isdecimal() and int(of_job) > num_nodes and is_launched(environ):
        remedy = "To use all nodes: srun --ntasks-per-node=1 launch/node.sh"
        found = f"{found}; the other nodes of the job's {of_job} are idle"
        return Finding(check="world", verdict="warn", found=found, remedy=remedy)
    return Finding(check="world", verdict="ok", found=found)


def judge_devices(devices: Sequence[DeviceInfo]) -> Finding:
    """Check that all ranks use the same type of device and precision (fail), and the same GPU model (warn)."""
    required = [{"device": each.device, "precision": each.precision} for each in devices]
    remedy = "Check the node that differs (nvidia-smi, driver, the container's --nv), or exclude it (sbatch --exclude)"
    found = compare_ranks("devices", required, remedy)
    if found.verdict == "ok":
        names = compare_ranks("devices", [{"GPU": each.name} for each in devices], "Use one GPU model: others wait")
        return replace(names, verdict="warn") if names.remedy else found
    return found


def judge_cores(facts: Sequence[RankFacts]) -> Finding:
    """Check that every thread has a core, counting the cores that the ranks of a node may use together."""
    short: list[str] = []
    affected: list[int] = []
    fitting = 1
    for host in dict.fromkeys(own.host for own in facts):
        ranks = [rank for rank, own in enumerate(facts) if own.host == host]
        on_node = [facts[rank] for rank in ranks]
        cores = len({core for own in on_node for core in own.cores.allowed})
        cores = min([cores, *(own.cores.count for own in on_node if not own.cores.is_exclusive)])
        threads = sum(own.threads for own in on_node)
        if threads > cores or any(own.threads > len(own.cores.allowed) for own in on_node):
            short.append(f"{len(on_node)} rank(s) on {host} have {threads} thread(s) and {cores} core(s)")
            affected += ranks
            fitting = max(1, min([cores // len(on_node), *(len(own.cores.allowed) for own in on_node)]))
    if not short:
        counts = "/".join(sorted({str(own.threads) for own in facts}))
        return Finding(check="cores", verdict="ok", found=f"{counts} thread(s) per rank, a core for each")
    fewer = f", set OMP_NUM_THREADS={fitting}" if fitting < max(own.threads for own in facts) else ""
    remedy = f"Ask for more (sbatch --cpus-per-gpu, --cpus-per-task){fewer}, or start fewer ranks"
    return Finding(check="cores", verdict="warn", found="; ".join(short[:8]), remedy=remedy, ranks=tuple(affected))


def check_shared(name: str, directory: Path, world: World, hosts: Sequence[str]) -> Finding:
    """Check that every node sees a file that rank 0 writes into `directory`."""
    check = f"shared: {name}"
    # Rank 0's file for all ranks; None if rank 0 could not write it.
    path: Path | None = directory / f".doctor-{uuid.uuid4().hex}"
    if world.is_main:
        try:
            path.touch()
        except OSError:
            path = None
    path = collectives.all_gather(path)[0]
    seen = collectives.all_gather(path is not None and (world.is_main or wait_for_file(path)))
    if path is None:
        return Finding(check=check, verdict="ok", found="rank 0 cannot write there: see above")
    if world.is_main:
        path.unlink(missing_ok=True)
    blind = list(dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees))
    if not blind:
        return Finding(check=check, verdict="ok", found="visible on every node")
    found = f"{directory} of {hosts[0]} is not visible on {', '.join(blind)}"
    remedy = "Choose a file system that all nodes share: a restart with another first node could not resume"
    return Finding(check=check, verdict="warn", found=found, remedy=remedy)
