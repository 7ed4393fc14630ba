"""Statistics of the plan: batches are random except for the similar lengths of their examples.

Every checker takes a planner and also runs on a broken one, where it must fail. All draws are seeded, so no test fails by
chance. Margins are five standard deviations of the chi-square distribution.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from support.plans import draw_lengths, plan_batches

from agnews_dist.data.batching.epoch_plan import shuffle
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.rows import Ints

Planner = Callable[[Ints, PlanSettings, int], list[Ints]]


def keep_file_order(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    """Sort and cut windows of neighbours in the file, and shuffle the batches of each window."""
    rng, found = np.random.default_rng(epoch), []
    step = chosen.global_batch_size * (len(lengths) if chosen.bucket_window == "epoch" else chosen.bucket_window)
    for begin in range(0, len(lengths), step):
        ids = np.arange(begin, min(begin + step, len(lengths)))
        ids = ids[np.argsort(-lengths[ids], kind="stable")]
        batches = [ids[i : i + chosen.global_batch_size] for i in range(0, len(ids), chosen.global_batch_size)]
        found += [batches[i] for i in rng.permutation(len(batches))]
    return found


def check_chi_square(counts: np.ndarray, expected: np.ndarray | float, degrees: int) -> None:
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees), f"chi-square {chi_square:.0f} of {degrees} degrees"


def check_independent(table: np.ndarray) -> None:
    """Check that rows and columns of a table of counts are independent."""
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    check_chi_square(table, expected, (table.shape[0] - 1) * (table.shape[1] - 1))


# Shuffling


def check_uniform(draw: Callable[[int], list[int]], count: int, draws: int) -> None:
    """Check that `draw(seed)` gives every order of `count` items equally often."""
    seen = Counter(tuple(draw(seed)) for seed in range(draws))
    orders = list(itertools.permutations(range(count)))
    check_chi_square(np.array([seen[order] for order in orders]), draws / len(orders), len(orders) - 1)
    assert sum(seen[order] for order in orders) == draws


def stream(seed: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(seed))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_shuffle_is_uniform(count):
    check_uniform(lambda seed: shuffle(count, stream(seed)).tolist(), count, 12_000)


@pytest.mark.slow
def test_order_of_steps_is_uniform_over_seeds_and_epochs():
    def steps(number: int) -> list[int]:
        chosen = PlanSettings(global_batch_size=1, bucket_window="epoch", seed=number // 10)
        return [int(ids[0]) for ids in plan_batches(np.array([5, 9, 2, 7]), chosen, number % 10)]

    check_uniform(steps, 4, 4_800)


def test_uniform_check_fails_a_biased_shuffle():
    def swap_with_any(seed: int) -> list[int]:
        rng, order = np.random.default_rng(seed), list(range(4))
        for i, j in enumerate(rng.integers(4, size=4).tolist()):
            order[i], order[j] = order[j], order[i]
        return order

    with pytest.raises(AssertionError, match="chi-square"):
        check_uniform(swap_with_any, 4, 4_800)


def test_shuffle_of_many_is_an_uncorrelated_permutation():
    order = shuffle(100_000, stream(0))
    assert (np.sort(order) == np.arange(100_000)).all()
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


# Epochs


def count_repeated_pairs(planner: Planner, lengths: Ints, chosen: PlanSettings, num_epochs: int) -> int:
    """Count the pairs that share a batch in one epoch and again in the next, summed over neighbouring epochs."""
    batch_EN = np.empty((num_epochs, len(lengths)), dtype=np.int64)
    for epoch in range(num_epochs):
        for number, ids in enumerate(planner(lengths, chosen, epoch)):
            batch_EN[epoch, ids] = number
    kept = 0
    for batch_N, next_N in itertools.pairwise(batch_EN):
        _, together = np.unique(np.stack([batch_N, next_N]), axis=1, return_counts=True)
        kept += int((together * (together - 1) // 2).sum())
    return kept


def check_pairs_change(planner: Planner, block_size: int) -> None:
    """Check that, in groups of 256 examples of equal length, a pair meets again as often as any two of its group."""
    num_classes, in_class, size, num_epochs = 4, 256, 16, 21
    lengths = np.arange(num_classes * in_class) % num_classes + 10
    chosen = PlanSettings(global_batch_size=size, bucket_window="epoch", block_size=block_size)
    pairs = num_classes * in_class * (size - 1) / 2
    expected = (num_epochs - 1) * pairs * (size - 1) / (in_class - 1)
    kept = count_repeated_pairs(planner, lengths, chosen, num_epochs)
    assert abs(kept - expected) < 5 * math.sqrt(expected), f"{kept} pairs stay together, {expected:.0f} by chance"


@pytest.mark.parametrize("block_size", [1, 16, 1000])
def test_examples_of_equal_length_change_batches(block_size):
    check_pairs_change(plan_batches, block_size)


def keep_blocks(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    """Shuffle blocks of neighbours, then sort by length without shuffling inside the blocks."""
    blocks = np.random.default_rng(epoch).permutation(np.arange(len(lengths)).reshape(-1, 16)).ravel()
    order = blocks[np.argsort(-lengths[blocks], kind="stable")]
    return list(order.reshape(-1, chosen.global_batch_size))


@pytest.mark.parametrize("broken", [keep_file_order, keep_blocks], ids=lambda f: f.__name__)
def test_pairs_check_fails_unshuffled_planners(broken):
    with pytest.raises(AssertionError, match="stay together"):
        check_pairs_change(broken, 1)


def check_epochs_differ(planner: Planner, chosen: PlanSettings) -> None:
    """Check that batches of one epoch, and the examples of its first half, recur in the next only by chance."""
    lengths = draw_lengths(3200)
    first, second = (planner(lengths, chosen, epoch) for epoch in (0, 1))
    assert not {tuple(sorted(ids.tolist())) for ids in first} & {tuple(sorted(ids.tolist())) for ids in second}
    halves = [np.concatenate(found[: len(found) // 2]) for found in (first, second)]
    num_both = len(np.intersect1d(*halves))
    assert abs(num_both - 800) < 5 * math.sqrt(200), f"{num_both} of 1,600 examples in the first half again"


@pytest.mark.parametrize("window", [1, 10, 64])
def test_plan_differs_between_epochs(window):
    check_epochs_differ(plan_batches, PlanSettings(bucket_window=window))
    check_epochs_differ(
        lambda lengths, chosen, epoch: plan_batches(lengths, chosen, epoch + 5), PlanSettings(bucket_window=window)
    )


def test_window_of_an_epoch_repeats_only_batches_of_rare_lengths():
    """The longest and shortest examples share a batch in every epoch, because no others have their length."""
    lengths = draw_lengths(3200)
    first, second = (plan_batches(lengths, PlanSettings(bucket_window="epoch"), epoch) for epoch in (0, 1))
    again = {frozenset(ids.tolist()) for ids in first} & {frozenset(ids.tolist()) for ids in second}
    medians = [np.median(lengths[list(ids)]) for ids in again]
    assert all(not 0.05 < (lengths < median).mean() < 0.95 for median in medians)


def test_plan_differs_between_seeds():
    check_epochs_differ(
        lambda lengths, _, seed: plan_batches(lengths, PlanSettings(bucket_window=10, seed=seed), 0), PlanSettings()
    )


def repeat_windows(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    """Cut the same shuffled order in every epoch; only the batches of each window are shuffled again."""
    order = np.random.default_rng(0).permutation(len(lengths))
    return [order[ids] for ids in keep_file_order(lengths[order], chosen, epoch)]


def test_epochs_check_fails_repeated_windows():
    with pytest.raises(AssertionError):
        check_epochs_differ(repeat_windows, PlanSettings(bucket_window=10))


# Steps


def check_steps_uncorrelated_with_length(planner: Planner, window: int | str) -> None:
    lengths = draw_lengths(32 * 400)
    mean_K = np.array([lengths[ids].mean() for ids in planner(lengths, PlanSettings(bucket_window=window), 0)])
    assert abs(np.corrcoef(np.arange(len(mean_K)), mean_K)[0, 1]) < 0.2
    # Order inside the windows shows between neighbours, for any number of windows.
    assert abs(np.corrcoef(mean_K[:-1], mean_K[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("window", [1, 10, 64, "epoch"])
def test_order_of_steps_is_uncorrelated_with_length(window):
    check_steps_uncorrelated_with_length(plan_batches, window)


def test_order_check_fails_batches_sorted_inside_windows():
    def sorted_inside(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
        found = plan_batches(lengths, chosen, epoch)
        windows = [found[i : i + 40] for i in range(0, len(found), 40)]
        return [ids for window in windows for ids in sorted(window, key=lambda ids: lengths[ids].sum())]

    with pytest.raises(AssertionError):
        check_steps_uncorrelated_with_length(sorted_inside, "epoch")


def check_windows_are_random_samples(planner: Planner) -> None:
    """Count the examples of each tenth of a sorted file in every window of 4 batches."""
    lengths, found = np.sort(draw_lengths(6400)), []
    for epoch in range(3):
        found += planner(lengths, PlanSettings(global_batch_size=32, bucket_window=4), epoch)
    tenths = [np.bincount(np.concatenate(found[i : i + 4]) * 10 // 6400, minlength=10) for i in range(0, len(found), 4)]
    assert len(tenths) == 150
    check_independent(np.array(tenths))


def test_windows_are_random_samples_of_the_epoch():
    check_windows_are_random_samples(plan_batches)


def test_random_sample_check_fails_windows_of_neighbours():
    with pytest.raises(AssertionError, match="chi-square"):
        check_windows_are_random_samples(keep_file_order)


def check_place_of_short_batch(planner: Planner) -> None:
    """Check the batch of 10 among 20 batches of 32: its place by length and by step is uniform over 420 epochs."""
    lengths, by_length, by_step = draw_lengths(650), [], []
    for epoch in range(420):
        found = planner(lengths, PlanSettings(bucket_window="epoch"), epoch)
        by_step.append(next(i for i, ids in enumerate(found) if len(ids) == 10))
        found.sort(key=lambda ids: -lengths[ids].mean())
        by_length.append(next(i for i, ids in enumerate(found) if len(ids) == 10))
    for places in (by_length, by_step):
        check_chi_square(np.bincount(places, minlength=21), 20.0, 20)


def test_short_batch_takes_any_place():
    check_place_of_short_batch(plan_batches)


def test_short_batch_check_fails_a_fixed_place():
    with pytest.raises(AssertionError, match="chi-square"):
        check_place_of_short_batch(keep_file_order)


# Labels


def check_label_mix(planner: Planner, window: int | str) -> None:
    """Check that each batch holds four classes of different lengths as often as by chance; the file is sorted by class."""
    labels = np.repeat(np.arange(4), 1600)
    lengths = draw_lengths(6400) + 20 * labels
    found = planner(lengths, PlanSettings(bucket_window=window), 0)
    check_independent(np.array([np.bincount(labels[ids], minlength=4) for ids in found]))


def test_label_mix_without_bucketing_is_that_of_random_batches():
    check_label_mix(plan_batches, 1)


def test_label_mix_check_fails_bucketing_and_file_order():
    with pytest.raises(AssertionError, match="chi-square"):
        check_label_mix(plan_batches, 64)
    with pytest.raises(AssertionError, match="chi-square"):
        check_label_mix(keep_file_order, 1)


# Windows


def check_widths_of_batches(planner: Planner, num_steps: int) -> None:
    """Check the span of batches of lengths from 1 to 10,000: some 160 in a window of 64 batches, more in a short window."""
    lengths = np.random.default_rng(0).integers(1, 10_001, 8 * num_steps)
    chosen = PlanSettings(global_batch_size=8, bucket_window=64)
    widths = [int(np.ptp(lengths[ids])) for ids in planner(lengths, chosen, 0)]
    assert len(widths) == num_steps
    assert max(widths) < 1000


@pytest.mark.parametrize("num_steps", [64, 65, 95, 97, 130, 1000])
def test_windows_have_nearly_equal_sizes(num_steps):
    check_widths_of_batches(plan_batches, num_steps)


def test_window_size_check_fails_full_windows_with_a_remainder():
    check_widths_of_batches(keep_file_order, 128)
    with pytest.raises(AssertionError):
        check_widths_of_batches(keep_file_order, 130)
