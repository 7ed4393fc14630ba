"""The plan: which examples form each global batch of an epoch, and which rank computes which part. Pure numpy.

An epoch is a function of `(lengths, global_batch_size, bucket_window, seed, epoch)` alone. Ranks, micro-batches and restarts
never change what is in global batch k; they only change how it is split. Every example comes exactly once per epoch, and every
rank runs the same number of micro-batches at every step, so no collective is ever left alone.

A global batch is split into contiguous slices of its length-sorted rows with unequal counts and equal padded cost
(rows x longest row), because the step is as slow as its slowest rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agnews_dist.errors import UserError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """An epoch: `order_N` holds every example once; global batch k is `order_N[starts[k]:starts[k + 1]]`, longest first."""

    order_N: Ints
    starts: Ints

    @property
    def num_steps(self) -> int:
        return len(self.starts) - 1

    def global_batch(self, step: int) -> Ints:
        """Example ids of one global batch, longest first."""
        return self.order_N[self.starts[step] : self.starts[step + 1]]


def num_steps_per_epoch(num_examples: int, global_batch_size: int) -> int:
    """Global batches per epoch; the last one to be cut may be smaller, none is dropped."""
    return -(-num_examples // global_batch_size)


def plan_epoch(lengths_N: Ints, *, global_batch_size: int, bucket_window: int, seed: int, epoch: int) -> Plan:
    """Shuffle, sort by length inside windows of `bucket_window` global batches, cut, shuffle the batches.

    Random bits come straight from the bit generator, whose stream numpy guarantees, not from `Generator.permutation`, which
    may change between versions.

    Raises:
        UserError: a length below 1.
    """
    num_examples = len(lengths_N)
    if num_examples and int(lengths_N.min()) < 1:
        bad = int(np.flatnonzero(lengths_N < 1)[0])
        raise UserError(
            f"example {bad} has {int(lengths_N[bad])} tokens: an example without a token has no last token to classify "
            "from. Remove the row or rebuild the token cache."
        )
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order_N = np.argsort(bits.random_raw(num_examples), kind="stable").astype(np.int64)

    pieces: list[Ints] = []
    window = bucket_window * global_batch_size
    for begin in range(0, num_examples, window):
        rows = order_N[begin : begin + window]
        # Stable on shuffled rows: examples of equal length meet different batch mates in every epoch.
        rows = rows[np.argsort(-lengths_N[rows], kind="stable")]
        pieces.extend(_cut(rows, global_batch_size, bits))
    batch_order = np.argsort(bits.random_raw(len(pieces)), kind="stable") if pieces else []
    batches = [pieces[i] for i in batch_order]
    starts = np.cumsum([0, *(len(batch) for batch in batches)], dtype=np.int64)
    return Plan(np.concatenate(batches) if batches else order_N, starts)


def _cut(rows: Ints, size: int, bits: np.random.PCG64) -> Iterator[Ints]:
    """Cut into batches of `size`; a smaller batch, if any, takes a random place, lest it always hold the extreme lengths."""
    remainder = len(rows) % size
    short_at = int(bits.random_raw() % (len(rows) // size + 1)) if remainder else -1
    begin = index = 0
    while begin < len(rows):
        end = begin + (remainder if index == short_at else size)
        yield rows[begin:end]
        begin, index = end, index + 1


@dataclass(frozen=True)
class Share:
    """One global batch dealt out: `slices[m][r]` is the (begin, end) of rank r's rows in micro-batch m, maybe empty."""

    slices: tuple[tuple[tuple[int, int], ...], ...]
    num_real_tokens: int
    num_padded_tokens: int
    """Tokens computed over all ranks, padding and filler rows included."""
    critical_tokens: int
    """Sum over micro-batches of the largest padded share: what the step waits for."""


