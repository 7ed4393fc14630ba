"""Check the network and the speed of the ranks. Collective: every rank calls each function that takes a `World`."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.engine.device import measure_matrix_rate
from agnews_dist.preflight.findings import NO_ANSWER, Finding, format_ranks, run_with_timeout

NUMBERS = 1 << 18
"""fp32 numbers of a message: 1 MiB, as much as a gradient bucket of a small block."""
SUM_SECONDS = 20.0
"""Limit for the all-reduces: NCCL opens its connections in the first collective."""
PAIRS_SECONDS = 15.0
"""Limit for all turns together; the rest is skipped."""
SLOW_RANK = 1.5
"""A rank is reported from this ratio of speeds on, or of wall-clock time to its CPU time."""
WORK_SECONDS = 1.5
"""Several periods of the scheduler: a CPU-time limit pauses a process for tenths of a second."""
SKEW_WARN, SKEW_FAIL = 1.0, 10.0
"""Seconds. torchrun's agents compare clocks: they count a node as dead after 15 s without a heartbeat."""


@dataclass(frozen=True)
class Work:
    """Speed of a rank's matrix products."""

    rate: float
    """Floating-point operations per second."""
    share: float | None
    """CPU time of the main thread per wall-clock time; None on a GPU, where the thread only waits."""


def check_sum(world: World, device: torch.device) -> Finding:
    """Check all-reduces with known results."""
    if world.num_ranks == 1:
        return Finding("all-reduce", "ok", "one rank: nothing to add up")
    outcomes = collectives.all_gather(run_with_timeout(SUM_SECONDS, lambda: _add_up(world, device)))
    backend = "NCCL" if device.type == "cuda" else "gloo"
    failed = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
    if failed:
        # Real errors first: a rank that timed out may only have waited for another.
        by_cause = sorted(failed, key=lambda rank: failed[rank].startswith(NO_ANSWER))
        errors = "; ".join(f"{failed[rank]} on rank {rank}" for rank in by_cause[:4])
        remedy = "Set NCCL_DEBUG=INFO, check NCCL_SOCKET_IFNAME (launch/network.sh) and firewalls between the nodes"
        return Finding("all-reduce", "fail", f"fails over {backend}: {errors}", remedy, tuple(failed))
    wrong = tuple(rank for rank, (num_wrong, _) in enumerate(outcomes) if num_wrong)
    if wrong:
        remedy = "Have network cards and memory of these nodes tested: gradients would be wrong as well"
        return Finding("all-reduce", "fail", f"wrong sums on {format_ranks(wrong)}", remedy, wrong)
    return Finding("all-reduce", "ok", f"right over {backend}")


def _add_up(world: World, device: torch.device) -> int:
    """Return the number of wrong sums in some all-reduces."""
    torch.get_device_module(device).set_device(device)  # a property of each thread
    base = torch.arange(NUMBERS, device=device) % 7
    expected = base * world.num_ranks + world.num_ranks * (world.num_ranks - 1) // 2
    sums = [collectives.all_reduce((base + world.rank).float()) for _ in range(4)]
    return sum(int((numbers != expected).sum()) for numbers in sums)


def choose_peers(turn: int, num_ranks: int) -> list[int]:
    """Return each rank's peer in a turn; a rank may be its own. In `num_ranks` turns every two ranks meet once."""
    return [(turn - rank) % num_ranks for rank in range(num_ranks)]


def check_pairs(world: World, device: torch.device, hosts: Sequence[str]) -> Finding:
    """Check that every two ranks reach each other."""
    start, num_done, num_pairs = time.monotonic(), 0, world.num_ranks * (world.num_ranks - 1) // 2
    for turn in range(world.num_ranks):
        # Rank 0's clock decides for all, so that all stop after the same turn.
        if collectives.all_gather(time.monotonic() - start > PAIRS_SECONDS)[0]:
            break
        peers = choose_peers(turn, world.num_ranks)
        peer, error = peers[world.rank], None
        if peer != world.rank:
            _, error = run_with_timeout(SUM_SECONDS, partial(_exchange, peer, device))
        for a, failure in enumerate(collectives.all_gather(error)):
            if failure is not None:
                b = peers[a]
                found = f"ranks {a} ({hosts[a]}) and {b} ({hosts[b]}) cannot talk: {failure}"
                remedy = "Exclude one of the two nodes (sbatch --exclude), and have their network checked"
                return Finding("pairs of ranks", "fail", found, remedy, (a, b))
        num_done += sum(a < b for a, b in enumerate(peers))
    return Finding("pairs of ranks", "ok", f"{num_done} of {num_pairs} pairs exchange data")


