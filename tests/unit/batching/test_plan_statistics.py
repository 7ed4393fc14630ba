"""What bucketing may not do to training: batches stay random in every way but the lengths of batch mates.

Every checker takes a planner and is shown to fail a broken one. All draws are seeded, so nothing here fails by chance; margins
are five standard deviations of the chi-square distribution.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from agnews_dist.data.batching.epoch_plan import Ints, PlanSettings, plan, shuffle

Planner = Callable[[Ints, PlanSettings, int], list[Ints]]


def ours(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    return list(plan(lengths, chosen, epoch=epoch).global_batches())


def in_file_order(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    """Windows of neighbours in the file, each sorted and cut; the batches of each window shuffled."""
    rng, found = np.random.default_rng(epoch), []
    step = chosen.global_batch_size * (len(lengths) if chosen.bucket_window == "epoch" else chosen.bucket_window)
    for begin in range(0, len(lengths), step):
        ids = np.arange(begin, min(begin + step, len(lengths)))
        ids = ids[np.argsort(-lengths[ids], kind="stable")]
        batches = [ids[i : i + chosen.global_batch_size] for i in range(0, len(ids), chosen.global_batch_size)]
        found += [batches[i] for i in rng.permutation(len(batches))]
    return found


def ag_news_like(num: int) -> Ints:
    return np.clip(np.random.default_rng(0).lognormal(3.9, 0.33, num), 8, 323).astype(np.int64)


def check_chi_square(counts: np.ndarray, expected: np.ndarray | float, degrees: int) -> None:
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees), f"chi-square {chi_square:.0f} of {degrees} degrees"


def check_independent(table: np.ndarray) -> None:
    """Rows and columns of a table of counts have nothing to do with each other."""
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    check_chi_square(table, expected, (table.shape[0] - 1) * (table.shape[1] - 1))


# Shuffling


def check_uniform(draw: Callable[[int], list[int]], count: int, draws: int) -> None:
    """`draw(seed)` gives every order of `count` things equally often."""
    seen = Counter(tuple(draw(seed)) for seed in range(draws))
    orders = list(itertools.permutations(range(count)))
    check_chi_square(np.array([seen[order] for order in orders]), draws / len(orders), len(orders) - 1)
    assert sum(seen[order] for order in orders) == draws


def stream(seed: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(seed))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_is_equally_likely(count):
    check_uniform(lambda seed: shuffle(count, stream(seed)).tolist(), count, 12_000)


def test_every_order_of_the_steps_is_equally_likely_over_seeds_and_epochs():
    def steps(number: int) -> list[int]:
        chosen = PlanSettings(global_batch_size=1, bucket_window="epoch", seed=number // 10)
        return [int(ids[0]) for ids in ours(np.array([5, 9, 2, 7]), chosen, number % 10)]

    check_uniform(steps, 4, 4_800)


def test_a_well_known_wrong_shuffle_does_not_pass_for_uniform():
    def swaps_with_any(seed: int) -> list[int]:
        rng, order = np.random.default_rng(seed), list(range(4))
        for i, j in enumerate(rng.integers(4, size=4).tolist()):
            order[i], order[j] = order[j], order[i]
        return order

    with pytest.raises(AssertionError, match="chi-square"):
        check_uniform(swaps_with_any, 4, 4_800)


def test_a_long_shuffle_is_a_permutation_without_memory():
    order = shuffle(100_000, stream(0))
    assert (np.sort(order) == np.arange(100_000)).all()
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


# Epochs


def num_mates_kept(planner: Planner, lengths: Ints, chosen: PlanSettings, num_epochs: int) -> int:
    """How many pairs of batch mates of one epoch are mates in the next again, summed over neighbouring epochs."""
    batch_EN = np.empty((num_epochs, len(lengths)), dtype=np.int64)
    for epoch in range(num_epochs):
        for number, ids in enumerate(planner(lengths, chosen, epoch)):
            batch_EN[epoch, ids] = number
    kept = 0
    for batch_N, next_N in itertools.pairwise(batch_EN):
        _, together = np.unique(np.stack([batch_N, next_N]), axis=1, return_counts=True)
        kept += int((together * (together - 1) // 2).sum())
    return kept


def check_mates_change(planner: Planner, block_size: int) -> None:
    """Classes of 256 examples of equal length: mates of an epoch meet in the next one as often as any two of their class."""
    num_classes, in_class, size, num_epochs = 4, 256, 16, 21
    lengths = np.arange(num_classes * in_class) % num_classes + 10
    chosen = PlanSettings(global_batch_size=size, bucket_window="epoch", block_size=block_size)
    pairs = num_classes * in_class * (size - 1) / 2
    expected = (num_epochs - 1) * pairs * (size - 1) / (in_class - 1)
    kept = num_mates_kept(planner, lengths, chosen, num_epochs)
    assert abs(kept - expected) < 5 * math.sqrt(expected), f"{kept} pairs stay together, {expected:.0f} by chance"


@pytest.mark.parametrize("block_size", [1, 16, 1000])
def test_examples_of_equal_length_do_not_stay_together(block_size):
    check_mates_change(ours, block_size)


def blocks_unmixed(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    """Blocks of neighbours shuffled, and their examples sorted as they then stand."""
    blocks = np.random.default_rng(epoch).permutation(np.arange(len(lengths)).reshape(-1, 16)).ravel()
    order = blocks[np.argsort(-lengths[blocks], kind="stable")]
    return list(order.reshape(-1, chosen.global_batch_size))


@pytest.mark.parametrize("broken", [in_file_order, blocks_unmixed], ids=lambda f: f.__name__)
def test_sorting_without_shuffling_does_not_pass_for_changing_mates(broken):
    with pytest.raises(AssertionError, match="stay together"):
        check_mates_change(broken, 1)


def check_epochs_differ(planner: Planner, chosen: PlanSettings) -> None:
    """Batches of an epoch, and which examples are in its first half, come as by chance in the next one."""
    lengths = ag_news_like(3200)
    first, second = (planner(lengths, chosen, epoch) for epoch in (0, 1))
    assert not {tuple(sorted(ids.tolist())) for ids in first} & {tuple(sorted(ids.tolist())) for ids in second}
    halves = [np.concatenate(found[: len(found) // 2]) for found in (first, second)]
    num_both = len(np.intersect1d(*halves))
    assert abs(num_both - 800) < 5 * math.sqrt(200), f"{num_both} of 1,600 examples in the first half again"


@pytest.mark.parametrize("window", [1, 10, 64])
def test_epochs_differ(window):
    check_epochs_differ(ours, PlanSettings(bucket_window=window))
    check_epochs_differ(
        lambda lengths, chosen, epoch: ours(lengths, chosen, epoch + 5), PlanSettings(bucket_window=window)
    )


def test_sorting_the_whole_epoch_repeats_only_batches_of_rare_lengths():
    """The very longest and shortest are mates in every epoch then, as no others are of their length: a price of 'epoch'."""
    lengths = ag_news_like(3200)
    first, second = (ours(lengths, PlanSettings(bucket_window="epoch"), epoch) for epoch in (0, 1))
    again = {frozenset(ids.tolist()) for ids in first} & {frozenset(ids.tolist()) for ids in second}
    medians = [np.median(lengths[list(ids)]) for ids in again]
    assert all(not 0.05 < (lengths < median).mean() < 0.95 for median in medians)


def test_seeds_differ():
    check_epochs_differ(
        lambda lengths, _, seed: ours(lengths, PlanSettings(bucket_window=10, seed=seed), 0), PlanSettings()
    )


def same_windows(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
    """Each window's batches shuffled anew, from the same shuffled order in every epoch."""
    order = np.random.default_rng(0).permutation(len(lengths))
    return [order[ids] for ids in in_file_order(lengths[order], chosen, epoch)]


