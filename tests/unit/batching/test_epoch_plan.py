"""Global batches: every example once per epoch, random access, bounded memory, frozen values, errors.

Every property is a checker that takes a planner. Each checker also runs on a broken planner and must fail.
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
from support.plans import draw_lengths, plan_batches
from support.processes import python

from agnews_dist.config.schema import BatchConfig
from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.position import ALGORITHM
from agnews_dist.data.batching.settings import Lengths, PlanSettings
from agnews_dist.data.batching.shares import share_batch
from agnews_dist.data.rows import Ints
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


def make_plannable(lengths: Lengths, chosen: PlanSettings) -> PlanSettings:
    """Take the whole epoch as one window if the blocks are too large for several."""
    try:
        plan_batches(lengths, chosen)
    except UserError as error:
        if not str(error).startswith("block_size"):
            raise
        return replace(chosen, bucket_window="epoch")
    return chosen


# Every example exactly once


def check_exactly_once(planner: Planner, lengths: Ints, chosen: PlanSettings) -> None:
    found = planner(lengths, chosen)
    assert sorted(itertools.chain(*(ids.tolist() for ids in found))) == list(range(len(lengths)))
    assert all(len(ids) and (np.diff(lengths[ids]) <= 0).all() for ids in found), "every batch has examples, longest first"
    if chosen.global_token_budget is not None:
        assert all(lengths[ids].sum() <= chosen.global_token_budget for ids in found)
    else:
        full, rest = divmod(len(lengths), chosen.global_batch_size)
        sizes = [chosen.global_batch_size] * full + [rest] * (rest > 0)
        assert sorted(map(len, found), reverse=True) == sizes


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(LENGTHS, SETTINGS, st.integers(0, 3))
def test_plan_holds_every_example_once(lengths, chosen, epoch):
    check_exactly_once(lambda *arguments: plan_batches(*arguments, epoch=epoch), lengths, make_plannable(lengths, chosen))


@pytest.mark.parametrize("num", [0, 1, 2, 3, 5, 7, 31, 32, 33, 97, 251, 1009])
def test_plan_holds_every_example_once_for_any_number(num):
    lengths = draw_lengths(num)
    kinds = [PlanSettings(global_batch_size=32), PlanSettings(global_token_budget=323)]
    for kind, window, block_size in itertools.product(kinds, (1, 7, 64, "epoch"), (1, 3, 2000)):
        chosen = replace(kind, bucket_window=window, block_size=block_size)
        check_exactly_once(plan_batches, lengths, make_plannable(lengths, chosen))


def test_plan_with_a_budget_of_one_token():
    check_exactly_once(plan_batches, np.ones(5, np.int64), PlanSettings(global_token_budget=1, bucket_window=1))


def drop_remainder(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return [ids for ids in plan_batches(lengths, chosen) if len(ids) == chosen.global_batch_size]


def wrap_around(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    size = chosen.global_batch_size
    return [np.concatenate([ids, np.arange(size - len(ids))]) for ids in plan_batches(lengths, chosen)]


def sort_shortest_first(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return [ids[::-1] for ids in plan_batches(lengths, chosen)]


def spread_evenly(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return np.array_split(np.concatenate(plan_batches(lengths, chosen)), -(-len(lengths) // chosen.global_batch_size))


def overrun_the_budget(lengths: Any, chosen: PlanSettings) -> list[Ints]:
    order = np.argsort(-lengths, kind="stable")
    batch_N = np.cumsum(lengths[order]) // chosen.global_token_budget
    return [order[batch_N == batch] for batch in np.unique(batch_N)]


@pytest.mark.parametrize(
    "broken", [drop_remainder, wrap_around, sort_shortest_first, spread_evenly, overrun_the_budget], ids=lambda f: f.__name__
)
def test_exactly_once_check_fails_broken_planners(broken):
    chosen = PlanSettings(global_batch_size=32, global_token_budget=999 if broken is overrun_the_budget else None)
    check_exactly_once(plan_batches, draw_lengths(100), chosen)
    with pytest.raises(AssertionError):
        check_exactly_once(broken, draw_lengths(100), chosen)


# The token budget


def power_of_two_part(count: int) -> int:
    """Return the power of two between a 32nd and a 16th of `count`, or 1."""
    return max(1, 2 ** (int(np.log2(count)) - 4))


def count_fewest_batches(lengths: Ints, cap: int) -> int:
    """Count batches of at most `cap` tokens, filled from the longest remaining text; all but the last are divisible."""
    left, count = sorted(lengths.tolist()), 0
    while left:
        taken, room = 0, cap
        while taken < len(left) and left[-1 - taken] <= room:
            taken, room = taken + 1, room - left[-1 - taken]
        if taken < len(left):
            taken -= taken % power_of_two_part(taken)
        left, count = left[: len(left) - taken], count + 1
    return count


def check_few_and_even(planner: Planner, lengths: Ints, budget: int) -> None:
    batches = planner(lengths, PlanSettings(global_token_budget=budget, bucket_window="epoch"))
    tokens = [int(lengths[ids].sum()) for ids in batches]
    assert len(tokens) == count_fewest_batches(lengths, budget)
    # One token less in the largest batch would need another batch, unless numbers of examples are rounded.
    if tokens and max(map(len, batches)) < 32:
        assert max(tokens) == lengths.max() or count_fewest_batches(lengths, max(tokens) - 1) > len(tokens)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(300, 3000))
def test_token_budget_gives_few_and_even_batches(lengths, budget):
    check_few_and_even(plan_batches, lengths, budget)


def fill_up(lengths: Any, chosen: PlanSettings) -> list[Ints]:
    batches: list[list[int]] = []
    room = 0
    for example in np.argsort(-lengths, kind="stable").tolist():
        if lengths[example] > room:
            batches.append([])
            room = chosen.global_token_budget
        batches[-1].append(example)
        room -= lengths[example]
    return [np.array(ids) for ids in batches]


def single_examples(lengths: Lengths, chosen: PlanSettings) -> list[Ints]:
    return list(np.argsort(-np.asarray(lengths))[:, None])


@pytest.mark.parametrize("broken", [fill_up, single_examples], ids=lambda f: f.__name__)
def test_few_and_even_check_fails_broken_planners(broken):
    lengths = draw_lengths(100)
    check_few_and_even(plan_batches, lengths, 1000)
    check_exactly_once(broken, lengths, PlanSettings(global_token_budget=1000))
    with pytest.raises(AssertionError):
        check_few_and_even(broken, lengths, 1000)


@pytest.mark.parametrize("window", [4, 64])
def test_token_budget_with_windows_needs_few_more_batches(window):
    lengths = draw_lengths(20_000)
    found = plan_batches(lengths, PlanSettings(global_token_budget=4096, bucket_window=window))
    assert len(found) <= 1.06 * -(-lengths.sum() // 4096)


def check_divisible(planner: Planner, window: int | str, num_windows: int) -> None:
    lengths = draw_lengths(20_000)
    found = planner(lengths, PlanSettings(global_token_budget=13_000, bucket_window=window))
    assert min(map(len, found)) >= 32
    assert sum(len(ids) % power_of_two_part(len(ids)) > 0 for ids in found) <= num_windows


@pytest.mark.parametrize(("window", "num_windows"), [("epoch", 1), (20, 5)])
def test_token_budget_batches_divide_among_ranks(window, num_windows):
    check_divisible(plan_batches, window, num_windows)


def test_divisible_check_fails_full_batches():
    with pytest.raises(AssertionError):
        check_divisible(fill_up, "epoch", 1)


# Random access


class PlanLike(Protocol):
    @property
    def num_steps(self) -> int: ...

    def global_batch(self, step: int) -> Ints: ...


def check_random_access(start: Callable[[], PlanLike]) -> None:
    through = start()
    in_order = [through.global_batch(step).tolist() for step in range(through.num_steps)]
    again = start()
    for step in np.random.default_rng(0).permutation(through.num_steps).tolist():
        assert again.global_batch(step).tolist() == in_order[step], "steps in another order"
        assert start().global_batch(step).tolist() == in_order[step], "step without the earlier ones"


@settings(max_examples=40, deadline=None)
@given(LENGTHS, SETTINGS, st.integers(0, 3))
def test_plan_gives_the_same_batches_from_any_step(lengths, chosen, epoch):
    chosen = make_plannable(lengths, chosen)
    check_random_access(lambda: plan(lengths, chosen, epoch=epoch))
    whole = plan(lengths, chosen, epoch=epoch)
    start = whole.num_steps // 2
    rest = [ids.tolist() for ids in plan(lengths, chosen, epoch=epoch).global_batches(start)]
    assert rest == [ids.tolist() for ids in whole.global_batches()][start:]


def test_random_access_check_fails_a_stream():
    class Stream:
        """Batches drawn on demand from one generator, as in common samplers."""

        num_steps = 9

        def __init__(self) -> None:
            self._rng = np.random.default_rng(0)

        def global_batch(self, step: int) -> Ints:
            return self._rng.permutation(99)[:11]

    with pytest.raises(AssertionError, match=r"without the earlier ones|in another order"):
        check_random_access(Stream)


KINDS = [
    PlanSettings(global_batch_size=4, bucket_window=2, seed=7),
    PlanSettings(global_batch_size=4, bucket_window=3, seed=7, block_size=2),
    PlanSettings(global_token_budget=60, bucket_window=2, seed=7),
]


@pytest.mark.parametrize("chosen", KINDS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64, np.uint64, "memmap"])
def test_plan_is_independent_of_the_storage_type(tmp_path, chosen, kind):
    lengths = np.arange(60) * 7 % 53 + 1
    if kind == "memmap":
        lengths.astype(np.uint16).tofile(tmp_path / "lengths")
        stored = np.memmap(tmp_path / "lengths", np.uint16, mode="r")
    else:
        stored = lengths.astype(kind)
    found, expected = plan_batches(stored, chosen), plan_batches(lengths, chosen)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
    assert {ids.dtype for ids in found} == {np.dtype(np.int64)}


@pytest.mark.slow
def test_plan_is_equal_in_another_process():
    code = """if True:
        import json, numpy as np
        from agnews_dist.data.batching.epoch_plan import plan
        from agnews_dist.data.batching.settings import PlanSettings
        chosen = PlanSettings(global_batch_size=7, bucket_window=5, seed=3)
        made = plan(np.arange(500) % 91 + 1, chosen, epoch=2)
        print(json.dumps([ids.tolist() for ids in made.global_batches()]))
        print(json.dumps(np.random.permutation(500).tolist()))
    """
    batches, draw = map(json.loads, python("-c", code).stdout.splitlines())
    expected = plan_batches(np.arange(500) % 91 + 1, PlanSettings(global_batch_size=7, bucket_window=5, seed=3), epoch=2)
    assert batches == [ids.tolist() for ids in expected]
    # Negative control: unseeded draws differ between processes.
    assert draw != np.random.permutation(500).tolist()


FROZEN = [
    [[14, 12, 2, 1], [19, 18, 16, 15], [22, 20, 17, 13], [10, 9, 8, 4], [5, 3, 0], [21, 11, 7, 6]],
    [[19, 18, 16, 15], [14, 7, 6, 3], [2, 1, 0], [22, 21, 20, 17], [13, 12, 11, 10], [9, 8, 5, 4]],
    [[15, 14, 12, 2, 1], [18, 16], [20, 19], [17, 13, 10, 8, 4], [22, 21], [11, 9, 7, 6, 5, 3, 0]],
]


@pytest.mark.parametrize(("chosen", "expected"), list(zip(KINDS, FROZEN, strict=True)))
def test_plan_values_are_frozen(chosen, expected):
    """A run resumed with another numpy or on another machine must get the same batches. For new values raise ALGORITHM."""
    assert [ids.tolist() for ids in plan_batches(np.arange(1, 24), chosen, epoch=3)] == expected
    assert ALGORITHM == 1


# Reads and memory of one step


class Recorder:
    """Lengths of any number of examples, computed on demand; records which were read."""

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
    window = np.concatenate(plan_batches(lengths, chosen)[step // 4 * 4 : step // 4 * 4 + 4])
    lengths.read.clear()
    assert set(planner(lengths, chosen, step).tolist()) <= set(window.tolist())
    assert sorted(np.concatenate(lengths.read).tolist()) == sorted(window.tolist())


@pytest.mark.parametrize("step", [0, 50, 99])
def test_step_in_blocks_reads_only_the_lengths_of_its_window(step):
    check_reads_only_its_window(lambda lengths, chosen, k: plan(lengths, chosen, epoch=0).global_batch(k), step)


def test_window_check_fails_a_walk_through_the_epoch():
    with pytest.raises(AssertionError):
        check_reads_only_its_window(lambda lengths, chosen, k: plan_batches(lengths, chosen)[k], 50)


def peak_memory(lengths: Lengths, chosen: PlanSettings) -> int:
    tracemalloc.start()
    try:
        made = plan(lengths, chosen, epoch=0)
        ids = made.global_batch(made.num_steps // 2)
        share = share_batch(np.asarray(lengths[ids]), num_ranks=4096)
        assert share.bounds_S[[0, -1]].tolist() == [0, len(ids)]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_plan_memory_is_independent_of_the_number_of_examples():
    chosen = PlanSettings(global_batch_size=16_384, bucket_window=16, block_size=16_384)
    few, many = (peak_memory(Recorder(num), chosen) for num in (10**6, 10**9))
    assert many < 1.5 * few
    # Negative control: 4 million examples shuffled one by one take more memory than a billion in blocks.
    single = PlanSettings(global_batch_size=16_384, bucket_window=16)
    assert peak_memory(Recorder(4 * 10**6), single) > many


# Wrong input


@pytest.mark.parametrize("block_size", [1, 4])
def test_plan_names_examples_with_wrong_lengths(block_size):
    chosen = PlanSettings(block_size=block_size)
    lengths = np.full(50, 9)
    lengths[17] = 0
    with pytest.raises(UserError, match=r"^example 17 has 0 tokens: .*at least 1 is needed\. Remove the row or rebuild"):
        plan_batches(lengths, chosen)
    lengths[17] = -3
    with pytest.raises(UserError, match=r"^example 17 has -3 tokens: .*Remove the row"):
        plan_batches(lengths, chosen)
    lengths[17] = 11
    assert len(list(plan(lengths, chosen, epoch=0, max_length=11).global_batches())) == 2
    with pytest.raises(UserError, match=r"^example 17 has 11 tokens, more than the maximum of 10: .*Truncate it, or raise"):
        list(plan(lengths, chosen, epoch=0, max_length=10).global_batches())


def test_plan_checks_lengths_in_memory_before_the_first_step():
    with pytest.raises(UserError, match=r"^example 1500000 has 0 tokens"):
        plan(np.where(np.arange(1_600_000) == 1_500_000, 0, 5), PlanSettings(), epoch=0)


def test_plan_refuses_a_budget_below_the_longest_text():
    with pytest.raises(UserError, match=r"^global_token_budget 8 is below the longest text \(9 tokens\): .*Raise the budget"):
        plan_batches(np.array([3, 9]), PlanSettings(global_token_budget=8))
    assert len(plan_batches(np.array([3, 9]), PlanSettings(global_token_budget=9))) == 2


@pytest.mark.parametrize("name", ["global_batch_size", "global_token_budget", "bucket_window", "block_size"])
@pytest.mark.parametrize("value", [0, -4, np.int64(0), 2.5, True, "all"])
def test_plan_settings_refuse_values_out_of_range(name, value):
    with pytest.raises(UserError) as caught:
        PlanSettings(**{name: value})
    assert str(caught.value).startswith(f"{name} {value!r}: out of range. Set a whole number of at least 1")


def test_plan_settings_refuse_a_negative_seed():
    with pytest.raises(UserError, match=r"^seed -1: .*Set a whole number of at least 0"):
        PlanSettings(seed=-1)


def test_plan_settings_convert_numpy_integers():
    chosen = PlanSettings(global_batch_size=np.int64(8), seed=np.uint8(3))
    assert json.dumps(asdict(chosen)) == json.dumps(asdict(PlanSettings(global_batch_size=8, seed=3)))


def test_plan_settings_have_the_defaults_of_the_configuration():
    chosen, config = PlanSettings(), BatchConfig()
    for name in ("global_batch_size", "global_token_budget", "bucket_window"):
        assert getattr(chosen, name) == getattr(config, name)


@pytest.mark.parametrize(
    "lengths",
    [np.arange(1, 5).reshape(4, 1), np.array([3.0, 2.0]), np.array([np.nan]), [2.5, 1.0], np.array(["a"])],
    ids=["column", "floats", "nan", "list of floats", "text"],
)
def test_plan_refuses_lengths_that_are_not_integers(lengths):
    with pytest.raises(UserError, match=r"^lengths of .*lost or miscounted\. Give one whole number of tokens"):
        plan_batches(lengths, PlanSettings())


@pytest.mark.parametrize("made", [list, torch.tensor, pandas.Series], ids=["list", "tensor", "series"])
def test_plan_accepts_lists_tensors_and_series(made):
    lengths = draw_lengths(100)
    found, expected = plan_batches(made(lengths.tolist()), PlanSettings()), plan_batches(lengths, PlanSettings())
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


@pytest.mark.parametrize("chosen", [{"global_batch_size": 32}, {"global_token_budget": 2000}], ids=["examples", "tokens"])
def test_plan_refuses_blocks_too_large_for_the_windows(chosen):
    """Otherwise a file sorted by class would give batches of one class each."""
    lengths = draw_lengths(5000)
    with pytest.raises(UserError, match=r"^block_size 512, \d+ examples per window: .*neighbours.*raise bucket_window"):
        plan_batches(lengths, PlanSettings(**chosen, bucket_window=16, block_size=512))
    check_exactly_once(plan_batches, lengths, PlanSettings(**chosen, bucket_window=16, block_size=64))
    check_exactly_once(plan_batches, lengths, PlanSettings(**chosen, bucket_window="epoch", block_size=512))


def test_plan_accepts_a_block_larger_than_the_data():
    check_exactly_once(plan_batches, draw_lengths(5), PlanSettings(block_size=10**12))


def test_plan_refuses_a_negative_epoch():
    with pytest.raises(UserError, match=r"^epoch -1: .*Count epochs from 0"):
        plan(np.ones(40, np.int64), PlanSettings(), epoch=-1)


@pytest.mark.parametrize("step", [-1, 2])
def test_plan_raises_index_error_outside_the_epoch(step):
    with pytest.raises(IndexError, match=rf"^step {step} of an epoch of 2$"):
        plan(np.ones(40, np.int64), PlanSettings(), epoch=0).global_batch(step)
