"""Collectives between two real ranks: values arrive exactly, and a bit that flips on the way is an error."""

import pytest
import torch
from support import fork_server
from support.processes import REPOSITORY

from agnews_dist.distributed.collectives import sum_bits

WORKER = REPOSITORY / "tests" / "ranks" / "collectives_worker.py"


@pytest.fixture(scope="module")
def printed() -> str:
    """The output of both ranks of the worker; each checks itself."""
    done = fork_server.run_ranks(2, str(WORKER))
    return done.stdout


@pytest.mark.parametrize("check", ["values arrive exactly", "flipped bits are found", "other weights are named"])
def test_collectives_on_two_ranks(printed, check):
    assert printed.splitlines().count(check) == 2


def test_any_flipped_bit_changes_the_sum():
    sizes = {torch.float32: 5, torch.bfloat16: 3, torch.int64: 2, torch.uint8: 1}
    tensors = [*(torch.arange(size).to(kind) for kind, size in sizes.items()), torch.tensor(2.5), torch.empty(0)]
    before = sum_bits(tensors)
    contents = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    for content in contents:
        for position in range(8 * len(content)):
            content[position // 8] ^= 1 << position % 8
            assert sum_bits(tensors) != before, position
            content[position // 8] ^= 1 << position % 8
    assert sum_bits(tensors) == before
    assert sum_bits([tensors[1], tensors[0], *tensors[2:]]) != before, "the order counts"
    transposed = torch.arange(6.0).view(2, 3)
    assert sum_bits([transposed.T]) == sum_bits([transposed.T.contiguous()])