def test_the_same_windows_in_every_epoch_do_not_pass_for_different_epochs():
    with pytest.raises(AssertionError):
        check_epochs_differ(same_windows, PlanSettings(bucket_window=10))


# Steps


def check_steps_not_by_length(planner: Planner, window: int | str) -> None:
    lengths = ag_news_like(32 * 400)
    mean_K = np.array([lengths[ids].mean() for ids in planner(lengths, PlanSettings(bucket_window=window), 0)])
    assert abs(np.corrcoef(np.arange(len(mean_K)), mean_K)[0, 1]) < 0.2
    # Sorted inside each window shows between neighbours, however many windows there are.
    assert abs(np.corrcoef(mean_K[:-1], mean_K[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("window", [1, 10, 64, "epoch"])
def test_the_order_of_steps_is_not_by_length(window):
    check_steps_not_by_length(ours, window)


def test_batches_sorted_inside_windows_do_not_pass_for_a_random_order():
    def sorted_inside(lengths: Ints, chosen: PlanSettings, epoch: int) -> list[Ints]:
        found = ours(lengths, chosen, epoch)
        windows = [found[i : i + 40] for i in range(0, len(found), 40)]
        return [ids for window in windows for ids in sorted(window, key=lambda ids: lengths[ids].sum())]

    with pytest.raises(AssertionError):
        check_steps_not_by_length(sorted_inside, "epoch")


def check_windows_are_random_samples(planner: Planner) -> None:
    """Windows of 4 batches; how many examples of each tenth of the file every one of them holds. The file is sorted."""
    lengths, found = np.sort(ag_news_like(6400)), []
    for epoch in range(3):
        found += planner(lengths, PlanSettings(global_batch_size=32, bucket_window=4), epoch)
    tenths = [np.bincount(np.concatenate(found[i : i + 4]) * 10 // 6400, minlength=10) for i in range(0, len(found), 4)]
    assert len(tenths) == 150
    check_independent(np.array(tenths))


def test_every_window_is_a_random_sample_of_the_epoch():
    check_windows_are_random_samples(ours)


def test_windows_of_neighbours_do_not_pass_for_random_samples():
    with pytest.raises(AssertionError, match="chi-square"):
        check_windows_are_random_samples(in_file_order)


def check_short_batch_anywhere(planner: Planner) -> None:
    """650 examples are 20 batches of 32 and one of 10: where it stands by length and by step, over 420 epochs."""
    lengths, by_length, by_step = ag_news_like(650), [], []
    for epoch in range(420):
        found = planner(lengths, PlanSettings(bucket_window="epoch"), epoch)
        by_step.append(next(i for i, ids in enumerate(found) if len(ids) == 10))
        found.sort(key=lambda ids: -lengths[ids].mean())
        by_length.append(next(i for i, ids in enumerate(found) if len(ids) == 10))
    for places in (by_length, by_step):
        check_chi_square(np.bincount(places, minlength=21), 20.0, 20)


def test_the_short_batch_may_be_any_by_length_and_by_step():
    check_short_batch_anywhere(ours)


def test_a_short_batch_of_the_shortest_does_not_pass_for_any():
    with pytest.raises(AssertionError, match="chi-square"):
        check_short_batch_anywhere(in_file_order)


# Labels


def check_label_mix(planner: Planner, window: int | str) -> None:
    """Four classes of different lengths, sorted by class in the file: each batch holds of each as many as by chance."""
    labels = np.repeat(np.arange(4), 1600)
    lengths = ag_news_like(6400) + 20 * labels
    found = planner(lengths, PlanSettings(bucket_window=window), 0)
    check_independent(np.array([np.bincount(labels[ids], minlength=4) for ids in found]))


def test_without_bucketing_the_label_mix_is_that_of_random_batches():
    check_label_mix(ours, 1)


def test_bucketing_and_file_order_are_seen_in_the_label_mix():
    with pytest.raises(AssertionError, match="chi-square"):
        check_label_mix(ours, 64)
    with pytest.raises(AssertionError, match="chi-square"):
        check_label_mix(in_file_order, 1)


# Windows


def check_no_nearly_random_batches(planner: Planner, num_steps: int) -> None:
    """Lengths from 1 to 10,000: in a window of 64 batches each spans some 160. A window of few batches shows as a wide one."""
    lengths = np.random.default_rng(0).integers(1, 10_001, 8 * num_steps)
    chosen = PlanSettings(global_batch_size=8, bucket_window=64)
    widths = [int(np.ptp(lengths[ids])) for ids in planner(lengths, chosen, 0)]
    assert len(widths) == num_steps
    assert max(widths) < 1000


@pytest.mark.parametrize("num_steps", [64, 65, 95, 97, 130, 1000])
def test_every_window_is_about_as_large_as_asked_for(num_steps):
    check_no_nearly_random_batches(ours, num_steps)


def test_full_windows_and_a_rest_do_not_pass_for_windows_of_equal_size():
    check_no_nearly_random_batches(in_file_order, 128)
    with pytest.raises(AssertionError):
        check_no_nearly_random_batches(in_file_order, 130)
