"""Global batches: every example once per epoch, the same wherever they are asked for, bounded memory; frozen values; errors.

Every property is a checker that takes a planner, so that a broken planner can be shown to fail the very same assertions.
"""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import python

from agnews_dist.config.schema import BatchConfig
from agnews_dist.data.batching.epoch_plan import Ints, Lengths, PlanSettings, plan
from agnews_dist.data.batching.position import ALGORITHM
from agnews_dist.data.batching.shares import share
from agnews_dist.errors import UserError

Planner = Callable[[Lengths, PlanSettings], list[Ints]]

LENGTHS = st.lists(st.integers(1, 300), max_size=150).map(lambda values: np.array(values, dtype=np.int64))
SETTINGS = st.builds(
    PlanSettings,
    global_batch_size=st.integers(1, 70),
    global_token_budget=st.none() | st.integers(300, 3000),
    bucket_window=st.just("epoch") | st.integers(1, 10) | st.just(10**9),
    seed=st.integers(0, 2**40),
    block_size=st.just(1) | st.integers(2, 200),
)


def ours(lengths: Lengths, chosen: PlanSettings, epoch: int = 0) -> list[Ints]:
    return list(plan(lengths, chosen, epoch=epoch).global_batches())


def fitting(lengths: Lengths, chosen: PlanSettings) -> PlanSettings:
    """With the whole epoch as one window where the blocks are too large for several."""
    try:
        ours(lengths, chosen)
    except UserError as error:
        if not str(error).startswith("block_size"):
            raise
        return replace(chosen, bucket_window="epoch")
    return chosen


def ag_news_like(num: int) -> Ints:
    return np.clip(np.random.default_rng(0).lognormal(3.9, 0.33, num), 8, 323).astype(np.int64)


# Every example exactly once


def check_exactly_once(planner: Planner, lengths: Ints, chosen: PlanSettings) -> None:
    found = planner(lengths, chosen)
    assert sorted(itertools.chain(*(ids.tolist() for ids in found))) == list(range(len(lengths)))
    assert all(len(ids) and (np.diff(lengths[ids]) <= 0).all() for ids in found), (
        "no batch is empty, all fall in length"
    )
    if chosen.global_token_budget is not None:
        assert all(lengths[ids].sum() <= chosen.global_token_budget for ids in found)
    else:
        full, rest = divmod(len(lengths), chosen.global_batch_size)
        sizes = [chosen.global_batch_size] * full + [rest] * (rest > 0)
        assert sorted(map(len, found), reverse=True) == sizes


@settings(max_examples=200, deadline=None)
@given(LENGTHS, SETTINGS, st.integers(0, 3))
def test_every_example_exactly_once_in_batches_as_asked_for(lengths, chosen, epoch):
    check_exactly_once(lambda *arguments: ours(*arguments, epoch=epoch), lengths, fitting(lengths, chosen))


@pytest.mark.parametrize("num", [0, 1, 2, 3, 5, 7, 31, 32, 33, 97, 251, 1009])
def test_every_example_exactly_once_whatever_the_number(num):
    lengths = ag_news_like(num)
    kinds = [PlanSettings(global_batch_size=32), PlanSettings(global_token_budget=323)]
    for kind, window, block_size in itertools.product(kinds, (1, 7, 64, "epoch"), (1, 3, 2000)):
        chosen = replace(kind, bucket_window=window, block_size=block_size)
        check_exactly_once(ours, lengths, fitting(lengths, chosen))


def test_one_token_per_example_and_per_batch():
    check_exactly_once(ours, np.ones(5, np.int64), PlanSettings(global_token_budget=1, bucket_window=1))


