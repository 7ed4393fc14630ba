"""Micro-batches of a rank: right-padded tokens, filler rows of weight 0, equal numbers on all ranks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.toy import toy_split

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import measure_efficiency
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.features.layout import assign_owners

PAD = 7


@pytest.fixture(scope="module")
def table() -> TokenTable:
    """Three texts, two of which contain the pad id: as the last token and as the first."""
    rows = TokenSplit(
        name="hand",
        tokens=np.array([1, 2, PAD, 5, PAD, 6], np.uint16),
        offsets=np.array([0, 3, 4, 6], np.int64),
        labels=np.array([2, 0, 3], np.int64),
        num_truncated=0,
    )
    return TokenTable(rows, pad_id=PAD, device=torch.device("cpu"))


def test_batch_takes_lengths_from_the_offsets_not_from_the_pad_id(table):
    batch = table.batch(np.array([2, 0, 1]))
    assert batch.tokens_BT.tolist() == [[PAD, 6, PAD], [1, 2, PAD], [5, PAD, PAD]]
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.lengths_B.tolist() == [2, 3, 1]
    assert batch.labels_B.tolist() == [3, 2, 0]
    assert batch.weights_B.tolist() == [1, 1, 1]
    assert batch.ids_B.tolist() == [2, 0, 1]


def test_batch_without_ids_is_a_filler_row(table):
    batch = table.batch(np.empty(0, np.int64))
    assert (batch.tokens_BT.tolist(), batch.lengths_B.tolist()) == ([[PAD]], [1])
    assert 0 <= batch.labels_B.item() < 4
    assert (batch.weights_B.tolist(), batch.ids_B.tolist()) == ([0], [-1])


def make_loaders(lengths: list[int], num_ranks: int, settings: PlanSettings, **limits) -> list[TrainLoader]:
    table = TokenTable(toy_split(lengths), pad_id=0, device=torch.device("cpu"))
    limits = {"max_tokens_per_rank": 40, "quadratic": 0.0} | limits
    return [TrainLoader(table, World(rank=rank, num_ranks=num_ranks), settings, **limits) for rank in range(num_ranks)]


def draw_uniform_lengths(num_examples: int) -> list[int]:
    return np.random.default_rng(0).integers(1, 30, num_examples).tolist()


SETTINGS = PlanSettings(global_batch_size=12, bucket_window=2, seed=4)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, global_token_budget=70)], ids=["examples", "tokens"])
@pytest.mark.parametrize(("num_examples", "num_ranks"), [(37, 1), (37, 3), (37, 16), (3, 5)])
def test_ranks_compute_each_example_once_in_equal_numbers_of_micro_batches(num_examples, num_ranks, settings):
    lengths = draw_uniform_lengths(num_examples)
    epoch = plan(np.array(lengths), settings, epoch=1)
    by_rank = [list(loader.steps(1)) for loader in make_loaders(lengths, num_ranks, settings)]
    assert {len(steps) for steps in by_rank} == {epoch.num_steps}
    num_fillers = 0
    for step, of_ranks in enumerate(zip(*by_rank, strict=True)):
        assert len({len(batches.micro_batches) for batches in of_ranks}) == 1
        assert {batches.num_examples for batches in of_ranks} == {len(epoch.global_batch(step))}
        micro_batches = [batch for batches in of_ranks for batch in batches.micro_batches]
        counted = [row for batch in micro_batches for row in batch.ids_B[batch.weights_B > 0].tolist()]
        assert sorted(counted) == sorted(epoch.global_batch(step).tolist())
        num_fillers += sum(batch.weights_B.tolist() == [0] for batch in micro_batches)
        assert sum(float(batch.weights_B.sum()) for batch in micro_batches) == len(counted)
    assert (num_fillers > 0) == (num_ranks > 1), "control: cases with and without idle ranks"


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, global_token_budget=70)], ids=["examples", "tokens"])
@pytest.mark.parametrize(("num_examples", "num_ranks"), [(37, 1), (37, 3), (37, 16), (3, 5)])
def test_ranks_compute_their_own_examples_of_the_same_global_batches(num_examples, num_ranks, settings):
    lengths = draw_uniform_lengths(num_examples)
    epoch = plan(np.array(lengths), settings, epoch=1)
    of_ranks = make_loaders(lengths, num_ranks, settings)
    owner_N = assign_owners(np.array(lengths), num_ranks)
    for loader in of_ranks:
        loader.owner_N = owner_N
    by_rank = [list(loader.steps(1)) for loader in of_ranks]
    assert {len(steps) for steps in by_rank} == {epoch.num_steps}
    for step, steps in enumerate(zip(*by_rank, strict=True)):
        assert len({len(batches.micro_batches) for batches in steps}) == 1
        for rank, batches in enumerate(steps):
            ids = [row for batch in batches.micro_batches for row in batch.ids_B[batch.weights_B > 0].tolist()]
            assert sorted(ids) == sorted(row for row in epoch.global_batch(step).tolist() if owner_N[row] == rank)
            assert batches.num_examples == len(epoch.global_batch(step))
            tokens = [batch.tokens_BT.numel() for batch in batches.micro_batches]
            assert batches.share.tokens_MR[:, rank].tolist() == tokens
            assert max(tokens) <= 40


def test_expected_efficiency_and_largest_step_take_the_owners_into_account():
    lengths = draw_uniform_lengths(300)
    (evenly, other) = make_loaders(lengths, 2, SETTINGS, max_tokens_per_rank=1000)
    expected = evenly.expected_efficiency()
    other.owner_N = np.zeros(300, np.int64)
    found = other.expected_efficiency()
    assert found == measure_efficiency(batches.share for batches in other.steps(0))
    assert found.rank_balance < 0.55 < 0.9 < expected.rank_balance
    assert other.largest_step(0).share.tokens_MR.max() > 1.5 * evenly.largest_step(0).share.tokens_MR.max()


def test_num_steps_counts_every_epoch():
    settings = replace(SETTINGS, global_token_budget=31, bucket_window=3)
    (loader,) = make_loaders(draw_uniform_lengths(300), 1, settings)
    per_epoch = [len(list(loader.steps(epoch))) for epoch in range(6)]
    assert len(set(per_epoch)) > 1, "control: epochs differ"
    assert loader.num_steps(6) == sum(per_epoch)
    assert loader.num_steps(1) == per_epoch[0]
    assert [loader.epoch_steps(epoch) for epoch in (5, 0)] == [per_epoch[5], per_epoch[0]]
    assert loader.num_steps(6, max_steps=3) == loader.num_steps(1, max_steps=10**9) - 10**9 + 3 == 3


@pytest.mark.parametrize("owners", [False, True], ids=["equal shares", "owners"])
def test_divisor_is_the_weight_of_the_whole_global_batch_on_every_rank(owners):
    lengths, weights_C = draw_uniform_lengths(37), np.array([0.1, 3.0, 0.7, 11.0])
    of_ranks = make_loaders(lengths, 3, SETTINGS)
    labels_N = toy_split(lengths).labels
    for loader in of_ranks:
        loader.class_weights_C = weights_C
        if owners:
            loader.owner_N = assign_owners(np.array(lengths), 3)
    for step, ids in enumerate(plan(np.array(lengths), SETTINGS, epoch=1).global_batches()):
        found = {list(loader.steps(1))[step].loss_divisor for loader in of_ranks}
        assert found == {math.fsum(weights_C[labels_N[ids]])}, "the same bits on every rank"
    for loader in of_ranks:
        loader.class_weights_C = None
        assert [batches.loss_divisor for batches in loader.steps(1)] == [batches.num_examples for batches in loader.steps(1)]


@pytest.mark.parametrize("start", [0, 1, 13, 24, 25])
def test_steps_from_mid_epoch_are_the_rest(start):
    for loader in make_loaders(draw_uniform_lengths(295), 3, SETTINGS):
        whole = [[batch.ids_B.tolist() for batch in batches.micro_batches] for batches in loader.steps(2)]
        rest = [[batch.ids_B.tolist() for batch in batches.micro_batches] for batches in loader.steps(2, start)]
        assert len(whole) == 25
        assert rest == whole[start:]


def test_largest_step_holds_the_largest_micro_batch_of_all_ranks():
    of_ranks = make_loaders(draw_uniform_lengths(300), 2, SETTINGS, max_tokens_per_rank=60)
    sizes = [batch.tokens_BT.numel() for loader in of_ranks for batches in loader.steps(0) for batch in batches.micro_batches]
    found = [batch.tokens_BT.numel() for loader in of_ranks for batch in loader.largest_step(0).micro_batches]
    assert max(found) == max(sizes)
    assert min(sizes) < max(sizes)


def test_largest_step_is_not_the_step_with_most_tokens():
    # 31 + 30 tokens exceed the limit and take two micro-batches, 29 + 29 take one.
    settings = PlanSettings(global_batch_size=2, bucket_window="epoch")
    (loader,) = make_loaders([31, 29, 30, 29], 1, settings, max_tokens_per_rank=60)
    assert [tuple(batch.tokens_BT.shape) for batch in loader.largest_step(0).micro_batches] == [(2, 29)]


def test_loader_refuses_texts_above_the_maximum_length():
    (loader,) = make_loaders([3, 31, 2], 1, SETTINGS, max_length=30)
    with pytest.raises(UserError, match=r"example 1 has 31 tokens, more than the maximum of 30.*Truncate it"):
        loader.num_steps(1)