def share(lengths_B: Ints, *, num_ranks: int, max_tokens_per_rank: int) -> Share:
    """Deal one global batch (`lengths_B`, longest first) to the ranks in as few micro-batches as the token limit allows.

    Raises:
        UserError: the longest example exceeds `max_tokens_per_rank`.
    """
    longest = int(lengths_B[0]) if len(lengths_B) else 0
    if longest > max_tokens_per_rank:
        raise UserError(
            f"batch.max_tokens_per_rank {max_tokens_per_rank} is below the longest text ({longest} tokens): it fits into no "
            "micro-batch. Raise it, or lower data.max_length."
        )
    num_real = int(lengths_B.sum())
    num_micro = max(1, -(-num_real // (num_ranks * max_tokens_per_rank)))
    while True:
        cap = _smallest_cap(lengths_B, num_micro * num_ranks)
        if cap <= max_tokens_per_rank:
            break
        num_micro += 1
    bounds = _fill(lengths_B, num_micro * num_ranks, cap)
    slices: list[tuple[tuple[int, int], ...]] = []
    padded = critical = 0
    for micro in range(num_micro):
        # Neighbouring slices go to different ranks of the same micro-batch: similar lengths at the same moment.
        cut = bounds[micro * num_ranks : (micro + 1) * num_ranks + 1]
        row = tuple((cut[r], cut[r + 1]) for r in range(num_ranks))
        costs = [max(1, (end - begin) * int(lengths_B[begin]) if end > begin else 1) for begin, end in row]
        slices.append(row)
        padded += sum(costs)
        critical += max(costs)
    return Share(tuple(slices), num_real, padded, critical)


def _fill(lengths_B: Ints, num_slices: int, cap: int) -> list[int]:
    """Greedy bounds of `num_slices` contiguous slices of padded cost at most `cap`; the last bound tells how far it came."""
    bounds = [0]
    for _ in range(num_slices):
        begin = bounds[-1]
        rows = cap // int(lengths_B[begin]) if begin < len(lengths_B) else 0
        bounds.append(min(begin + rows, len(lengths_B)))
    return bounds


def _smallest_cap(lengths_B: Ints, num_slices: int) -> int:
    """The smallest padded cost that lets `num_slices` contiguous slices hold every row (binary search)."""
    if not len(lengths_B):
        return 0
    low, high = int(lengths_B[0]), int(lengths_B[0]) * -(-len(lengths_B) // num_slices)
    while low < high:
        middle = (low + high) // 2
        if _fill(lengths_B, num_slices, middle)[-1] == len(lengths_B):
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Efficiency:
    """How much of the computed tokens is real, over the steps seen. `critical_path = padding x balance`."""

    padding: float
    """Real tokens / tokens computed over all ranks."""
    critical_path: float
    """Real tokens / (ranks x tokens of the slowest rank at each micro-batch)."""
    rank_balance: float
    """Mean padded share / largest padded share."""


def efficiency(shares: Sequence[tuple[int, int, int]], num_ranks: int) -> Efficiency:
    """From one `(num_real_tokens, num_padded_tokens, critical_tokens)` per step; 1.0 each when there is no step."""
    real, padded, critical = (sum(column) for column in zip(*shares, strict=True)) if shares else (1, 1, 1)
    slowest = critical * num_ranks if shares else 1
    return Efficiency(real / padded, real / slowest, padded / slowest)


def plan_evaluation(lengths_N: Ints, *, max_tokens: int) -> list[Ints]:
    """Fixed micro-batches for scoring: longest first, at most `max_tokens` padded tokens each (one row at the least).

    They depend on the lengths alone, and micro-batch i belongs to rank `i % num_ranks`, so every example is computed in the
    same matrix products on any number of ranks.
    """
    order_N = np.argsort(-lengths_N, kind="stable").astype(np.int64)
    batches: list[Ints] = []
    begin = 0
    while begin < len(order_N):
        rows = max(1, max_tokens // int(lengths_N[order_N[begin]]))
        batches.append(order_N[begin : begin + rows])
        begin += rows
    return batches