def dropping(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return [ids for ids in ours(lengths, chosen) if len(ids) == chosen.global_batch_size]


def wrapping(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    size = chosen.global_batch_size
    return [np.concatenate([ids, np.arange(size - len(ids))]) for ids in ours(lengths, chosen)]


def unsorted(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return [ids[::-1] for ids in ours(lengths, chosen)]


def spreading(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return np.array_split(np.concatenate(ours(lengths, chosen)), -(-len(lengths) // chosen.global_batch_size))


def overrunning(lengths: Any, chosen: PlanSettings) -> list[Ints]:
    order = np.argsort(-lengths, kind="stable")
    batch_N = np.cumsum(lengths[order]) // chosen.global_token_budget
    return [order[batch_N == batch] for batch in np.unique(batch_N)]


@pytest.mark.parametrize("broken", [dropping, wrapping, unsorted, spreading, overrunning], ids=lambda f: f.__name__)
def test_broken_planners_do_not_pass_for_exact(broken):
    chosen = PlanSettings(global_batch_size=32, global_token_budget=999 if broken is overrunning else None)
    check_exactly_once(ours, ag_news_like(100), chosen)
    with pytest.raises(AssertionError):
        check_exactly_once(broken, ag_news_like(100), chosen)


# The token budget


def even_part(count: int) -> int:
    """The power of two between a 32nd and a 16th of `count`, or 1."""
    return max(1, 2 ** (int(np.log2(count)) - 4))


def fewest(lengths: Ints, cap: int) -> int:
    """Batches of at most `cap` tokens, each filled from the longest remaining text on; all but the last are divisible."""
    left, count = sorted(lengths.tolist()), 0
    while left:
        taken, room = 0, cap
        while taken < len(left) and left[-1 - taken] <= room:
            taken, room = taken + 1, room - left[-1 - taken]
        if taken < len(left):
            taken -= taken % even_part(taken)
        left, count = left[: len(left) - taken], count + 1
    return count


def check_few_and_even(planner: Planner, lengths: Ints, budget: int) -> None:
    batches = planner(lengths, PlanSettings(global_token_budget=budget, bucket_window="epoch"))
    tokens = [int(lengths[ids].sum()) for ids in batches]
    assert len(tokens) == fewest(lengths, budget)
    # One token less in the largest would take another batch. (Where numbers are rounded, it can be the other way round.)
    if tokens and max(map(len, batches)) < 32:
        assert max(tokens) == lengths.max() or fewest(lengths, max(tokens) - 1) > len(tokens)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(300, 3000))
def test_a_token_budget_makes_as_few_batches_as_filling_up_and_of_equal_weight(lengths, budget):
    check_few_and_even(ours, lengths, budget)


def filling_up(lengths: Any, chosen: PlanSettings) -> list[Ints]:
    batches: list[list[int]] = []
    room = 0
    for example in np.argsort(-lengths, kind="stable").tolist():
        if lengths[example] > room:
            batches.append([])
            room = chosen.global_token_budget
        batches[-1].append(example)
        room -= lengths[example]
    return [np.array(ids) for ids in batches]


def singles(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return list(np.argsort(-np.asarray(lengths))[:, None])


@pytest.mark.parametrize("broken", [filling_up, singles], ids=lambda f: f.__name__)
def test_uneven_and_many_batches_do_not_pass_for_few_and_even(broken):
    lengths = ag_news_like(100)
    check_few_and_even(ours, lengths, 1000)
    check_exactly_once(broken, lengths, PlanSettings(global_token_budget=1000))
    with pytest.raises(AssertionError):
        check_few_and_even(broken, lengths, 1000)


@pytest.mark.parametrize("window", [4, 64])
def test_windows_cost_a_token_budget_few_batches(window):
    lengths = ag_news_like(20_000)
    found = ours(lengths, PlanSettings(global_token_budget=4096, bucket_window=window))
    assert len(found) <= 1.06 * -(-lengths.sum() // 4096)


def check_divisible(planner: Planner, window: int | str, num_windows: int) -> None:
    lengths = ag_news_like(20_000)
    found = planner(lengths, PlanSettings(global_token_budget=13_000, bucket_window=window))
    assert min(map(len, found)) >= 32
    assert sum(len(ids) % even_part(len(ids)) > 0 for ids in found) <= num_windows


@pytest.mark.parametrize(("window", "num_windows"), [("epoch", 1), (20, 5)])
def test_batches_of_a_token_budget_divide_among_the_ranks_but_for_one_of_a_window(window, num_windows):
    check_divisible(ours, window, num_windows)


def test_batches_filled_to_the_brim_do_not_pass_for_divisible():
    with pytest.raises(AssertionError):
        check_divisible(filling_up, "epoch", 1)


# The same batches wherever they are asked for


class PlanLike(Protocol):
    @property
    def num_steps(self) -> int: ...

    def global_batch(self, step: int) -> Ints: ...


def check_any_step_at_once(start: Callable[[], PlanLike]) -> None:
    through = start()
    in_order = [through.global_batch(step).tolist() for step in range(through.num_steps)]
    again = start()
    for step in np.random.default_rng(0).permutation(through.num_steps).tolist():
        assert again.global_batch(step).tolist() == in_order[step], "asked in another order"
        assert start().global_batch(step).tolist() == in_order[step], "asked for at once"


@settings(max_examples=40, deadline=None)
@given(LENGTHS, SETTINGS, st.integers(0, 3))
def test_a_restart_at_any_step_gives_the_same_batches(lengths, chosen, epoch):
    chosen = fitting(lengths, chosen)
    check_any_step_at_once(lambda: plan(lengths, chosen, epoch=epoch))
    whole = plan(lengths, chosen, epoch=epoch)
    start = whole.num_steps // 2
    rest = [ids.tolist() for ids in plan(lengths, chosen, epoch=epoch).global_batches(start)]
    assert rest == [ids.tolist() for ids in whole.global_batches()][start:]


def test_a_stream_of_batches_does_not_pass_for_a_plan():
    class Stream:
        """Draws each batch when it is asked for, as samplers with a generator do."""

        num_steps = 9

        def __init__(self) -> None:
            self._rng = np.random.default_rng(0)

        def global_batch(self, step: int) -> Ints:
            return self._rng.permutation(99)[:11]

    with pytest.raises(AssertionError, match=r"asked for at once|in another order"):
        check_any_step_at_once(Stream)


KINDS = [
    PlanSettings(global_batch_size=4, bucket_window=2, seed=7),
    PlanSettings(global_batch_size=4, bucket_window=3, seed=7, block_size=2),
    PlanSettings(global_token_budget=60, bucket_window=2, seed=7),
]


@pytest.mark.parametrize("chosen", KINDS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64, np.uint64, "memmap"])
def test_how_lengths_are_stored_does_not_matter(tmp_path, chosen, kind):
    lengths = np.arange(60) * 7 % 53 + 1
    if kind == "memmap":
        lengths.astype(np.uint16).tofile(tmp_path / "lengths")
        stored = np.memmap(tmp_path / "lengths", np.uint16, mode="r")
    else:
        stored = lengths.astype(kind)
    found, expected = ours(stored, chosen), ours(lengths, chosen)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
    assert {ids.dtype for ids in found} == {np.dtype(np.int64)}


def test_another_process_plans_the_same():
    code = """if True:
        import json, numpy as np
        from agnews_dist.data.batching.epoch_plan import PlanSettings, plan
        chosen = PlanSettings(global_batch_size=7, bucket_window=5, seed=3)
        made = plan(np.arange(500) % 91 + 1, chosen, epoch=2)
        print(json.dumps([ids.tolist() for ids in made.global_batches()]))
        print(json.dumps(np.random.permutation(500).tolist()))
    """
    here, there = (python("-c", code).stdout.splitlines() for _ in range(2))
    assert here[0] == there[0]
    expected = ours(np.arange(500) % 91 + 1, PlanSettings(global_batch_size=7, bucket_window=5, seed=3), epoch=2)
    assert json.loads(here[0]) == [ids.tolist() for ids in expected]
    # Negative control: what a process draws for itself differs.
    assert here[1] != there[1]


FROZEN = [
    [[14, 12, 2, 1], [19, 18, 16, 15], [22, 20, 17, 13], [10, 9, 8, 4], [5, 3, 0], [21, 11, 7, 6]],
    [[19, 18, 16, 15], [14, 7, 6, 3], [2, 1, 0], [22, 21, 20, 17], [13, 12, 11, 10], [9, 8, 5, 4]],
    [[15, 14, 12, 2, 1], [18, 16], [20, 19], [17, 13, 10, 8, 4], [22, 21], [11, 9, 7, 6, 5, 3, 0]],
]


@pytest.mark.parametrize(("chosen", "expected"), list(zip(KINDS, FROZEN, strict=True)))
def test_batches_are_frozen(chosen, expected):
    """A run resumed under another numpy, or on another machine, must see the same batches: on new values raise ALGORITHM."""
    assert [ids.tolist() for ids in ours(np.arange(1, 24), chosen, epoch=3)] == expected
    assert ALGORITHM == 1


# What a step reads and holds


class Recorder:
    """Lengths of any number of examples, computed when they are asked for; remembers which were."""

    def __init__(self, num: int) -> None:
        self._num, self.read = num, []

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: Any) -> Ints:
        ids = np.arange(*index.indices(self._num)) if isinstance(index, slice) else index
        self.read.append(ids)
        return (ids * 2654435761 >> 7) % 250 + 8


def check_reads_only_its_window(planner: Callable[[Lengths, PlanSettings, int], Ints], step: int) -> None:
    chosen = PlanSettings(global_batch_size=8, bucket_window=4, block_size=4)
    lengths = Recorder(8 * 4 * 25)
    window = np.concatenate(ours(lengths, chosen)[step // 4 * 4 : step // 4 * 4 + 4])
    lengths.read.clear()
    assert set(planner(lengths, chosen, step).tolist()) <= set(window.tolist())
    assert sorted(np.concatenate(lengths.read).tolist()) == sorted(window.tolist())


@pytest.mark.parametrize("step", [0, 50, 99])
def test_a_step_in_blocks_reads_the_lengths_of_its_window_once_and_no_others(step):
    check_reads_only_its_window(lambda lengths, chosen, k: plan(lengths, chosen, epoch=0).global_batch(k), step)


def test_walking_to_a_step_does_not_pass_for_starting_there():
    with pytest.raises(AssertionError):
        check_reads_only_its_window(lambda lengths, chosen, k: ours(lengths, chosen)[k], 50)


def peak_memory(lengths: Lengths, chosen: PlanSettings) -> int:
    tracemalloc.start()
    try:
        made = plan(lengths, chosen, epoch=0)
        ids = made.global_batch(made.num_steps // 2)
        dealt = share(np.asarray(lengths[ids]), num_ranks=4096)
        assert dealt.bounds_S[[0, -1]].tolist() == [0, len(ids)]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_examples():
    chosen = PlanSettings(global_batch_size=16_384, bucket_window=16, block_size=16_384)
    few, many = (peak_memory(Recorder(num), chosen) for num in (10**6, 10**9))
    assert many < 1.5 * few
    # Negative control: shuffled one by one, even 4 million examples take more than a billion in blocks.
    single = PlanSettings(global_batch_size=16_384, bucket_window=16)
    assert peak_memory(Recorder(4 * 10**6), single) > many


# Bad input


@pytest.mark.parametrize("block_size", [1, 4])
def test_bad_lengths_are_refused_by_name(block_size):
    chosen = PlanSettings(block_size=block_size)
    lengths = np.full(50, 9)
    lengths[17] = 0
    with pytest.raises(UserError, match=r"^example 17 has 0 tokens: .*no last token.*\. Remove the row or rebuild"):
        ours(lengths, chosen)
    lengths[17] = -3
    with pytest.raises(UserError, match=r"^example 17 has -3 tokens: .*Remove the row"):
        ours(lengths, chosen)
    lengths[17] = 11
    assert len(list(plan(lengths, chosen, epoch=0, max_length=11).global_batches())) == 2
    with pytest.raises(
        UserError, match=r"^example 17 has 11 tokens, more than the maximum of 10: .*Truncate it, or raise"
    ):
        list(plan(lengths, chosen, epoch=0, max_length=10).global_batches())


def test_in_memory_lengths_are_checked_before_the_first_step():
    with pytest.raises(UserError, match=r"^example 1500000 has 0 tokens"):
        plan(np.where(np.arange(1_600_000) == 1_500_000, 0, 5), PlanSettings(), epoch=0)


def test_a_budget_below_the_longest_text_is_refused():
    with pytest.raises(
        UserError, match=r"^global_token_budget 8 is below the longest text \(9 tokens\): .*Raise the budget"
    ):
        ours(np.array([3, 9]), PlanSettings(global_token_budget=8))
    assert len(ours(np.array([3, 9]), PlanSettings(global_token_budget=9))) == 2


@pytest.mark.parametrize("name", ["global_batch_size", "global_token_budget", "bucket_window", "block_size"])
@pytest.mark.parametrize("value", [0, -4, np.int64(0), 2.5, True, "all"])
def test_settings_that_are_no_count_are_refused(name, value):
    with pytest.raises(UserError) as caught:
        PlanSettings(**{name: value})
    assert str(caught.value).startswith(
        f"{name} {value!r}: no plan can be made of it. Set a whole number of at least 1"
    )


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match=r"^seed -1: .*Set a whole number of at least 0"):
        PlanSettings(seed=-1)


def test_numbers_of_numpy_become_plain_ones():
    chosen = PlanSettings(global_batch_size=np.int64(8), seed=np.uint8(3))
    assert json.dumps(asdict(chosen)) == json.dumps(asdict(PlanSettings(global_batch_size=8, seed=3)))


def test_the_defaults_are_those_of_the_configuration():
    chosen, config = PlanSettings(), BatchConfig()
    for name in ("global_batch_size", "global_token_budget", "bucket_window"):
        assert getattr(chosen, name) == getattr(config, name)


@pytest.mark.parametrize(
    "lengths",
    [np.arange(1, 5).reshape(4, 1), np.array([3.0, 2.0]), np.array([np.nan]), [2.5, 1.0], np.array(["a"])],
    ids=["column", "floats", "nan", "list of floats", "text"],
)
def test_what_is_not_one_whole_number_per_example_is_refused(lengths):
    with pytest.raises(UserError, match=r"^lengths of .*lost or counted wrong\. Give one whole number of tokens"):
        ours(lengths, PlanSettings())


@pytest.mark.parametrize("made", [list, torch.tensor, pandas.Series], ids=["list", "tensor", "series"])
def test_what_an_array_can_be_made_of_is_taken(made):
    lengths = ag_news_like(100)
    found, expected = ours(made(lengths.tolist()), PlanSettings()), ours(lengths, PlanSettings())
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


@pytest.mark.parametrize(
    "chosen", [{"global_batch_size": 32}, {"global_token_budget": 2000}], ids=["examples", "tokens"]
)
def test_blocks_too_large_for_the_windows_are_refused(chosen):
    """A file sorted by class would otherwise give batches of one class each."""
    lengths = ag_news_like(5000)
    with pytest.raises(
        UserError, match=r"^block_size 512, and \d+ examples in a window: .*neighbours.*raise bucket_window"
    ):
        ours(lengths, PlanSettings(**chosen, bucket_window=16, block_size=512))
    check_exactly_once(ours, lengths, PlanSettings(**chosen, bucket_window=16, block_size=64))
    check_exactly_once(ours, lengths, PlanSettings(**chosen, bucket_window="epoch", block_size=512))


def test_a_block_larger_than_the_data_costs_nothing():
    check_exactly_once(ours, ag_news_like(5), PlanSettings(block_size=10**12))


def test_a_negative_epoch_is_refused():
    with pytest.raises(UserError, match=r"^epoch -1: .*Count epochs from 0"):
        plan(np.ones(40, np.int64), PlanSettings(), epoch=-1)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_outside_the_epoch_is_an_index_error(step):
    with pytest.raises(IndexError, match=rf"^step {step} of an epoch of 2$"):
        plan(np.ones(40, np.int64), PlanSettings(), epoch=0).global_batch(step)
