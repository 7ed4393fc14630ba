"""Shares: every row once, equal numbers of micro-batches, optimal largest slice, little padding on real data.

Every property is a checker that takes a function like `share_batch`. Each checker also runs on a broken one and must fail.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import (
    Efficiency,
    Share,
    measure_efficiency,
    plan_evaluation,
    quadratic_weight,
    share_batch,
    share_by_owner,
)
from agnews_dist.data.rows import Ints
from agnews_dist.errors import UserError
from agnews_dist.features.layout import assign_owners

ShareFunction = Callable[..., Share]

NONE = np.empty(0, np.int64)
LENGTHS = st.lists(st.integers(1, 300), max_size=120).map(lambda values: np.array(sorted(values)[::-1], dtype=np.int64))
GPT2_SMALL = quadratic_weight(768)


def make_share(lengths_B: Ints, bounds_S: Any, num_ranks: int, *, filler: int = 1) -> Share:
    """Make a share with these bounds; tokens are counted slice by slice."""
    bounds = np.array(bounds_S)
    tokens = [
        (end - begin) * int(lengths_B[begin]) if end > begin else filler for begin, end in itertools.pairwise(bounds.tolist())
    ]
    slice_MR = np.arange(len(tokens)).reshape(-1, num_ranks)
    return Share(bounds, slice_MR, np.array(tokens)[slice_MR], int(lengths_B.sum()))


def share_by_count(
    lengths_B: Ints, *, num_ranks: int, accumulation: int = 1, max_tokens_per_rank: int | None = None, quadratic: float = 0
) -> Share:
    """Split a batch into equal numbers of rows, as most samplers do."""
    num_micro = accumulation
    while True:
        slices = num_micro * num_ranks
        found = make_share(lengths_B, np.arange(slices + 1) * len(lengths_B) // slices, num_ranks)
        if max_tokens_per_rank is None or found.tokens_MR.max() <= max_tokens_per_rank:
            return found
        num_micro += 1


# Every row once, every token counted


def check_share(
    share_function: ShareFunction,
    lengths_B: Ints,
    *,
    num_ranks: int,
    accumulation: int = 1,
    limit: int | None = None,
    quadratic: float = 0,
) -> None:
    found = share_function(
        lengths_B, num_ranks=num_ranks, accumulation=accumulation, max_tokens_per_rank=limit, quadratic=quadratic
    )
    slices_RM = [found.slices(rank) for rank in range(num_ranks)]
    assert {len(slices) for slices in slices_RM} == {found.num_micro_batches}, "equal numbers of micro-batches"
    # Counted as a rank computes: rows padded to the longest of the slice, or one filler row of one token.
    tokens_RM = [[max(1, len(lengths_B[rows]) * max(lengths_B[rows], default=0)) for rows in slices] for slices in slices_RM]
    assert found.tokens_MR.T.tolist() == tokens_RM
    rows = [row for slices in slices_RM for part in slices for row in range(len(lengths_B))[part]]
    assert sorted(rows) == list(range(len(lengths_B))), "every row once"
    assert found.num_real_tokens == lengths_B.sum()
    assert found.tokens_MR.sum() == sum(map(sum, tokens_RM))
    assert found.critical_tokens == max(map(sum, tokens_RM))
    assert found.num_micro_batches >= accumulation
    if limit is None:
        assert found.num_micro_batches == accumulation
    else:
        assert max(map(max, tokens_RM)) <= limit


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.none() | st.integers(300, 3000), st.sampled_from([0, GPT2_SMALL, 0.1]))
def test_share_batch_holds_every_row_once(lengths_B, ranks, accumulation, limit, quadratic):
    check_share(share_batch, lengths_B, num_ranks=ranks, accumulation=accumulation, limit=limit, quadratic=quadratic)


@pytest.mark.parametrize("num", [0, 1, 2, 3, 7, 8, 9])
def test_share_batch_of_fewer_rows_than_ranks(num):
    lengths_B = np.arange(num, 0, -1) + 5
    check_share(share_batch, lengths_B, num_ranks=8, accumulation=2)
    found = share_batch(lengths_B, num_ranks=8)
    assert sum(rows == slice(num, num) for rank in range(8) for rows in found.slices(rank)) == max(0, 8 - num)


def test_share_batch_keeps_the_limit_with_many_short_rows():
    """At a quadratic cost one row of 1,024 tokens costs as much as 122 rows of 10, which have more tokens."""
    lengths_B = np.array([1024] + [10] * 500)
    check_share(share_batch, lengths_B, num_ranks=1, limit=1024, quadratic=GPT2_SMALL)


def test_share_batch_is_independent_of_the_storage_type():
    lengths_B = np.sort(np.random.default_rng(0).integers(1, 250, 300))[::-1]
    expected = share_batch(lengths_B, num_ranks=7, accumulation=2, max_tokens_per_rank=900, quadratic=0.01)
    for kind in (np.uint8, np.uint16, np.int32, np.uint64):
        found = share_batch(lengths_B.astype(kind), num_ranks=7, accumulation=2, max_tokens_per_rank=900, quadratic=0.01)
        assert found.bounds_S.tolist() == expected.bounds_S.tolist()
        assert found.tokens_MR.tolist() == expected.tokens_MR.tolist()
        assert found.num_real_tokens == expected.num_real_tokens


def drop_last_row(lengths_B: Ints, **options: Any) -> Share:
    found = share_batch(lengths_B, **options)
    return replace(found, bounds_S=np.minimum(found.bounds_S, len(lengths_B) - 1))


def omit_fillers(lengths_B: Ints, *, num_ranks: int, **options: Any) -> Share:
    return make_share(lengths_B, share_batch(lengths_B, num_ranks=num_ranks, **options).bounds_S, num_ranks, filler=0)


def ignore_accumulation(lengths_B: Ints, *, num_ranks: int, **options: Any) -> Share:
    return share_batch(lengths_B, num_ranks=num_ranks)


def ignore_the_limit(lengths_B: Ints, *, num_ranks: int, accumulation: int, **options: Any) -> Share:
    return share_batch(lengths_B, num_ranks=num_ranks, accumulation=accumulation)


class Skipping(Share):
    def slices(self, rank: int) -> list[slice]:
        return [rows for rows in super().slices(rank) if rows.start < rows.stop]


def skip_empty_slices(lengths_B: Ints, **options: Any) -> Share:
    return Skipping(**vars(share_batch(lengths_B, **options)))


BROKEN = [drop_last_row, omit_fillers, ignore_accumulation, ignore_the_limit, skip_empty_slices]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_share_check_fails_broken_shares(broken):
    lengths_B = np.array([9, 8, 8, 7, 5])
    arguments = {"num_ranks": 1, "limit": 20} if broken is ignore_the_limit else {"num_ranks": 3, "accumulation": 2}
    check_share(share_batch, lengths_B, **arguments)
    with pytest.raises(AssertionError):
        check_share(broken, lengths_B, **arguments)


# Global batch on any number of ranks


def check_topologies(share_function: ShareFunction) -> None:
    """Check that the rows of all ranks and micro-batches are the global batch on every topology."""
    lengths_N = np.random.default_rng(0).integers(8, 300, 1000)
    made, num_checked = plan(lengths_N, PlanSettings(global_batch_size=64), epoch=0), 0
    for step, ids_B in enumerate(made.global_batches()):
        for ranks, accumulation in itertools.product((1, 2, 3, 5, 8, 64, 100), (1, 3)):
            found = share_function(lengths_N[ids_B], num_ranks=ranks, accumulation=accumulation, max_tokens_per_rank=4000)
            computed = [ids_B[rows].tolist() for rank in range(ranks) for rows in found.slices(rank)]
            assert sorted(itertools.chain(*computed)) == sorted(ids_B.tolist()), f"step {step} on {ranks} ranks"
            num_checked += 1
    assert num_checked == made.num_steps * 14 == 16 * 14


def test_ranks_together_compute_the_global_batch():
    check_topologies(share_batch)


def test_topologies_check_fails_a_dropped_remainder():
    def drop_the_remainder(lengths_B: Ints, *, num_ranks: int, accumulation: int, **options: Any) -> Share:
        each = len(lengths_B) // (num_ranks * accumulation)
        return make_share(lengths_B, np.arange(num_ranks * accumulation + 1) * each, num_ranks)

    with pytest.raises(AssertionError, match="step 0 on"):
        check_topologies(drop_the_remainder)


# The best split


def row_costs(lengths_B: Ints, quadratic: float) -> Ints:
    """Return costs in whole sixteenths of a token."""
    return np.array([round(16 * (length + quadratic * length * length)) for length in lengths_B.tolist()], dtype=np.int64)


def largest_cost(found: Share, lengths_B: Ints, quadratic: float) -> int:
    costs_B = row_costs(lengths_B, quadratic)
    return max((end - begin) * max(costs_B[begin:end], default=0) for begin, end in itertools.pairwise(found.bounds_S.tolist()))


def smallest_largest_cost(lengths_B: Ints, num_groups: int, quadratic: float, limit: int | None) -> int | None:
    """Try all groupings of the rows, contiguous or not; None if none keeps every group within the limit."""
    group_PB = np.array(list(itertools.product(range(num_groups), repeat=len(lengths_B))))
    is_in_PGB = group_PB[:, None, :] == np.arange(num_groups)[:, None]
    rows_PG = is_in_PGB.sum(axis=2)
    cost_PG = rows_PG * (is_in_PGB * row_costs(lengths_B, quadratic)).max(axis=2)
    tokens_PG = rows_PG * (is_in_PGB * lengths_B).max(axis=2)
    allowed = np.full(len(group_PB), True) if limit is None else tokens_PG.max(axis=1) <= limit
    return int(cost_PG[allowed].max(axis=1).min()) if allowed.any() else None


def check_best(share_function: ShareFunction, lengths_B: Ints, num_ranks: int, quadratic: float, limit: int | None) -> None:
    found = share_function(lengths_B, num_ranks=num_ranks, max_tokens_per_rank=limit, quadratic=quadratic)
    num_groups = found.num_micro_batches * num_ranks
    if num_groups > 3:
        return
    assert largest_cost(found, lengths_B, quadratic) == smallest_largest_cost(lengths_B, num_groups, quadratic, limit)
    for fewer in range(1, found.num_micro_batches):
        assert smallest_largest_cost(lengths_B, fewer * num_ranks, quadratic, limit) is None, "fewer micro-batches are enough"


SMALL = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(lambda values: np.array(sorted(values)[::-1]))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(SMALL, st.integers(1, 3), st.sampled_from([0.0, GPT2_SMALL, 0.02, 1.0]), st.none() | st.integers(60, 200))
def test_share_batch_has_the_cheapest_largest_slice(lengths_B, num_ranks, quadratic, limit):
    check_best(share_batch, lengths_B, num_ranks, quadratic, limit)


def ignore_quadratic_cost(lengths_B: Ints, **options: Any) -> Share:
    return share_batch(lengths_B, **{**options, "quadratic": 0.0})


def add_a_micro_batch(lengths_B: Ints, *, num_ranks: int, **options: Any) -> Share:
    return share_batch(lengths_B, num_ranks=num_ranks, accumulation=2)


@pytest.mark.parametrize(
    ("broken", "lengths", "num_ranks", "quadratic", "limit"),
    [
        (share_by_count, [50, 9, 8, 7], 2, 0.0, None),
        (ignore_quadratic_cost, [60, 30, 30, 10, 10], 2, 1.0, None),
        (add_a_micro_batch, [5, 5, 5], 1, 0.0, 30),
    ],
)
def test_best_split_check_fails_worse_splits(broken, lengths, num_ranks, quadratic, limit):
    check_best(share_batch, np.array(lengths), num_ranks, quadratic, limit)
    with pytest.raises(AssertionError):
        check_best(broken, np.array(lengths), num_ranks, quadratic, limit)


def test_quadratic_cost_balances_long_texts():
    """Cost of the slowest of 8 ranks over 50 batches, texts of up to 8,192 tokens, width of GPT-2 small."""
    rng, slowest = np.random.default_rng(0), {0.0: 0, GPT2_SMALL: 0}
    for _ in range(50):
        lengths_B = np.sort(np.clip(rng.lognormal(6.5, 1.2, 64), 16, 8192).astype(np.int64))[::-1]
        for quadratic in slowest:
            slowest[quadratic] += largest_cost(share_batch(lengths_B, num_ranks=8, quadratic=quadratic), lengths_B, GPT2_SMALL)
    assert slowest[GPT2_SMALL] < 0.9 * slowest[0.0]


def test_quadratic_weight_of_gpt2_small():
    """Operations per token: 2 for each of 12 d^2 weights; 2 T d for the scores and 2 T d for their weighted sum."""
    tokens, width = 1024, 768
    assert 2 * 2 * tokens * width / (2 * 12 * width**2) == pytest.approx(tokens * quadratic_weight(width))


# Padding on real lengths


@pytest.fixture(scope="module")
def ag_news(shared) -> Ints:
    """120,000 lengths, as many as AG News has, drawn from those of the shared rows."""
    texts = pq.read_table(shared / "data/ag_news/train-00000-of-00001.parquet")["text"].to_pylist()
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers/gpt2/tokenizer.json"))
    lengths = [min(256, len(encoding)) for encoding in tokenizer.encode_batch_fast(texts)]
    return np.random.default_rng(0).choice(np.array(lengths, dtype=np.int64), 120_000)


def critical_path(lengths_N: Ints, batches: list[Ints], num_ranks: int, share_function: ShareFunction = share_batch) -> float:
    """Compute real tokens / (ranks x tokens of the slowest rank) from the slices."""
    real = slowest = 0
    for ids in batches:
        lengths_B = lengths_N[ids]
        found = share_function(lengths_B, num_ranks=num_ranks)
        tokens = [
            sum(max(1, len(lengths_B[rows]) * lengths_B[rows].max(initial=0)) for rows in found.slices(rank))
            for rank in range(num_ranks)
        ]
        real, slowest = real + int(lengths_B.sum()), slowest + max(tokens)
    return real / (num_ranks * slowest)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_ranks", "least"), [(256, 8, 0.985), (4096, 64, 0.98), (64, 2, 0.975)])
def test_critical_path_efficiency_on_real_lengths(ag_news, size, num_ranks, least):
    batches = list(plan(ag_news, PlanSettings(global_batch_size=size), epoch=0).global_batches())
    found = critical_path(ag_news, batches, num_ranks)
    assert found >= least
    figures = measure_efficiency(share_batch(ag_news[ids], num_ranks=num_ranks) for ids in batches)
    assert figures.critical_path == pytest.approx(found)
    assert figures.critical_path == pytest.approx(figures.padding * figures.rank_balance)
    # Negative controls: batches without bucketing, ranks with equal numbers of rows.
    random_batches = plan(ag_news, PlanSettings(global_batch_size=size, bucket_window=1), epoch=0).global_batches()
    assert critical_path(ag_news, list(random_batches), num_ranks) < least
    assert critical_path(ag_news, batches, num_ranks, share_by_count) < found - 0.001


def test_share_batch_balances_ranks_over_micro_batches():
    # Slices of 24, 17, 3 x 8 and 1 tokens: in this order rank 0 would compute 24 + 24.
    found = share_batch(np.array([24, 17, 8, 5, 4, 1]), num_ranks=2, accumulation=2)
    assert sorted(found.tokens_MR.sum(axis=0).tolist()) == [24 + 1, 24 + 17]
    assert found.critical_tokens == 41


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(8, 2), (8, 4), (3, 2)])
def test_share_batch_is_better_than_slices_in_order(ag_news, num_ranks, accumulation):
    batches = list(plan(ag_news[:20_000], PlanSettings(global_batch_size=64), epoch=0).global_batches())
    in_order = critical = 0
    for ids in batches:
        found = share_batch(ag_news[ids], num_ranks=num_ranks, accumulation=accumulation)
        tokens_S = np.empty(found.tokens_MR.size, np.int64)
        tokens_S[found.slice_MR] = found.tokens_MR
        in_order += int(tokens_S.reshape(found.tokens_MR.shape).sum(axis=0).max())
        critical += found.critical_tokens
    assert critical < in_order


def test_measure_efficiency_by_hand():
    # Step 1: 2 x 9 and 3 x 6 tokens. Step 2: 1 x 4 tokens and a filler row. Padded: 41. Slowest rank: 2 x (18 + 4).
    shares = [share_batch(np.array([9, 8, 6, 5, 4]), num_ranks=2), share_batch(np.array([4]), num_ranks=2)]
    assert measure_efficiency(shares) == Efficiency(padding=36 / 41, critical_path=36 / 44, rank_balance=41 / 44)
    assert measure_efficiency([]) == Efficiency(1.0, 1.0, 1.0)


# share_by_owner


def check_owned(
    share_function: Callable[..., tuple[Ints, Share]], lengths_B: Ints, owner_B: Ints, num_ranks: int, limit: int
) -> Share:
    order_B, found = share_function(lengths_B, owner_B, num_ranks=num_ranks, max_tokens_per_rank=limit, quadratic=GPT2_SMALL)
    assert sorted(order_B.tolist()) == list(range(len(lengths_B)))
    slices_RM = [[order_B[rows] for rows in found.slices(rank)] for rank in range(num_ranks)]
    assert {len(slices) for slices in slices_RM} == {found.num_micro_batches}, "equal numbers of micro-batches"
    for rank, slices in enumerate(slices_RM):
        rows = np.concatenate([NONE, *slices])
        assert sorted(rows.tolist()) == np.flatnonzero(owner_B == rank).tolist(), "every row once, on its owner"
        assert all((np.diff(lengths_B[part]) <= 0).all() for part in slices), "longest first"
    tokens_RM = [[max(1, len(part) * max(lengths_B[part], default=0)) for part in slices] for slices in slices_RM]
    assert found.tokens_MR.T.tolist() == tokens_RM
    assert max(map(max, tokens_RM)) <= limit
    assert (found.num_real_tokens, found.tokens_MR.sum()) == (lengths_B.sum(), sum(map(sum, tokens_RM)))
    assert found.critical_tokens == max(map(sum, tokens_RM))
    return found


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.integers(300, 3000), st.randoms(use_true_random=False))
def test_share_by_owner_computes_every_row_on_its_owner(lengths_B, num_ranks, limit, random):
    owner_B = np.array([random.randrange(num_ranks) for _ in lengths_B], np.int64)
    found = check_owned(share_by_owner, lengths_B, owner_B, num_ranks, limit)
    alone = [
        share_batch(lengths_B[owner_B == rank], num_ranks=1, max_tokens_per_rank=limit, quadratic=GPT2_SMALL)
        for rank in range(num_ranks)
    ]
    assert found.num_micro_batches == max(each.num_micro_batches for each in alone), "as many as the fullest rank needs"


@pytest.mark.parametrize("limit", [30, 45, 1_000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_share_by_owner_on_a_grid(num_ranks, limit):
    """Owners: one for all rows, in turn, in runs, balanced; with one and with several micro-batches."""
    for num_rows in (0, 1, 2, 7, 40):
        lengths_B = np.sort(np.random.default_rng(num_rows).integers(1, 31, num_rows))[::-1]
        everything = np.arange(num_rows)
        for owner_B in (
            np.zeros(num_rows, np.int64),
            np.full(num_rows, num_ranks - 1),
            everything % num_ranks,
            everything * num_ranks // max(num_rows, 1),
            assign_owners(lengths_B, num_ranks),
        ):
            check_owned(share_by_owner, lengths_B, owner_B, num_ranks, limit)


def ignore_the_owner(lengths_B: Ints, owner_B: Ints, **options: Any) -> tuple[Ints, Share]:
    return np.arange(len(lengths_B)), share_batch(lengths_B, **options)


def raise_the_limit(lengths_B: Ints, owner_B: Ints, *, max_tokens_per_rank: int, **options: Any) -> tuple[Ints, Share]:
    return share_by_owner(lengths_B, owner_B, max_tokens_per_rank=10**6, **options)


def ignore_the_order(lengths_B: Ints, owner_B: Ints, **options: Any) -> tuple[Ints, Share]:
    return np.arange(len(lengths_B)), share_by_owner(lengths_B, owner_B, **options)[1]


def drop_a_micro_batch(lengths_B: Ints, owner_B: Ints, **options: Any) -> tuple[Ints, Share]:
    order_B, found = share_by_owner(lengths_B, owner_B, **options)
    return order_B, replace(found, slice_MR=found.slice_MR[:-1], tokens_MR=found.tokens_MR[:-1])


@pytest.mark.parametrize("broken", [ignore_the_owner, raise_the_limit, ignore_the_order, drop_a_micro_batch])
def test_owner_check_fails_broken_shares(broken):
    lengths_B, owner_B = np.array([9, 8, 5, 5, 2, 1]), np.array([1, 1, 1, 0, 1, 0])
    found = check_owned(share_by_owner, lengths_B, owner_B, 2, 12)
    assert found.num_micro_batches == 3, "the fullest rank needs three, the other gets filler rows"
    with pytest.raises(AssertionError):
        check_owned(broken, lengths_B, owner_B, 2, 12)


def test_share_by_owner_by_hand():
    # Rank 1 holds 9, 8 and 2, rank 0 holds 5: 3 x 9 tokens against 5.
    order_B, found = share_by_owner(np.array([9, 8, 5, 2]), np.array([1, 1, 0, 1]), num_ranks=2, max_tokens_per_rank=100)
    assert order_B.tolist() == [2, 0, 1, 3]
    assert found.tokens_MR.tolist() == [[5, 27]]
    assert measure_efficiency([found]) == Efficiency(padding=24 / 32, critical_path=24 / 54, rank_balance=32 / 54)


def test_share_by_owner_refuses_a_row_above_the_limit():
    with pytest.raises(UserError, match=r"^max_tokens_per_rank 8 is below the longest text \(9 tokens\): .*Raise batch"):
        share_by_owner(np.array([9, 1]), np.array([1, 0]), num_ranks=2, max_tokens_per_rank=8)


# Wrong input


def test_share_batch_refuses_a_limit_below_the_longest_text():
    with pytest.raises(
        UserError, match=r"^max_tokens_per_rank 8 is below the longest text \(9 tokens\): .*Raise batch.*, or lower data"
    ):
        share_batch(np.array([9, 1]), num_ranks=1, max_tokens_per_rank=8)
    assert share_batch(np.array([9, 1]), num_ranks=1, max_tokens_per_rank=9).num_micro_batches == 2


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(0, 1), (1, 0), (-2, 3)])
def test_share_batch_refuses_no_rank_and_no_micro_batch(num_ranks, accumulation):
    with pytest.raises(UserError, match=rf"^num_ranks {num_ranks}, accumulation {accumulation}: .*Set both to 1 or more"):
        share_batch(np.array([9, 1]), num_ranks=num_ranks, accumulation=accumulation)


@pytest.mark.parametrize("lengths", [[9, 3, 4], [4, 0], [-1]])
def test_share_batch_refuses_unsorted_and_empty_texts(lengths):
    with pytest.raises(
        UserError, match=rf"^lengths of {min(lengths)} to {max(lengths)} tokens are not sorted or below 1.*Sort them"
    ):
        share_batch(np.array(lengths), num_ranks=2)


# Evaluation


def check_evaluation(planner: Callable[..., list[Ints]], lengths_N: Ints, max_tokens: int) -> None:
    found = planner(lengths_N, max_tokens=max_tokens)
    assert sorted(itertools.chain(*(ids.tolist() for ids in found))) == list(range(len(lengths_N)))
    order_N = np.concatenate([NONE, *found])
    assert (np.diff(lengths_N[order_N]) <= 0).all()
    for ids, following in itertools.zip_longest(found, found[1:]):
        assert len(ids) == 1 or len(ids) * lengths_N[ids[0]] <= max_tokens
        # Full: one more row does not fit.
        assert following is None or (len(ids) + 1) * lengths_N[ids[0]] > max_tokens


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=200).map(lambda values: np.array(values, dtype=np.int64)), st.integers(100, 2000))
def test_plan_evaluation_fills_batches_with_every_example_once(lengths_N, max_tokens):
    check_evaluation(plan_evaluation, lengths_N, max_tokens)
    stored = [ids.tolist() for ids in plan_evaluation(lengths_N.astype(np.uint16), max_tokens=max_tokens)]
    assert stored == [ids.tolist() for ids in plan_evaluation(lengths_N, max_tokens=max_tokens)]


@pytest.mark.parametrize("max_tokens_taken", [50, 400])
def test_evaluation_check_fails_other_batches(max_tokens_taken):
    lengths_N = np.arange(1, 41)
    with pytest.raises(AssertionError):
        check_evaluation(lambda lengths, max_tokens: plan_evaluation(lengths, max_tokens=max_tokens_taken), lengths_N, 200)
    with pytest.raises(AssertionError):
        check_evaluation(lambda lengths, max_tokens: plan_evaluation(lengths, max_tokens=max_tokens)[:-1], lengths_N, 200)


@pytest.mark.parametrize("quadratic", [-0.1, np.nan, np.inf, 1e15])
def test_share_batch_refuses_a_quadratic_weight_out_of_range(quadratic):
    with pytest.raises(UserError, match=r"^quadratic .*Set it to quadratic_weight\(hidden_dim\), or to 0\."):
        share_batch(np.array([9, 1]), num_ranks=1, quadratic=quadratic)


def test_share_batch_refuses_a_limit_of_zero_without_rows():
    with pytest.raises(UserError, match=r"^max_tokens_per_rank 0 is below the longest text \(0 tokens\)"):
        share_batch(NONE, num_ranks=1, max_tokens_per_rank=0)


def test_share_batch_refuses_lengths_that_are_not_integers():
    with pytest.raises(UserError, match=r"^lengths of 1 dimension\(s\) and type float64: .*Give one whole number"):
        share_batch(np.array([3.5, 2.5]), num_ranks=1)
