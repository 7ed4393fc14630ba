"""A rank's view of the plan: right-padded tokens, filler rows of weight 0, as many micro-batches on one rank as on another."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.toy import toy_split

from agnews_dist.data.batching.epoch_plan import PlanSettings, plan
from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.shares import efficiency
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.features.layout import round_robin

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


def test_a_batch_is_right_padded_with_lengths_from_the_texts_not_from_the_pad_id(table):
    batch = table.batch(np.array([2, 0, 1]))
    assert batch.tokens_BT.tolist() == [[PAD, 6, PAD], [1, 2, PAD], [5, PAD, PAD]]
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.lengths_B.tolist() == [2, 3, 1]
    assert batch.labels_B.tolist() == [3, 2, 0]
    assert batch.weights_B.tolist() == [1, 1, 1]
    assert batch.ids_B.tolist() == [2, 0, 1]


def test_no_ids_give_one_valid_row_that_weighs_nothing(table):
    batch = table.batch(np.empty(0, np.int64))
    assert (batch.tokens_BT.tolist(), batch.lengths_B.tolist()) == ([[PAD]], [1])
    assert 0 <= batch.labels_B.item() < 4
    assert (batch.weights_B.tolist(), batch.ids_B.tolist()) == ([0], [-1])


def loaders(lengths: list[int], num_ranks: int, settings: PlanSettings, **limits) -> list[TrainLoader]:
    table = TokenTable(toy_split(lengths), pad_id=0, device=torch.device("cpu"))
    limits = {"max_tokens_per_rank": 40, "quadratic": 0.0} | limits
    return [TrainLoader(table, World(rank=rank, num_ranks=num_ranks), settings, **limits) for rank in range(num_ranks)]


def random_lengths(num_examples: int) -> list[int]:
    return np.random.default_rng(0).integers(1, 30, num_examples).tolist()


SETTINGS = PlanSettings(global_batch_size=12, bucket_window=2, seed=4)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, global_token_budget=70)], ids=["examples", "tokens"])
@pytest.mark.parametrize(("num_examples", "num_ranks"), [(37, 1), (37, 3), (37, 16), (3, 5)])
def test_ranks_take_the_same_number_of_micro_batches_and_together_each_example_once(num_examples, num_ranks, settings):
    lengths = random_lengths(num_examples)
    epoch = plan(np.array(lengths), settings, epoch=1)
    by_rank = [list(loader.steps(1)) for loader in loaders(lengths, num_ranks, settings)]
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
    assert (num_fillers > 0) == (num_ranks > 1), "the cases are with and without ranks that have nothing to do"


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, global_token_budget=70)], ids=["examples", "tokens"])
@pytest.mark.parametrize(("num_examples", "num_ranks"), [(37, 1), (37, 3), (37, 16), (3, 5)])
def test_ranks_that_hold_a_part_of_the_texts_take_their_own_of_the_same_global_batches(
    num_examples, num_ranks, settings
):
    lengths = random_lengths(num_examples)
    epoch = plan(np.array(lengths), settings, epoch=1)
    of_ranks = loaders(lengths, num_ranks, settings)
    owner_N = round_robin(np.array(lengths), num_ranks)
    for loader in of_ranks:
        loader.owner_N = owner_N
    by_rank = [list(loader.steps(1)) for loader in of_ranks]
    assert {len(steps) for steps in by_rank} == {epoch.num_steps}
    for step, dealt in enumerate(zip(*by_rank, strict=True)):
        assert len({len(batches.micro_batches) for batches in dealt}) == 1
        for rank, batches in enumerate(dealt):
            ids = [row for batch in batches.micro_batches for row in batch.ids_B[batch.weights_B > 0].tolist()]
            assert sorted(ids) == sorted(row for row in epoch.global_batch(step).tolist() if owner_N[row] == rank)
            assert batches.num_examples == len(epoch.global_batch(step))
            tokens = [batch.tokens_BT.numel() for batch in batches.micro_batches]
            assert batches.share.tokens_MR[:, rank].tolist() == tokens
            assert max(tokens) <= 40


def test_who_holds_what_shows_in_the_forecast_and_in_the_largest_step():
    """Unequal shares: what the header promises is what will be run."""
    lengths = random_lengths(300)
    (evenly, other) = loaders(lengths, 2, SETTINGS, max_tokens_per_rank=1000)
    expected = evenly.expected_efficiency()
    other.owner_N = np.zeros(300, np.int64)
    found = other.expected_efficiency()
    assert found == efficiency(batches.share for batches in other.steps(0))
    assert found.rank_balance < 0.55 < 0.9 < expected.rank_balance
    assert other.largest_step(0).share.tokens_MR.max() > 1.5 * evenly.largest_step(0).share.tokens_MR.max()


def test_every_epoch_is_counted_with_its_own_number_of_steps():
    settings = replace(SETTINGS, global_token_budget=31, bucket_window=3)
    (loader,) = loaders(random_lengths(300), 1, settings)
    per_epoch = [len(list(loader.steps(epoch))) for epoch in range(6)]
    assert len(set(per_epoch)) > 1, "the case is one where they differ"
    assert loader.num_steps(6) == sum(per_epoch)
    assert loader.num_steps(1) == per_epoch[0]


@pytest.mark.parametrize("start", [0, 1, 13, 24, 25])
def test_starting_in_mid_epoch_gives_the_rest_of_it(start):
    for loader in loaders(random_lengths(295), 3, SETTINGS):
        whole = [[batch.ids_B.tolist() for batch in batches.micro_batches] for batches in loader.steps(2)]
        rest = [[batch.ids_B.tolist() for batch in batches.micro_batches] for batches in loader.steps(2, start)]
        assert len(whole) == 25
        assert rest == whole[start:]


def test_the_largest_step_holds_the_largest_micro_batch_of_all_ranks():
    of_ranks = loaders(random_lengths(300), 2, SETTINGS, max_tokens_per_rank=60)
    sizes = [
        batch.tokens_BT.numel() for loader in of_ranks for batches in loader.steps(0) for batch in batches.micro_batches
    ]
    found = [batch.tokens_BT.numel() for loader in of_ranks for batch in loader.largest_step(0).micro_batches]
    assert max(found) == max(sizes)
    assert min(sizes) < max(sizes)


def test_the_largest_step_is_that_of_the_largest_micro_batch_not_of_the_most_tokens():
    # 31 + 30 tokens exceed the limit and come one after the other, 29 + 29 at once.
    settings = PlanSettings(global_batch_size=2, bucket_window="epoch")
    (loader,) = loaders([31, 29, 30, 29], 1, settings, max_tokens_per_rank=60)
    assert [tuple(batch.tokens_BT.shape) for batch in loader.largest_step(0).micro_batches] == [(2, 29)]


def test_the_loader_refuses_what_the_model_cannot_take():
    (loader,) = loaders([3, 31, 2], 1, SETTINGS, max_length=30)
    with pytest.raises(UserError, match=r"example 1 has 31 tokens, more than the maximum of 30.*Truncate it"):
        loader.num_steps(1)
