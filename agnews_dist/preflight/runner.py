"""Checks that the ranks make together: form a process group, compare facts, measure network and speed. Collective."""

import os

import torch

from agnews_dist.distributed import collectives
from agnews_dist.distributed.rendezvous import open_process_group
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.engine.device import DTYPES
from agnews_dist.preflight import network, ranks
from agnews_dist.preflight.findings import Finding
from agnews_dist.preflight.machine import PlannedRun, RankReport


def form_group(world: World, report: RankReport, timeout_seconds: int) -> torch.device:
    """Create the process group. Returns the device to measure: a GPU if every rank uses its own, else the CPU.

    Raises:
        UserError: not all ranks came within `timeout_seconds`.
    """
    if world.num_ranks > 1:
        # By default NCCL's watchdog ends the process if a collective hangs, and all findings would be lost.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # Both: the ranks must be able to exchange findings even if the GPUs cannot.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        open_process_group(world, backend, timeout_seconds)
    if not all(collectives.all_gather(report.device.device == "cuda")):
        return torch.device("cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def check_job(
    planned: PlannedRun, world: World, report: RankReport, device: torch.device, expected: int | None
) -> tuple[list[list[Finding]], list[Finding]]:
    """Return (findings of each rank alone, findings of the ranks together); `expected`: ranks that the user named."""
    facts = collectives.all_gather(ranks.collect_facts(report.device, planned.settings))
    hosts = [own.host for own in facts]
    # Before the first NCCL collective: if that hangs, the GPU may hang as well.
    dtype = DTYPES[report.device.precision] if device.type == "cuda" else torch.float32
    works = collectives.all_gather(network.measure_work(device, dtype))
    same_software = "Start every rank from one environment, on a file system all nodes share"
    same_settings = "Start every rank with the same arguments and the same YAML files"
    sums = network.check_sum(world, device)
    together = [
        ranks.check_world(expected if is_launched(os.environ) else None, world, hosts, os.environ),
        ranks.compare_ranks("versions", [own.versions for own in facts], same_software),
        ranks.compare_ranks("configuration", [own.settings for own in facts], same_settings),
        ranks.judge_devices([own.device for own in facts]),
        ranks.judge_cores(facts),
        network.judge_clocks(network.measure_clock_offsets(world), hosts),
        ranks.check_shared("run.dir", planned.run_dir.absolute(), world, hosts),
        sums,
        *([network.check_pairs(world, device, hosts)] if sums.verdict == "ok" else []),
        network.judge_work(works, hosts, [len(own.cores.allowed) for own in facts]),
    ]
    return collectives.all_gather(report.findings), together
