"""Do the ranks hear each other right, how fast, and is one of them slow? Collective: every rank calls each function here."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.preflight.findings import Finding, is_no_end, rank_words, within

NUMBERS = 1 << 18
"""Of 4 bytes: 1 MiB, as much as a bucket of gradients of a small block."""
REPEATS = 4
SUM_SECONDS = 20.0
"""NCCL's first collective makes its connections."""
PAIRS_SECONDS = 15.0
"""For all of them; what is left then is not looked at."""
ALL_PAIRS_UP_TO = 8
SLOW_PAIR = 4.0
"""A pair this much slower than others of its kind is told."""
SLOW_RANK = 1.5
STARVED = 1 / SLOW_RANK
"""Of the time; a rank that runs for less is told even if all the others run as little."""
WORK_SECONDS = 1.5
"""Long beside the tenths of a second in which a limit on CPU time comes and goes."""
SKEW_WARN, SKEW_FAIL = 1.0, 10.0
"""Seconds. torchrun's agents compare each other's clocks: after 15 s without a heartbeat a node counts as dead."""


@dataclass(frozen=True)
class Work:
    """What a rank computed in some seconds."""

    rate: float
    """Floating-point operations per second."""
    share: float | None
    """Of the time in which its main thread was let run; None on a GPU, where it only waits."""


def check_sum(world: World, device: torch.device) -> tuple[Finding, float | None]:
    """An all-reduce whose result is known, and its bytes per second; None with one rank, or where it fails."""
    if world.num_ranks == 1:
        return Finding(check="all-reduce", verdict="ok", found="one rank: nothing to add up"), None
    mine = within(SUM_SECONDS, lambda: _sums(world, device))
    by_rank = collectives.all_gather(mine)
    over = "NCCL" if device.type == "cuda" else "gloo"
    broken = {rank: outcome.error for rank, outcome in enumerate(by_rank) if outcome.error is not None}
    if broken:
        # Others only wait for the one that has an error.
        told = sorted(broken.items(), key=lambda item: is_no_end(item[1]))
        errors = "; ".join(f"{error} on {rank_words([rank], 0)}" for rank, error in told[:4])
        remedy = "Look at NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME (launch/network.sh) and for a firewall between the nodes"
        return Finding(
            check="all-reduce", verdict="fail", found=f"fails over {over}: {errors}", remedy=remedy, ranks=tuple(broken)
        ), None
    values = [outcome.value for outcome in by_rank if outcome.value is not None]
    rate = 4 * NUMBERS / max(seconds for _, seconds in values)
    bad = [rank for rank, (wrong, _) in enumerate(values) if wrong]
    if bad:
        found = f"wrong sums on {len(bad)} of {world.num_ranks} ranks, first on rank {bad[0]}"
        remedy = "Gradients would be wrong as well: have network cards and memory of these nodes tested"
        return Finding(check="all-reduce", verdict="fail", found=found, remedy=remedy, ranks=tuple(bad)), rate
    return Finding(check="all-reduce", verdict="ok", found=f"right, {rate / 1e6:,.0f} MB/s over {over}"), rate


def _sums(world: World, device: torch.device) -> tuple[int, float]:
    """(wrong numbers, seconds of the fastest) of some all-reduces. Nothing else is asked of other ranks: they may hang."""
    _settle(device)
    places = torch.arange(NUMBERS, device=device) % 7
    right = places * world.num_ranks + world.num_ranks * (world.num_ranks - 1) // 2
    seconds: list[float] = []
    wrong = 0
    for _ in range(REPEATS):
        numbers = (places + world.rank).float()
        _wait_for(device)
        start = time.perf_counter()
        collectives.all_reduce(numbers)
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
        wrong += int((numbers != right).sum())
    return wrong, min(seconds)


