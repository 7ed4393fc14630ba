"""What only the ranks together can find: other versions, settings, clocks or disks than the rest. Collective, on every rank."""

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from agnews_dist.config.schema import Config
from agnews_dist.distributed import collectives
from agnews_dist.distributed.node_resources import Cores, find_cores
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.preflight import disks
from agnews_dist.preflight.findings import Finding, rank_words, within
from agnews_dist.preflight.machine import DeviceInfo
from agnews_dist.report.result_files import versions
from agnews_dist.run.fingerprints import settings

NAME_SECONDS = 5.0


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others of itself."""

    host: str
    kind: DeviceInfo
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
    of_step, of_job = (environ.get(name, "") for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES"))
    if "SLURM_STEP_ID" in environ and of_step.isdecimal() and int(of_step) != nodes:
        return Finding(
            check="world",
            verdict="fail",
            found=f"{found}, while Slurm gave the step {of_step} node(s)",
            remedy="Start one torchrun per node: srun --ntasks-per-node=1 launch/node.sh",
        )
    if of_job.isdecimal() and int(of_job) > nodes and is_launched(environ):
        return Finding(
            check="world",
            verdict="warn",
            found=f"{found}, of {of_job} that Slurm gave the job: the others stand idle",
            remedy="If that is not meant: srun --ntasks-per-node=1 launch/node.sh",
        )
    return Finding(check="world", verdict="ok", found=found)


def judge_devices(kinds: Sequence[DeviceInfo]) -> Finding:
    """Whether all ranks compute on the same kind of device and in the same precision; the same GPU is only better."""
    fixed = [{"device": kind.device, "precision": kind.precision} for kind in kinds]
    remedy = "Look at the node that differs (nvidia-smi, its driver, the container's --nv), or leave it out (sbatch --exclude)"
    found = differing("devices", fixed, remedy)
    names = list(dict.fromkeys(kind.name for kind in kinds))
    if found.verdict == "ok" and len(names) > 1:
        told = differing("devices", [{"GPU": kind.name} for kind in kinds], "Every step waits for the slower ones")
        return replace(told, verdict="warn")
    return found


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
            fitting = max(1, min([cores // len(here), *(len(own.cores.allowed) for own in here)]))
    if not told:
        threads = "/".join(sorted({str(own.threads) for own in facts}))
        return Finding(check="cores", verdict="ok", found=f"{threads} thread(s) per rank, a core for each")
    fewer = f", set OMP_NUM_THREADS={fitting}" if fitting < max(own.threads for own in facts) else ""
    remedy = f"Ask for more (sbatch --cpus-per-gpu, --cpus-per-task){fewer}, or start fewer ranks"
    return Finding(check="cores", verdict="warn", found="; ".join(told[:8]), remedy=remedy, ranks=tuple(affected))


def check_names(world: World, hosts: Sequence[str]) -> Finding:
    """Whether every node can look up every other by name."""
    unknown = _unresolved(list(dict.fromkeys(hosts))) if world.local_rank == 0 else []
    found = {host: names for host, names in zip(hosts, collectives.all_gather(unknown), strict=True) if names}
    if not found:
        return Finding(check="host names", verdict="ok", found="every node finds every other by name")
    told = "; ".join(f"{host} does not know {', '.join(names)}" for host, names in found.items())
    remedy = "Ranks are told addresses, so this may do; put the names into DNS or /etc/hosts if something else fails"
    return Finding(check="host names", verdict="warn", found=told, remedy=remedy)


def _unresolved(hosts: Sequence[str]) -> list[str]:
    """Those whose name nobody knows, or not within some seconds: all asked at once, a name server may be dead."""

    def is_known(host: str) -> bool:
        return bool(within(NAME_SECONDS, partial(socket.getaddrinfo, host, None)).value)

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return [host for host, known in zip(hosts, pool.map(is_known, hosts), strict=True) if not known]


def check_shared(what: str, directory: Path, world: World, hosts: Sequence[str], *, must_be: bool) -> Finding:
    """Whether rank 0's file in `directory` is seen from every node; `must_be`: it should, for what lies there."""
    check = f"shared: {what}"
    name = f".doctor-{uuid.uuid4().hex}"
    # The name, if it could be left.
    name = collectives.all_gather(name if not world.is_main or disks.leave_mark(directory, name) else "")[0]
    is_seen = bool(name) and (world.is_main or disks.find_mark(directory, name))
    seen = collectives.all_gather(is_seen)
    if world.is_main and name:
        disks.remove_mark(directory, name)
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


def facts_of(kind: DeviceInfo, config: Config) -> Facts:
    """This rank's."""
    engine = config.engine
    compared = {**settings(config), "engine.backend": engine.backend, "engine.zero_stage": engine.zero_stage}
    return Facts(socket.gethostname(), kind, find_cores(os.environ), torch.get_num_threads(), versions(), compared)
