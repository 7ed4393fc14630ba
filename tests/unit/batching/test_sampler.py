"""Batch sampler in a real DataLoader: the plan's batches, equal order for loop and workers, exact resuming."""

import json
import multiprocessing
import pickle
from itertools import islice

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import DataLoader

from agnews_dist.data.batching import LengthBucketedBatchSampler, PlanSettings, plan
from agnews_dist.data.batching.shares import share_batch
from agnews_dist.errors import UserError

# These tests ignore warnings of a small machine and of Python 3.12 at every fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

LENGTHS = np.random.default_rng(4).integers(1, 90, 149)
SETTINGS = PlanSettings(global_batch_size=16, bucket_window=4, seed=7)
WORKERS = [
    pytest.param({"num_workers": 0}, id="no_workers"),
    pytest.param({"num_workers": 2}, id="workers"),
    pytest.param({"num_workers": 2, "persistent_workers": True}, id="persistent"),
]
OPTIONS = [{}, {"accumulation": 3}, {"max_tokens_per_rank": 190}, {"quadratic": 0.05}]


def make(lengths=LENGTHS, *, num_ranks: int = 3, rank: int = 0, settings=SETTINGS, **options):
    return LengthBucketedBatchSampler(lengths, num_ranks=num_ranks, rank=rank, settings=settings, **options)


def load(sampler: LengthBucketedBatchSampler, **workers) -> DataLoader:
    """Make a DataLoader whose batches are the lists of indices."""
    return DataLoader(range(len(LENGTHS)), batch_sampler=sampler, collate_fn=list, **workers)


