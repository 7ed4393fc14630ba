"""The ranks meet, tell each other what they found, and measure what only they together can. Collective."""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

from agnews_dist.config.schema import Config
from agnews_dist.distributed import collectives
from agnews_dist.distributed.rendezvous import open_process_group
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.engine.device import DTYPES
from agnews_dist.errors import UserError
from agnews_dist.preflight import network, ranks
from agnews_dist.preflight.findings import Finding
from agnews_dist.preflight.job import job_of
from agnews_dist.preflight.machine import RankReport
from agnews_dist.preflight.memory_check import read_shape, setup_of, shape_of
from agnews_dist.preflight.rendezvous_check import Meeting, route
from agnews_dist.preflight.time_estimate import Speed, expected_seconds
from agnews_dist.storage.locations import cache_root

PATIENT_SECONDS = 10.0


def meet(world: World, here: RankReport, timeout_seconds: int) -> torch.device:
    """Make the process group; what the ranks will measure: their GPUs if every one of them uses its own, else CPUs.

    Raises:
        UserError: not all ranks came.
    """
    if world.num_ranks > 1:
        _choose_interface(world)
        # Left to itself, NCCL's watchdog ends the process where a collective hangs, and what was found would be lost.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # Both: the ranks must be able to talk even if the GPUs cannot.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        words = f"waiting for the other {world.num_ranks - 1} rank(s), {timeout_seconds} s at most"
        patience = threading.Timer(PATIENT_SECONDS, lambda: print(words, file=sys.stderr, flush=True))
        if world.is_main:
            patience.start()
        try:
            open_process_group(world, backend, timeout_seconds)
        finally:
            patience.cancel()
    if not all(collectives.all_gather(here.kind.device == "cuda")):
        return torch.device("cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def _choose_interface(world: World) -> None:
    """As launch/network.sh, for ranks on several nodes that a bare srun has started: by itself gloo looks up this machine's
    name, which may be loopback or nothing."""
    if world.ranks_per_node == world.num_ranks or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    with suppress(UserError):  # told by the meeting itself
        interface, _ = route(Meeting(host=host, port=port, num_nodes=2, node=min(world.rank, 1)))
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def check_job(
    config: Config, asked: World, world: World, here: RankReport, device: torch.device, expected: int | None
) -> tuple[list[list[Finding]], list[Finding], float | None]:
    """(what each rank found alone, what they found together, seconds that the configured job will take; None: unknown)."""
    facts = collectives.all_gather(ranks.facts_of(here.kind, config))
    hosts = [own.host for own in facts]
    # Before NCCL is tried: where it hangs, the GPU may hang with it.
    dtype = DTYPES[here.kind.precision] if device.type == "cuda" else torch.float32
    done = collectives.all_gather(network.work(device, dtype))
    all_sum, bytes_per_second = network.check_sum(world, device)
    found = [
        ranks.check_world(expected if is_launched(os.environ) else None, world, hosts, os.environ),
        ranks.differing(
            "versions",
            [own.versions for own in facts],
            "Start every rank from one environment, on a file system all nodes share",
        ),
        ranks.differing(
            "configuration",
            [own.settings for own in facts],
            "Start every rank with the same arguments and the same YAML files",
        ),
        ranks.judge_devices([own.kind for own in facts]),
        ranks.judge_cores(facts),
        ranks.check_names(world, hosts),
        network.judge_clocks(network.clock_offsets(world), hosts),
        ranks.check_shared("run.dir", Path(config.run.dir).absolute(), world, hosts, must_be=True),
        ranks.check_shared("data.cache_dir", cache_root(config.data.cache_dir).absolute(), world, hosts, must_be=False),
        all_sum,
        *([network.check_pairs(world, device, hosts)] if all_sum.verdict == "ok" else []),
        network.judge_work(done, hosts, [len(own.cores.allowed) for own in facts]),
    ]
    by_rank = collectives.all_gather(here.findings)
    if here.diagnosis is None:
        return by_rank, found, None
    gpt2 = read_shape(config.model, config.data)
    setup = setup_of(config, gpt2, asked)
    job = job_of(config, shape_of(gpt2), trainable_blocks=setup.trainable_blocks, num_ranks=asked.num_ranks)
    speed = Speed(flops=min(own.rate for own in done), bytes_per_second=bytes_per_second)
    return by_rank, found, expected_seconds(job, speed)
