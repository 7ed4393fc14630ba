"""A rank's view of the plan: right-padded tokens, filler rows of weight 0, as many micro-batches on one rank as on another."""

import numpy as np
import pytest
import torch
from toy import toy_split

from agnews_dist.data.batching import plan_epoch
from agnews_dist.data.loader import StepBatches, TokenTable, TrainLoader
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.world import World

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


@pytest.mark.parametrize(("num_examples", "num_ranks"), [(37, 1), (37, 3), (37, 16), (3, 5)])
def test_ranks_take_the_same_number_of_micro_batches_and_together_each_example_once(num_examples, num_ranks):
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 30, num_examples)]
    rows = TokenTable(toy_split(lengths), pad_id=0, device=torch.device("cpu"))
    plan = plan_epoch(np.array(lengths), global_batch_size=12, bucket_window=2, seed=4, epoch=1)
    assert plan.num_steps == -(-num_examples // 12)
    by_rank: list[list[StepBatches]] = []
    for rank in range(num_ranks):
        loader = TrainLoader(
            rows,
            World(rank=rank, num_ranks=num_ranks),
            global_batch_size=12,
            max_tokens_per_rank=40,
            bucket_window=2,
            seed=4,
        )
        by_rank.append(list(loader.steps(1)))
        assert len(by_rank[-1]) == loader.num_steps_per_epoch == plan.num_steps
    num_fillers = 0
    for step, of_ranks in enumerate(zip(*by_rank, strict=True)):
        assert len({len(batches.micro_batches) for batches in of_ranks}) == 1
        assert {batches.num_examples for batches in of_ranks} == {len(plan.global_batch(step))}
        micro_batches = [batch for batches in of_ranks for batch in batches.micro_batches]
        counted = [row for batch in micro_batches for row in batch.ids_B[batch.weights_B > 0].tolist()]
        assert sorted(counted) == sorted(plan.global_batch(step).tolist())
        num_fillers += sum(batch.weights_B.tolist() == [0] for batch in micro_batches)
        assert sum(float(batch.weights_B.sum()) for batch in micro_batches) == len(counted)
    assert (num_fillers > 0) == (num_ranks > 1), "the cases are with and without ranks that have nothing to do"
