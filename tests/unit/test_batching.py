"""The plan: exactly once, the same global batches on any number of ranks, equal micro-batch counts, little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_dist.data.batching import Plan, efficiency, plan_epoch, plan_evaluation, share
from agnews_dist.errors import UserError

LENGTHS = st.lists(st.integers(1, 300), max_size=400).map(lambda values: np.array(values, dtype=np.int64))


def ag_news_like(num: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(3.9, 0.33, num), 8, 323).astype(np.int64)


def make_plan(lengths: np.ndarray, size: int = 32, window: int = 64, seed: int = 0, epoch: int = 0) -> Plan:
    return plan_epoch(lengths, global_batch_size=size, bucket_window=window, seed=seed, epoch=epoch)


def batches(plan: Plan) -> list[list[int]]:
    return [plan.global_batch(step).tolist() for step in range(plan.num_steps)]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 10), st.integers(0, 5))
def test_every_example_exactly_once_in_batches_of_the_asked_size(lengths, size, window, epoch):
    found = batches(make_plan(lengths, size, window, epoch=epoch))
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert len(found) == -(-len(lengths) // size)
    sizes = sorted((len(batch) for batch in found), reverse=True)
    assert all(count == size for count in sizes[:-1])
    for batch in found:
        assert (np.diff(lengths[batch]) <= 0).all()


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(300, 3000))
def test_share_deals_every_row_once_and_every_rank_the_same_number_of_micro_batches(lengths, num_ranks, limit):
    lengths = -np.sort(-lengths)
    dealt = share(lengths, num_ranks=num_ranks, max_tokens_per_rank=limit)
    rows = [row for micro in dealt.slices for begin, end in micro for row in range(begin, end)]
    assert sorted(rows) == list(range(len(lengths)))
    assert {len(micro) for micro in dealt.slices} == {num_ranks}
    costs = [
        [(end - begin) * int(lengths[begin]) if end > begin else 1 for begin, end in micro] for micro in dealt.slices
    ]
    assert max(itertools.chain(*costs)) <= limit
    assert dealt.num_real_tokens == lengths.sum()
    assert dealt.num_padded_tokens == sum(map(sum, costs))
    assert dealt.critical_tokens == sum(map(max, costs))


def test_the_plan_does_not_know_the_ranks_and_epochs_differ():
    lengths = ag_news_like(1000)
    assert batches(make_plan(lengths)) == batches(make_plan(lengths))
    first, second = batches(make_plan(lengths, epoch=0)), batches(make_plan(lengths, epoch=1))
    other_seed = batches(make_plan(lengths, seed=1))
    assert first != second
    assert first != other_seed
    # Batch mates change from epoch to epoch, even among examples of equal length.
    same = np.full(1000, 50, dtype=np.int64)
    mates = {frozenset(batch) for batch in batches(make_plan(same, epoch=0))}
    assert not mates & {frozenset(batch) for batch in batches(make_plan(same, epoch=1))}


def test_the_order_of_batches_is_not_by_length():
    lengths = ag_news_like(6400)
    longest = [int(lengths[batch[0]]) for batch in batches(make_plan(lengths))]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2
    # Sorted inside each window shows between neighbours, however many windows there are.
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


def test_a_short_batch_takes_a_random_place_among_the_lengths():
    lengths = ag_news_like(650)
    ranks_of_short = set()
    for epoch in range(20):
        found = sorted(batches(make_plan(lengths, epoch=epoch)), key=lambda batch: -lengths[batch[0]])
        ranks_of_short.add(next(i for i, batch in enumerate(found) if len(batch) != 32))
    assert len(ranks_of_short) > 5


def test_random_bits_are_the_ones_numpy_guarantees():
    # Frozen values: a run resumed under another numpy must see the same batches.
    plan = plan_epoch(np.arange(1, 13), global_batch_size=4, bucket_window=2, seed=7, epoch=3)
    assert batches(plan) == [[4, 3, 2, 1], [11, 10, 7, 5], [9, 8, 6, 0]]


@pytest.mark.parametrize(("size", "num_ranks", "least"), [(256, 8, 0.975), (64, 2, 0.97), (32, 2, 0.95), (32, 1, 0.97)])
def test_little_padding_on_the_critical_path(size, num_ranks, least):
    lengths = ag_news_like(60_000)
    plan = make_plan(lengths, size)
    dealt = [
        share(lengths[plan.global_batch(k)], num_ranks=num_ranks, max_tokens_per_rank=16384)
        for k in range(plan.num_steps)
    ]
    figures = efficiency([(d.num_real_tokens, d.num_padded_tokens, d.critical_tokens) for d in dealt], num_ranks)
    assert figures.critical_path == pytest.approx(figures.padding * figures.rank_balance)
    assert figures.critical_path >= least
    # Negative control: contiguous slices of equal counts, instead of equal cost, are worse.
    real = padded = 0
    for k in range(plan.num_steps):
        parts = np.array_split(lengths[plan.global_batch(k)], num_ranks)
        padded += num_ranks * max(len(part) * int(part.max()) for part in parts)
        real += sum(int(part.sum()) for part in parts)
    assert num_ranks == 1 or figures.critical_path > real / padded


def test_fewer_examples_than_ranks_leaves_empty_slices():
    dealt = share(np.array([9, 4]), num_ranks=5, max_tokens_per_rank=16)
    assert [end - begin for begin, end in dealt.slices[0]] == [1, 1, 0, 0, 0]
    assert len(dealt.slices) == 1


def test_no_examples_no_steps():
    assert make_plan(np.empty(0, np.int64)).num_steps == 0
    assert plan_evaluation(np.empty(0, np.int64), max_tokens=10) == []
    assert efficiency([], 3).critical_path == 1.0


def test_bad_lengths_are_refused():
    with pytest.raises(UserError, match=r"example 1 has 0 tokens.*Remove the row"):
        make_plan(np.array([3, 0]))
    with pytest.raises(UserError, match=r"max_tokens_per_rank 8 is below the longest text \(9 tokens\).*Raise it"):
        share(np.array([9, 1]), num_ranks=1, max_tokens_per_rank=8)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(300, 2000))
def test_evaluation_covers_every_example_once_within_the_budget(lengths, limit):
    found = plan_evaluation(lengths, max_tokens=limit)
    assert sorted(itertools.chain(*[ids.tolist() for ids in found])) == list(range(len(lengths)))
    assert all(len(ids) * lengths[ids].max() <= limit for ids in found)
