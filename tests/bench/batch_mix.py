"""How the batches of an epoch are mixed, for every order that bucketing.py trains with. Pure numpy.

Orders: a `bucket_window` ("1" is random batches, "epoch" sorts all), or one of two harmful controls.
"""

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.batching.shares import measure_efficiency, share_batch
from agnews_dist.data.rows import Ints

BY_LENGTH, ONE_LABEL = "shortest first", "one label per batch"
ORDERS = ("1", "4", "16", "64", "128", "256", "epoch", BY_LENGTH, ONE_LABEL)
BATCH, EPOCHS = 32, 3
NUM_RESAMPLED = 120_000


def global_batches(order: str, lengths_N: Ints, labels_N: Ints, *, seed: int, epoch: int) -> list[Ints]:
    """The epoch's batches: the package's plan for a window, or a control."""
    if order not in (BY_LENGTH, ONE_LABEL):
        window = "epoch" if order == "epoch" else int(order)
        settings = PlanSettings(global_batch_size=BATCH, bucket_window=window, seed=seed)
        return list(plan(lengths_N, settings, epoch=epoch).global_batches())
    rng = np.random.default_rng((seed, epoch))
    mixed = rng.permutation(len(lengths_N))
    by = lengths_N if order == BY_LENGTH else labels_N
    ids = mixed[np.argsort(by[mixed], kind="stable")]
    batches = [ids[begin : begin + BATCH] for begin in range(0, len(ids), BATCH)]
    return batches if order == BY_LENGTH else [batches[i] for i in rng.permutation(len(batches))]


def label_mix(batches: Iterable[Ints], labels_N: Ints) -> float:
    """Mean over batches of Pearson's chi-square of the label counts against the epoch's shares, 1.0 being chance.

    By chance (drawing without replacement) a batch of B of N examples has (C - 1) (N - B) / (N - 1).
    """
    shares_C = np.bincount(labels_N) / len(labels_N)
    found = expected = 0.0
    for ids in batches:
        counts_C = np.bincount(labels_N[ids], minlength=len(shares_C))
        found += float(((counts_C - len(ids) * shares_C) ** 2 / (len(ids) * shares_C)).sum())
        expected += (len(shares_C) - 1) * (len(labels_N) - len(ids)) / (len(labels_N) - 1)
    return found / expected


def length_between(batches: Iterable[Ints], lengths_N: Ints) -> float:
    """Share of the variance of length that lies between batches: by chance (K - 1) / (N - 1), 1 if each has one length."""
    mean = lengths_N.mean()
    between = sum(len(ids) * (lengths_N[ids].mean() - mean) ** 2 for ids in batches)
    return float(between / ((lengths_N - mean) ** 2).sum())


def pairs_again(first: list[Ints], second: list[Ints]) -> tuple[float, float]:
    """(fraction of the pairs that share a batch in one epoch and share one in the next, what chance would give)."""
    num_examples = sum(map(len, first))
    batch_of_N = np.empty(num_examples, np.int64)
    for number, ids in enumerate(second):
        batch_of_N[ids] = number
    again = sum(int((n * (n - 1) // 2).sum()) for n in (np.bincount(batch_of_N[ids]) for ids in first))
    pairs, all_pairs = sum(math.comb(len(ids), 2) for ids in first), math.comb(num_examples, 2)
    return again / pairs, sum(math.comb(len(ids), 2) for ids in second) / all_pairs


def statistics_rows(lengths_N: Ints, labels_N: Ints, *, num_seeds: int = 10) -> Iterator[dict[str, Any]]:
    """One row per order. On the real rows: means over `num_seeds` seeds and all epochs; on as many as all of AG News has,
    resampled from them (`_resampled`): one seed, and no labels, for the copies of a row share theirs."""
    drawn = np.random.default_rng(0).integers(0, len(lengths_N), NUM_RESAMPLED)
    resampled_N, resampled_labels_N = lengths_N[drawn], labels_N[drawn]
    for order in ORDERS:
        runs = [
            [global_batches(order, lengths_N, labels_N, seed=seed, epoch=epoch) for epoch in range(EPOCHS)]
            for seed in range(num_seeds)
        ]
        large = [global_batches(order, resampled_N, resampled_labels_N, seed=0, epoch=epoch) for epoch in range(2)]
        again = [pairs_again(run[i], run[i + 1]) for run in runs for i in range(EPOCHS - 1)]
        again_resampled, chance_resampled = pairs_again(*large)
        row: dict[str, Any] = {
            "what": "statistics",
            "order": order,
            "num_seeds": num_seeds,
            "label_mix": statistics.mean(label_mix(batches, labels_N) for run in runs for batches in run),
            "length_between": statistics.mean(length_between(batches, lengths_N) for run in runs for batches in run),
            "pairs_again": statistics.mean(found for found, _ in again),
            "pairs_again_chance": statistics.mean(chance for _, chance in again),
            "pairs_again_resampled": again_resampled,
            "pairs_again_resampled_chance": chance_resampled,
        }
        for name, of_N, batches in (("", lengths_N, runs[0][0]), ("_resampled", resampled_N, large[0])):
            descending = [-np.sort(-of_N[ids]) for ids in batches]
            row[f"padding{name}"] = measure_efficiency(share_batch(rows, num_ranks=1) for rows in descending).padding
            row[f"critical_path{name}"] = measure_efficiency(
                share_batch(rows, num_ranks=2) for rows in descending
            ).critical_path
        yield row
