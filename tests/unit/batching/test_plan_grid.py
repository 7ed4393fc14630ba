"""Plan and shares over a grid of thousands of topologies, without processes.

Checks use whole arrays; test_epoch_plan.py and test_shares.py check every row.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import Share, share_batch
from agnews_dist.data.rows import Ints

NUM_EXAMPLES = (0, 1, 2, 3, 5, 7, 8, 13, 31, 64, 97, 251)
NO_EXAMPLES = np.empty(0, np.int64)
RANKS = (1, 2, 3, 5, 8, 64)
ACCUMULATION = (1, 2, 5)
LIMITS = (None, 400)
BUDGETS = (
    *(PlanSettings(global_batch_size=size) for size in (1, 7, 32)),
    *(PlanSettings(global_token_budget=budget, bucket_window=3) for budget in (300, 2000)),
)


def draw_lengths(num: int) -> Ints:
    return np.random.default_rng(num).integers(1, 301, num)


def check_topology(lengths_N: Ints, batches: list[Ints], shares: list[Share], num_ranks: int, accumulation: int) -> None:
    assert len(shares) == len(batches), "one share per step"
    for ids_B, found in zip(batches, shares, strict=True):
        lengths_B, rows_S = lengths_N[ids_B], np.diff(found.bounds_S)
        # Consecutive slices from the first row to the last hold every row once.
        assert found.bounds_S[0] == 0
        assert found.bounds_S[-1] == len(ids_B)
        assert rows_S.min() >= 0
        assert found.tokens_MR.shape == found.slice_MR.shape == (len(rows_S) // num_ranks, num_ranks)
        assert (np.sort(found.slice_MR, axis=None) == np.arange(len(rows_S))).all()
        assert found.num_micro_batches >= accumulation
        first_S = np.minimum(found.bounds_S[:-1], len(ids_B) - 1)
        assert (found.tokens_MR == np.maximum(1, rows_S * lengths_B[first_S])[found.slice_MR]).all()
        assert found.num_real_tokens == lengths_B.sum()


def check_grid(change) -> int:
    """Check all topologies after `change` to their shares; returns the number of topologies."""
    num_checked = 0
    for num, budget in itertools.product(NUM_EXAMPLES, BUDGETS):
        lengths_N = draw_lengths(num)
        batches = list(plan(lengths_N, budget, epoch=0).global_batches())
        assert (np.sort(np.concatenate([NO_EXAMPLES, *batches])) == np.arange(num)).all()
        for num_ranks, accumulation, limit in itertools.product(RANKS, ACCUMULATION, LIMITS):
            shares = [
                share_batch(lengths_N[ids], num_ranks=num_ranks, accumulation=accumulation, max_tokens_per_rank=limit)
                for ids in batches
            ]
            assert limit is None or all(found.tokens_MR.max() <= limit for found in shares)
            check_topology(lengths_N, batches, change(shares), num_ranks, accumulation)
            num_checked += 1
    return num_checked


@pytest.mark.slow
def test_grid_computes_every_example_once():
    assert check_grid(lambda shares: shares) == 12 * 5 * 6 * 3 * 2 == 2160


def drop_last_row(shares: list[Share]) -> list[Share]:
    return [replace(s, bounds_S=np.minimum(s.bounds_S, s.bounds_S[-1] - 1)) for s in shares]


def drop_last_step(shares: list[Share]) -> list[Share]:
    return shares[:-1]


@pytest.mark.parametrize("harm", [drop_last_row, drop_last_step], ids=lambda f: f.__name__)
def test_grid_check_fails_a_lost_row_or_step(harm):
    with pytest.raises(AssertionError):
        check_grid(harm)
