"""The ranks meet, tell each other what they found, and measure what only they together can. Collective."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from agnews_dist import collectives
from agnews_dist.config import Config
from agnews_dist.data.tokens import cache_root
from agnews_dist.fingerprints import settings
from agnews_dist.fitting import read_shape, setup_of, shape_of
from agnews_dist.memory import Diagnosis
from agnews_dist.preflight import network, ranks
from agnews_dist.preflight.duration import Speed, expected_seconds
from agnews_dist.preflight.findings import Finding
from agnews_dist.preflight.job import job_of
from agnews_dist.rendezvous import open_process_group
from agnews_dist.report.result import versions
from agnews_dist.world import World, is_launched


def meet(world: World, here: Sequence[Finding], timeout_seconds: int) -> torch.device:
    """Make the process group; what the ranks will measure: their GPUs if every one of them has its own, else CPUs.

    Raises:
        UserError: not all ranks came.
    """
    has_gpu = any(finding.check == "device" and finding.verdict != "fail" for finding in here)
    uses_gpu = has_gpu and torch.cuda.is_available() and world.local_rank < torch.cuda.device_count()
    if world.num_ranks > 1:
        # Both: the ranks must be able to talk even if the GPUs cannot.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        open_process_group(world, backend, timeout_seconds)
    if not all(collectives.all_gather(uses_gpu)):
        return torch.device("cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def look_together(
    config: Config,
    asked: World,
    world: World,
    here: Sequence[Finding],
    diagnosis: Diagnosis | None,
    device: torch.device,
    expected: int | None,
) -> tuple[list[list[Finding]], list[Finding], float | None]:
    """(what each rank found alone, what they found together, seconds that the configured job will take; None: unknown)."""
    facts = collectives.all_gather(ranks.facts_of(versions(), settings(config)))
    hosts = [own.host for own in facts]
    all_sum, bytes_per_second = network.check_sum(world, device)
    done = collectives.all_gather(network.work(device))
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
        ranks.judge_cores(facts),
        ranks.check_names(world, hosts),
        network.judge_clocks(network.clock_offsets(world), hosts),
        ranks.check_shared("run.dir", Path(config.run.dir).absolute(), world, hosts, must_be=True),
        ranks.check_shared("data.cache_dir", cache_root(config.data.cache_dir).absolute(), world, hosts, must_be=False),
        all_sum,
        network.check_pairs(world, device, hosts),
        network.judge_work(done, hosts, [len(own.cores.allowed) for own in facts]),
    ]
    by_rank = collectives.all_gather(list(here))
    if diagnosis is None:
        return by_rank, found, None
    gpt2 = read_shape(config.model, config.data)
    setup = setup_of(config, gpt2, asked)
    job = job_of(config, shape_of(gpt2), trainable_blocks=setup.trainable_blocks, num_ranks=asked.num_ranks)
    seconds = expected_seconds(job, Speed(flops=min(own.rate for own in done), bytes_per_second=bytes_per_second))
    return by_rank, found, seconds