def epoch_of(sampler: LengthBucketedBatchSampler, loader: DataLoader, epoch: int) -> list[list[list[int]]]:
    """Read the micro-batches of one epoch, by step, as a training loop does."""
    sampler.set_epoch(epoch)
    steps: list[list[list[int]]] = [[]]
    for batch, micro in zip(loader, sampler.micro_batches(), strict=True):
        assert batch == micro.ids
        steps[-1].append(batch)
        if micro.is_last:
            steps.append([])
    assert steps.pop() == []
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS[:2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ranks_together_take_the_global_batches(workers, options):
    samplers = [make(rank=rank, **options) for rank in range(3)]
    loaders = [load(sampler, **workers) for sampler in samplers]
    for epoch in (0, 1):
        by_rank = [epoch_of(sampler, loader, epoch) for sampler, loader in zip(samplers, loaders, strict=True)]
        # numpy integers would change how batches print and pickle
        assert all(type(i) is int for steps in by_rank for step in steps for batch in step for i in batch)
        expected = list(plan(LENGTHS, SETTINGS, epoch=epoch).global_batches())
        assert [len(steps) for steps in by_rank] == [len(expected)] * 3
        for step, ids in enumerate(expected):
            share = share_batch(LENGTHS[ids], num_ranks=3, **options)
            for rank in range(3):
                assert by_rank[rank][step] == [ids[rows].tolist() for rows in share.slices(rank)]
        assert sorted(i for steps in by_rank for step in steps for batch in step for i in batch) == list(range(149))
        assert {len(loader) for loader in loaders} == {sum(len(step) for step in by_rank[0])}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_micro_batches_give_global_count_and_last_of_the_step(options):
    by_rank = [list(make(rank=rank, **options).micro_batches()) for rank in range(3)]
    batches = list(plan(LENGTHS, SETTINGS, epoch=0).global_batches())
    counts_of_micro_batches = set()
    for step, ids in enumerate(batches):
        mine = [[micro for micro in micros if micro.step == step] for micros in by_rank]
        counts_of_micro_batches.add(len(mine[0]))
        assert len({len(micros) for micros in mine}) == 1
        assert {micro.num_examples for micros in mine for micro in micros} == {len(ids)}
        for micros in mine:
            assert [micro.is_last for micro in micros] == [False] * (len(micros) - 1) + [True]
    assert len(batches) == 10
    if "max_tokens_per_rank" in options:
        assert len(counts_of_micro_batches) > 1, "control: numbers of micro-batches differ"


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
def test_global_batches_are_independent_of_the_number_of_ranks(num_ranks):
    def batches(num_ranks, **options):
        found: dict[int, list[int]] = {}
        for rank in range(num_ranks):
            for micro in make(num_ranks=num_ranks, rank=rank, **options).micro_batches():
                found.setdefault(micro.step, []).extend(micro.ids)
        return {step: sorted(ids) for step, ids in found.items()}

    assert batches(num_ranks, accumulation=num_ranks % 3 + 1) == batches(3)
    other_seed = PlanSettings(global_batch_size=16, bucket_window=4, seed=8)
    assert batches(num_ranks, settings=other_seed) != batches(3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS[:2])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_sampler_with_fewer_examples_than_ranks(count, workers):
    samplers = [make(LENGTHS[:count], num_ranks=6, rank=rank) for rank in range(6)]
    by_rank = [list(load(sampler, **workers)) for sampler in samplers]
    assert [len(batches) for batches in by_rank] == [len(sampler) for sampler in samplers] == [min(count, 1)] * 6
    assert sorted(i for batches in by_rank for batch in batches for i in batch) == list(range(count))
    assert sum(batches == [[]] for batches in by_rank) == (6 - count if count else 0)


def test_length_differs_between_epochs_under_a_token_budget():
    settings = PlanSettings(global_token_budget=150, bucket_window=3)
    sampler = make(settings=settings, accumulation=2)
    lengths = {}
    for epoch in range(6):
        sampler.set_epoch(epoch)
        lengths[epoch] = len(sampler)
        assert lengths[epoch] == len(list(sampler)) == 2 * sampler.num_steps
    assert len(set(lengths.values())) > 1


class Counting(LengthBucketedBatchSampler):
    """Sampler that counts the batches the DataLoader has taken."""

    taken = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.taken += 1
            yield batch


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("done", [0, 1, 4, 9, 10], ids="after_{}_of_10".format)
def test_load_state_dict_continues_with_the_rest_in_order(done, workers):
    options = {"num_ranks": 3, "rank": 1, "settings": SETTINGS, "max_tokens_per_rank": 190}
    whole = LengthBucketedBatchSampler(LENGTHS, **options)
    loader = load(whole, **workers)
    uninterrupted = [epoch_of(whole, loader, epoch) for epoch in (0, 1, 2)]
    assert [len(steps) for steps in uninterrupted] == [10, 10, 10]

    interrupted = Counting(LENGTHS, **options)
    interrupted.set_epoch(1)
    used = sum(len(step) for step in uninterrupted[1][:done])
    before = list(islice(load(interrupted, **workers), used))
    assert before == [batch for step in uninterrupted[1][:done] for batch in step]
    if workers["num_workers"] and 0 < done < 9:
        assert interrupted.taken > used, "control: workers have fetched ahead"
    state = json.loads(json.dumps(interrupted.state_dict(done)))

    resumed = LengthBucketedBatchSampler(LENGTHS, **options)
    resumed.load_state_dict(state)
    loader = load(resumed, **workers)
    found, lengths = [], []
    for epoch in range(resumed.epoch, 3):
        resumed.set_epoch(epoch)
        lengths.append(len(loader))
        found.append(epoch_of(resumed, loader, epoch))
    expected = [uninterrupted[1][done:], uninterrupted[2]] if done < 10 else [uninterrupted[2]]
    assert found == expected
    assert lengths == [sum(len(step) for step in steps) for steps in expected]


def test_position_is_valid_on_any_number_of_ranks():
    state = make(num_ranks=3).state_dict(6)
    resumed = [make(num_ranks=2, rank=rank) for rank in range(2)]
    for sampler in resumed:
        sampler.load_state_dict(state)
    found = [sorted(a + b) for a, b in zip(*resumed, strict=True)]
    assert found == [sorted(ids.tolist()) for ids in plan(LENGTHS, SETTINGS, epoch=0).global_batches(6)]


@pytest.mark.parametrize("workers", WORKERS)
def test_second_iteration_needs_set_epoch(workers):
    sampler = make()
    loader = load(sampler, **workers)
    first = list(loader)
    assert len(first) == 10
    remedy = r"epoch 0 is iterated a second time: .* Call set_epoch\(1\) .* set_epoch\(0\) to repeat"
    with pytest.raises(UserError, match=remedy):
        next(iter(loader))
    sampler.set_epoch(0)
    assert list(loader) == first
    sampler.set_epoch(1)
    assert list(loader) != first


@pytest.mark.parametrize("workers", WORKERS)
def test_epoch_left_early_does_not_change_the_next(workers):
    sampler = make(max_tokens_per_rank=190)
    loader = load(sampler, **workers)
    expected = epoch_of(sampler, load(sampler), 1)
    sampler.set_epoch(0)
    # Batches fetched ahead of a break must not come in the next epoch.
    assert len(list(islice(loader, 3))) == 3
    assert epoch_of(sampler, loader, 1) == expected


def test_reading_a_batch_keeps_a_loaded_position():
    sampler = make()
    sampler.load_state_dict(make().state_dict(4))
    look = next(iter(sampler))
    sampler.set_epoch(0)
    rest = list(sampler)
    assert rest[0] == look
    assert len(rest) == len(sampler) == 6


def test_load_state_dict_refuses_another_plan():
    sampler = make()
    sampler.load_state_dict(make().state_dict(4))
    for other, named in [
        (make(settings=PlanSettings(global_batch_size=16, bucket_window=4, seed=8)), "seed was 8, is 7"),
        (make(settings=PlanSettings(global_batch_size=8, bucket_window=4, seed=7)), "global_batch_size was 8, is 16"),
        (make(LENGTHS[:-1]), "num_examples was 148, is 149"),
        (make(LENGTHS[::-1]), "lengths_sha256 was"),
    ]:
        with pytest.raises(UserError, match=rf"another plan \(.*{named}.*Restore these settings and data"):
            sampler.load_state_dict(other.state_dict(2))
    with pytest.raises(UserError, match=r"epoch and step must be .* Give a position that save_position made"):
        sampler.load_state_dict({})
    assert len(list(sampler)) == 6, "a refused position changes nothing"


def test_state_dict_refuses_a_step_outside_the_epoch():
    sampler = make()
    wrong = r"step {} of an epoch of 10 steps: .* Give the number of steps done in this epoch"
    for step in (-1, 11):
        with pytest.raises(UserError, match=wrong.format(step)):
            sampler.state_dict(step)
    with pytest.raises(UserError, match=wrong.format(11)):
        sampler.load_state_dict({**sampler.state_dict(3), "step": 11})


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        (LENGTHS, {"rank": 3}, "rank 3 of 3: .* Set rank from 0 to num_ranks - 1"),
        (LENGTHS, {"rank": -1}, "rank -1 of 3: .* Set rank"),
        (LENGTHS, {"accumulation": 0}, "accumulation 0: .* Set both to 1 or more"),
        (LENGTHS, {"max_tokens_per_rank": 50}, r"50 is below the longest text \(89 tokens\): .* Raise batch"),
        ([5, 0, 3], {}, "example 1 has 0 tokens: .* Remove the row"),
    ],
)
def test_sampler_refuses_wrong_arguments(lengths, changes, message):
    with pytest.raises(UserError, match=message):
        make(lengths, **changes)