def pairs_that_matter(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """All pairs of up to 8 ranks; of more, neighbours in the ring that reductions take, and the first ranks of the nodes."""
    num_ranks = len(hosts)
    if num_ranks <= ALL_PAIRS_UP_TO:
        return [(a, b) for a in range(num_ranks) for b in range(a + 1, num_ranks)]
    first = list({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())
    leaders = sorted(first)
    ring = [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]
    of_nodes = [(leaders[0], leader) for leader in leaders[1:]]
    return sorted({(min(pair), max(pair)) for pair in ring + of_nodes})


def check_pairs(world: World, device: torch.device, hosts: Sequence[str]) -> Finding:
    """Bytes per second between ranks, both ways at the same time, one pair after the other: others share their way."""
    pairs = pairs_that_matter(hosts)
    if not pairs:
        return Finding(check="pairs of ranks", verdict="ok", found="one rank")
    mine: dict[tuple[int, int], float] = {}
    problem: str | None = None
    begun, num_done = time.monotonic(), 0
    for pair in pairs:
        # One for all, so that all stop at the same pair.
        if (
            collectives.all_gather((problem, time.monotonic() - begun > PAIRS_SECONDS))
            != [(None, False)] * world.num_ranks
        ):
            break
        num_done += 1
        if world.rank in pair:
            peer = pair[1] if world.rank == pair[0] else pair[0]
            outcome = within(SUM_SECONDS, partial(_exchanges, peer, device))
            problem = outcome.error
            if outcome.value is not None and world.rank == pair[0]:
                mine[pair] = 2 * 4 * NUMBERS / outcome.value
    broken = [(rank, error) for rank, error in enumerate(collectives.all_gather(problem)) if error is not None]
    if broken:
        a, b = pairs[num_done - 1]
        found = f"ranks {a} ({hosts[a]}) and {b} ({hosts[b]}) cannot talk: {broken[0][1]}"
        remedy = "Leave one of the two nodes out (sbatch --exclude), and have their network looked at"
        return Finding(check="pairs of ranks", verdict="fail", found=found, remedy=remedy, ranks=(a, b))
    rates = {pair: rate for found in collectives.all_gather(mine) for pair, rate in found.items()}
    judged = judge_pairs(rates, hosts)
    left = (
        f"; {len(pairs) - num_done} of {len(pairs)} pairs left out, for want of time" if num_done < len(pairs) else ""
    )
    return replace(judged, found=judged.found + left)


def _exchanges(peer: int, device: torch.device) -> float:
    """Seconds of the fastest of some exchanges with `peer`."""
    _settle(device)
    sent, received = torch.zeros(NUMBERS, device=device), torch.empty(NUMBERS, device=device)
    seconds: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        collectives.exchange(sent, received, peer)
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def judge_pairs(rates: dict[tuple[int, int], float], hosts: Sequence[str]) -> Finding:
    """The slowest pair named, if it is much slower than others of its kind: within a node, or between nodes."""
    slow: list[str] = []
    spans: list[str] = []
    for kind, inside in (("within a node", True), ("between nodes", False)):
        own = {pair: rate for pair, rate in rates.items() if (hosts[pair[0]] == hosts[pair[1]]) == inside}
        if not own:
            continue
        typical = statistics.median(own.values())
        spans.append(f"{kind} {min(own.values()) / 1e6:,.0f} to {max(own.values()) / 1e6:,.0f} MB/s")
        slow += [
            f"ranks {a} ({hosts[a]}) and {b} ({hosts[b]}): {rate / 1e6:,.0f} MB/s, others {typical / 1e6:,.0f}"
            for (a, b), rate in own.items()
            if rate * SLOW_PAIR < typical
        ]
    if not slow:
        return Finding(check="pairs of ranks", verdict="ok", found=", ".join(spans))
    remedy = (
        "Every step waits for the slowest way: leave that node out (sbatch --exclude), or look at its cable and card"
    )
    return Finding(check="pairs of ranks", verdict="warn", found="; ".join(slow[:4]), remedy=remedy)


def work(device: torch.device, dtype: torch.dtype) -> Work:
    """Matrix products in the run's own type, on all ranks at the same time."""
    side = 4096 if device.type == "cuda" else 384
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    _wait_for(device)
    collectives.all_gather(None)
    count, start, ran = 0, time.perf_counter(), time.thread_time()
    while (seconds := time.perf_counter() - start) < WORK_SECONDS:
        for _ in range(8):
            torch.mm(left, right)
        _wait_for(device)
        count += 8
    share = (time.thread_time() - ran) / seconds
    return Work(count * 2 * side**3 / seconds, None if device.type == "cuda" else share)


def judge_work(done: Sequence[Work], hosts: Sequence[str], cores: Sequence[int]) -> Finding:
    """The ranks that are slow beside the others, or are not let run, each with its host and its cores."""
    rates = [own.rate for own in done]
    typical = max(rates) if len(rates) < 3 else statistics.median(rates)
    told: dict[int, str] = {}
    for rank, own in enumerate(done):
        words: list[str] = []
        if own.rate * SLOW_RANK < typical:
            words.append(f"computes {typical / own.rate:.1f} times as slowly as others")
            if cores[rank] < max(cores):
                words.append(f"has {cores[rank]} core(s) instead of {max(cores)}")
        if own.share is not None and own.share < STARVED:
            words.append(f"gets {own.share:.0%} of the time on its core")
        if words:
            told[rank] = f"rank {rank} on {hosts[rank]} {', '.join(words)}"
    if not told:
        return Finding(check="speed", verdict="ok", found=f"{typical / 1e9:,.0f} GFLOP/s per rank")
    remedy = "Every step waits for it: look there for other programs, a limit on CPU time, bound cores, or heat"
    found = "; ".join(list(told.values())[:8])
    return Finding(check="speed", verdict="warn", found=found, remedy=remedy, ranks=tuple(told))


def clock_offsets(world: World) -> list[float]:
    """How far each rank's clock is ahead of rank 0's, in seconds, on every rank; right within the time of a meeting."""
    rounds: list[list[float]] = []
    for _ in range(5):
        collectives.all_gather(None)  # all leave it within a moment
        rounds.append(collectives.all_gather(time.time()))
    return [statistics.median(times[rank] - times[0] for times in rounds) for rank in range(world.num_ranks)]


def judge_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """The clocks that are wrong beside the others'."""
    middle = statistics.median(offsets)
    skews = [offset - middle if len(offsets) > 2 else offset for offset in offsets]
    worst = max(map(abs, skews))
    if worst <= SKEW_WARN:
        return Finding(check="clocks", verdict="ok", found=f"together within {max(worst, 0.01):.2f} s")
    wrong = [rank for rank, skew in enumerate(skews) if abs(skew) > SKEW_WARN]
    told = "; ".join(
        f"rank {rank} on {hosts[rank]} is {abs(skews[rank]):,.1f} s {'ahead' if skews[rank] > 0 else 'behind'}"
        for rank in wrong[:8]
    )
    remedy = (
        "Have the node's clock set (chronyc tracking, timedatectl): torchrun takes nodes with wrong clocks for dead"
    )
    verdict = "fail" if worst > SKEW_FAIL else "warn"
    return Finding(check="clocks", verdict=verdict, found=told, remedy=remedy, ranks=tuple(wrong))


def _settle(device: torch.device) -> None:
    """The current GPU is a thread's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
