"""What only the ranks together can find: other versions, settings, clocks or disks than the rest. Collective, on every rank."""

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from agnews_dist import collectives
from agnews_dist.node import Cores, find_cores
from agnews_dist.preflight import disks
from agnews_dist.preflight.findings import Finding, rank_words
from agnews_dist.world import World


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others of itself."""

    host: str
    cores: Cores
    threads: int
    versions: Mapping[str, str]
    settings: Mapping[str, object]


def differing(what: str, by_rank: Sequence[Mapping[str, object]], remedy: str) -> Finding:
    """Whether all ranks have the same; else every name that differs with its values, and the ranks unlike rank 0."""
    first = by_rank[0]
    told: list[str] = []
    odd: set[int] = set()
    for name in sorted({name for own in by_rank for name in own}):
        unlike = [rank for rank, own in enumerate(by_rank) if own.get(name) != first.get(name)]
        if unlike:
            odd.update(unlike)
            values = ", ".join(dict.fromkeys(str(by_rank[rank].get(name, "absent")) for rank in unlike))
            words = rank_words(unlike, len(by_rank) + 1)
            told.append(f"{name} {first.get(name, 'absent')} on rank 0, {values} on {words}")
    if not told:
        return Finding(check=what, verdict="ok", found="the same on all ranks")
    return Finding(check=what, verdict="fail", found="; ".join(told), remedy=remedy, ranks=tuple(sorted(odd)))


def check_world(expected: int | None, world: World, hosts: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Whether as many ranks and nodes take part as were meant to; `expected`: ranks, if the user has said how many."""
    nodes = len(set(hosts))
    found = f"{world.num_ranks} rank(s) on {nodes} node(s): {', '.join(dict.fromkeys(hosts))}"
    if expected is not None and expected != world.num_ranks:
        return Finding(
            check="world",
            verdict="fail",
            found=f"{found}, where {expected} were expected",
            remedy="Look at --nproc_per_node and --nnodes (NPROC and NODES), and at the GPUs and nodes that the job was given",
        )
    of_job = environ.get("SLURM_JOB_NUM_NODES", "")
    if of_job.isdecimal() and int(of_job) != nodes and "SLURM_STEP_ID" in environ:
        return Finding(
            check="world",
            verdict="fail",
            found=f"{found}, while Slurm gave the job {of_job} node(s)",
            remedy="Start one torchrun per node: srun --ntasks-per-node=1 launch/node.sh",
        )
    return Finding(check="world", verdict="ok", found=found)


def judge_cores(facts: Sequence[Facts]) -> Finding:
    """Whether every thread of every rank has a core: of those that a node's ranks may use together, bound or not."""
    told: list[str] = []
    affected: list[int] = []
    fitting = 1
    for host in dict.fromkeys(own.host for own in facts):
        ranks = [rank for rank, own in enumerate(facts) if own.host == host]
        here = [facts[rank] for rank in ranks]
        cores = len({core for own in here for core in own.cores.allowed})
        cores = min([cores, *(own.cores.count for own in here if not own.cores.are_ours)])
        threads = sum(own.threads for own in here)
        if threads > cores or any(own.threads > len(own.cores.allowed) for own in here):
            told.append(f"{len(here)} rank(s) on {host} have {threads} thread(s) and {cores} core(s)")
            affected += ranks
            fitting = max(1, cores // len(here))
    if not told:
        threads = "/".join(sorted({str(own.threads) for own in facts}))
        return Finding(check="cores", verdict="ok", found=f"{threads} thread(s) per rank, a core for each")
    remedy = (
        f"Ask for more (sbatch --cpus-per-gpu, --cpus-per-task), set OMP_NUM_THREADS={fitting}, or start fewer ranks"
    )
    return Finding(check="cores", verdict="warn", found="; ".join(told[:8]), remedy=remedy, ranks=tuple(affected))


def check_names(world: World, hosts: Sequence[str]) -> Finding:
    """Whether every node can look up every other by name."""
    unknown = [host for host in dict.fromkeys(hosts) if not _resolves(host)] if world.local_rank == 0 else []
    found = {host: names for host, names in zip(hosts, collectives.all_gather(unknown), strict=True) if names}
    if not found:
        return Finding(check="host names", verdict="ok", found="every node finds every other by name")
    told = "; ".join(f"{host} does not know {', '.join(names)}" for host, names in found.items())
    remedy = "Ranks are told addresses, so this may do; put the names into DNS or /etc/hosts if something else fails"
    return Finding(check="host names", verdict="warn", found=told, remedy=remedy)


def _resolves(host: str) -> bool:
    with suppress(OSError):
        return bool(socket.getaddrinfo(host, None))
    return False


def check_shared(what: str, directory: Path, world: World, hosts: Sequence[str], *, must_be: bool) -> Finding:
    """Whether rank 0's file in `directory` is seen from every node; `must_be`: it should, for what lies there."""
    check = f"shared: {what}"
    name = f".doctor-{uuid.uuid4().hex}"
    made = not directory.exists()
    if world.is_main:
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
    # The name, if it could be left.
    name = collectives.all_gather(name if not world.is_main or disks.leave_mark(directory, name) else "")[0]
    is_seen = bool(name) and (world.is_main or disks.find_mark(directory, name))
    seen = collectives.all_gather(is_seen)
    if world.is_main and name:
        disks.remove_mark(directory, name)
        if made:
            with suppress(OSError):
                directory.rmdir()
    if len(set(hosts)) == 1 or not name:
        return Finding(check=check, verdict="ok", found="one node" if name else "rank 0 cannot write there: see above")
    blind = list(dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees))
    if not blind:
        return Finding(check=check, verdict="ok", found="seen from every node")
    found = f"{directory} of {hosts[0]} is not seen from {', '.join(blind)}"
    if must_be:
        remedy = "A restart whose first node is another would begin anew: choose a file system that all nodes share"
        return Finding(check=check, verdict="warn", found=found, remedy=remedy)
    return Finding(check=check, verdict="ok", found=f"{found}: every node makes its own")


def facts_of(versions: Mapping[str, str], settings: Mapping[str, object]) -> Facts:
    """This rank's."""
    return Facts(socket.gethostname(), find_cores(os.environ), torch.get_num_threads(), versions, settings)
