"""Compare the ranks: versions, settings, devices, cores and directories. Functions that take a `World` are collective."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.preflight.disks import find_existing, wait_for_file
from agnews_dist.preflight.findings import Finding, format_ranks
from agnews_dist.preflight.machine import RankReport


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
            differences.append(f"{name} {first.get(name, 'absent')} on rank 0, {values} on {format_ranks(unlike)}")
    if not differences:
        return Finding(check, "ok", "the same on all ranks")
    return Finding(check, "fail", "; ".join(differences), remedy, tuple(sorted(odd)))


def check_world(expected: int | None, world: World, hosts: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Check the number of ranks and nodes; `expected`: ranks that the user named."""
    num_nodes = len(set(hosts))
    found = f"{world.num_ranks} rank(s) on {num_nodes} node(s): {', '.join(dict.fromkeys(hosts))}"
    if expected is not None and expected != world.num_ranks:
        remedy = "Check --nproc_per_node and --nnodes (NPROC and NODES), and the GPUs and nodes that the job was given"
        return Finding("world", "fail", f"{found}, {expected} were expected", remedy)
    of_step = environ.get("SLURM_STEP_NUM_NODES", "")
    if "SLURM_STEP_ID" in environ and of_step.isdecimal() and int(of_step) != num_nodes:
        found += f"; Slurm gave the step {of_step} node(s)"
        remedy = "Start one torchrun per node: srun --ntasks-per-node=1 launch/node.sh"
        return Finding("world", "fail", found, remedy)
    return Finding("world", "ok", found)


def judge_devices(devices: Sequence[Mapping[str, str]]) -> Finding:
    """Check that all ranks use the same type of device and precision (fail), and the same GPU model (warn)."""
    remedy = "Check the node that differs (nvidia-smi, driver, the container's --nv), or exclude it (sbatch --exclude)"
    found = compare_ranks("devices", [{**each, "GPU": ""} for each in devices], remedy)
    if found.verdict == "fail":
        return found
    found = compare_ranks("devices", devices, "Use one GPU model: others wait")
    return replace(found, verdict="warn") if found.verdict == "fail" else found


def judge_cores(reports: Sequence[RankReport]) -> Finding:
    """Check that every thread has a core, counting the cores that the ranks of a node may use together."""
    short: list[str] = []
    affected: list[int] = []
    fitting = 1
    for host in dict.fromkeys(own.host for own in reports):
        ranks = [rank for rank, own in enumerate(reports) if own.host == host]
        on_node = [reports[rank] for rank in ranks]
        cores = len({core for own in on_node for core in own.cores.allowed})
        cores = min([cores, *(own.cores.count for own in on_node if not own.cores.is_exclusive)])
        threads = sum(own.threads for own in on_node)
        if threads > cores or any(own.threads > len(own.cores.allowed) for own in on_node):
            short.append(f"{len(on_node)} rank(s) on {host} have {threads} thread(s) and {cores} core(s)")
            affected += ranks
            fitting = max(1, min([cores // len(on_node), *(len(own.cores.allowed) for own in on_node)]))
    if not short:
        counts = "/".join(sorted({str(own.threads) for own in reports}))
        return Finding("cores", "ok", f"{counts} thread(s) per rank, a core for each")
    fewer = f", set OMP_NUM_THREADS={fitting}" if fitting < max(own.threads for own in reports) else ""
    remedy = f"Ask for more (sbatch --cpus-per-gpu, --cpus-per-task){fewer}, or start fewer ranks"
    return Finding("cores", "warn", "; ".join(short[:8]), remedy, tuple(affected))


def check_shared(directory: Path, world: World, hosts: Sequence[str]) -> Finding:
    """Check that every node sees a file that rank 0 writes into the run's `directory`, or where that would be created."""
    check, path = "shared: run.dir", None
    if world.is_main:
        try:
            path = find_existing(directory) / f".doctor-{uuid.uuid4().hex}"
            path.touch()
        except OSError:
            path = None
    path = collectives.all_gather(path)[0]
    seen = collectives.all_gather(path is not None and (world.is_main or wait_for_file(path)))
    if path is None:
        return Finding(check, "ok", "rank 0 cannot write there: see above")
    if world.is_main:
        path.unlink(missing_ok=True)
    blind = dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees)
    if not blind:
        return Finding(check, "ok", "visible on every node")
    remedy = "Choose a file system that all nodes share: a restart with another first node could not resume"
    return Finding(check, "warn", f"{directory} of {hosts[0]} is not visible on {', '.join(blind)}", remedy)