def test_set_epoch_refuses_a_negative_epoch():
    with pytest.raises(UserError, match=r"epoch -1: .* Count epochs from 0"):
        make().set_epoch(-1)


def test_sampler_accepts_lists_tensors_and_mapped_arrays(tmp_path):
    np.save(tmp_path / "lengths.npy", LENGTHS.astype(np.uint16))
    tensors = [torch.tensor(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)]
    forms = [LENGTHS.tolist(), *tensors, np.load(tmp_path / "lengths.npy", mmap_mode="r")]
    for lengths in forms:
        sampler = make(lengths, max_tokens_per_rank=190)
        assert list(sampler) == list(make(max_tokens_per_rank=190))
        sampler.load_state_dict(make().state_dict(1))


@pytest.mark.slow
def test_pickled_sampler_continues_at_its_position():
    sampler = make()
    sampler.load_state_dict(make().state_dict(4))
    expected = [micro.ids for micro in sampler.micro_batches()]
    assert len(expected) == 6
    assert list(pickle.loads(pickle.dumps(sampler))) == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(list, (sampler,)) == expected


def test_sampler_without_examples_has_no_batches():
    sampler = LengthBucketedBatchSampler([], num_ranks=2, rank=0, settings=PlanSettings(), max_tokens_per_rank=100)
    assert (len(sampler), list(sampler)) == (0, [])


@pytest.mark.parametrize("lengths", [[2.5, 1.0], torch.tensor([2.5, 1.0])], ids=["list", "tensor"])
def test_sampler_refuses_lengths_that_are_not_integers(lengths):
    with pytest.raises(UserError, match=r"^lengths of 1 dimension\(s\) and type float.*Give one whole number"):
        LengthBucketedBatchSampler(lengths, num_ranks=1, rank=0, settings=PlanSettings())


def test_sampler_reads_a_series_by_position():
    """A filtered data frame keeps the labels of its rows."""
    rows = pandas.Series([9, 1, 5, 3, 7, 2])
    settings = PlanSettings(global_batch_size=2, bucket_window="epoch")
    found, expected = (
        list(LengthBucketedBatchSampler(lengths, num_ranks=1, rank=0, settings=settings))
        for lengths in (rows[rows > 2], [9, 5, 3, 7])
    )
    assert found == expected


@pytest.mark.parametrize("wrong", [{"quadratic": -1.0}, {"max_tokens_per_rank": 0}], ids=str)
def test_sampler_checks_arguments_of_share_batch_at_once(wrong):
    with pytest.raises(UserError, match=rf"^{next(iter(wrong))} "):
        LengthBucketedBatchSampler([3, 2], num_ranks=1, rank=0, settings=PlanSettings(), **wrong)
