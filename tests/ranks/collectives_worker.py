"""Worker of test_collectives.py: checks on each of two ranks, in the same order on both."""

import math
import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agnews_dist.distributed import collectives, rendezvous
from agnews_dist.distributed.world import detect_world
from agnews_dist.errors import SharedError, UserError

SMALL = collectives.SMALL_BYTES


def check_values(rank: int) -> None:
    """Check values of all sizes around the limit of a single collective, also if the ranks' sizes differ."""
    for size in (0, SMALL - 60, SMALL - 1, SMALL, SMALL + 1, 100_000):
        mine = (rank, os.urandom(size if rank else 1))
        sent = collectives.all_gather(mine)
        assert sent[rank] == mine
        assert [len(content) for _, content in sent] == [1, size]
        assert collectives.all_gather(sent) == [sent, sent], "each rank received the other's bytes"
    numbers = (float(rank), math.inf, -0.0, 0.1 + rank)
    assert collectives.gather_numbers(numbers) == [(0.0, math.inf, -0.0, 0.1), (1.0, math.inf, -0.0, 1.1)]
    assert math.isnan(collectives.gather_numbers([math.nan])[1 - rank][0])


def check_flips(rank: int) -> None:
    """Check that one flipped bit in what rank 1 receives is an error there; nothing depends on which bit."""
    all_gather, rng = dist.all_gather, random.Random(3)

    def flip(received: list[torch.Tensor], sent: torch.Tensor, **options: Any) -> None:
        all_gather(received, sent, **options)
        if rank == 1:
            row = received[rng.randrange(2)]
            row[rng.randrange(len(row))] ^= 1 << rng.randrange(8)

    for _ in range(100):
        for gather in (lambda: collectives.all_gather("a value"), lambda: collectives.gather_numbers([1.5, float(rank)])):
            dist.all_gather = flip
            try:
                gather()
                error = ""
            except UserError as raised:
                error = str(raised)
            dist.all_gather = all_gather
            assert ("to rank 1: bits have flipped on the way. Check memory and network of" in error) == (rank == 1), error


def check_replicas(rank: int) -> None:
    """Check that ranks with equal tensors pass and that another bit is an error on both."""
    weights = [torch.arange(5.0), torch.ones(3)]
    collectives.check_replicas(collectives.sum_bits(weights), "weights")
    if rank == 1:
        weights[1][2] = 1 + 2**-23
    with pytest.raises(SharedError, match=r"^weights on rank 1: other bits than on rank 0\. A memory, device or network is "):
        collectives.check_replicas(collectives.sum_bits(weights), "weights")


def main() -> None:
    world = detect_world(os.environ)
    rendezvous.open_process_group(world, "gloo", 60)
    check_values(world.rank)
    print("values arrive exactly", flush=True)
    check_flips(world.rank)
    print("flipped bits are found", flush=True)
    check_replicas(world.rank)
    print("other weights are named", flush=True)
    collectives.close()


if __name__ == "__main__":
    main()