def _exchange(peer: int, device: torch.device) -> None:
    """Send and receive a message at the same time."""
    torch.get_device_module(device).set_device(device)  # a property of each thread
    sent, received = torch.zeros(NUMBERS, device=device), torch.empty(NUMBERS, device=device)
    collectives.exchange(sent, received, peer)
    torch.get_device_module(device).synchronize(device)


def measure_work(device: torch.device, dtype: torch.dtype) -> Work:
    """Measure matrix products in the run's precision, on all ranks at the same time."""
    measure_matrix_rate(device, dtype, 0.0)  # warm-up
    collectives.all_gather(None)
    start, cpu_start = time.perf_counter(), time.thread_time()
    rate = measure_matrix_rate(device, dtype, WORK_SECONDS)
    share = (time.thread_time() - cpu_start) / (time.perf_counter() - start)
    return Work(rate, None if device.type == "cuda" else share)


def judge_work(works: Sequence[Work], hosts: Sequence[str], num_cores: Sequence[int]) -> Finding:
    """Name the ranks that are slower than the others, or get too little CPU time, with host and cores."""
    rates = [work.rate for work in works]
    typical = statistics.median(rates) if len(rates) > 2 else max(rates)
    slow: dict[int, str] = {}
    for rank, work in enumerate(works):
        faults: list[str] = []
        if work.rate * SLOW_RANK < typical:
            faults.append(f"computes {typical / work.rate:.1f} times as slowly as others")
            if num_cores[rank] < max(num_cores):
                faults.append(f"has {num_cores[rank]} core(s) instead of {max(num_cores)}")
        if work.share is not None and work.share * SLOW_RANK < 1:
            faults.append(f"gets {work.share:.0%} of the time on its core")
        if faults:
            slow[rank] = f"rank {rank} on {hosts[rank]} {', '.join(faults)}"
    if not slow:
        return Finding("speed", "ok", f"{typical / 1e9:,.0f} GFLOP/s per rank")
    remedy = "Look there for other programs, CPU-time limits, bound cores or heat: every step waits for the slowest rank"
    return Finding("speed", "warn", "; ".join(list(slow.values())[:8]), remedy, tuple(slow))


def measure_clock_offsets(world: World) -> list[float]:
    """Return the seconds that each rank's clock is ahead of rank 0's; exact to the time of a collective."""
    rounds: list[list[float]] = []
    for _ in range(5):
        collectives.all_gather(None)  # all ranks leave it at about the same moment
        rounds.append(collectives.all_gather(time.time()))
    return [statistics.median(times[rank] - times[0] for times in rounds) for rank in range(world.num_ranks)]


def judge_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Name the clocks that differ from the majority."""
    middle = statistics.median(offsets)
    skews = [offset - middle if len(offsets) > 2 else offset for offset in offsets]
    largest = max(map(abs, skews))
    if largest <= SKEW_WARN:
        return Finding("clocks", "ok", f"equal within {max(largest, 0.01):.2f} s")
    wrong = [rank for rank, skew in enumerate(skews) if abs(skew) > SKEW_WARN]
    named = [(f"rank {rank} on {hosts[rank]}", skews[rank]) for rank in wrong[:8]]
    found = "; ".join(f"{name} is {abs(skew):,.1f} s {'ahead' if skew > 0 else 'behind'}" for name, skew in named)
    remedy = "Set the node's clock (chronyc tracking, timedatectl): torchrun takes nodes with wrong clocks for dead"
    return Finding("clocks", "fail" if largest > SKEW_FAIL else "warn", found, remedy, tuple(wrong))
