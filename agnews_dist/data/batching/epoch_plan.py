"""The plan: which examples form each global batch of an epoch. Pure numpy; sharing.py says which rank computes what.

An epoch is a function of the lengths, `PlanSettings` and the epoch's number alone: ranks, micro-batches, workers and restarts
never change what is in global batch k. Every example comes exactly once.

How an epoch is made: the examples are shuffled; the shuffled order is cut into windows of about `bucket_window` global batches;
each window, a random sample of the epoch, is sorted by length, cut into global batches, and these are shuffled. Windows depend
on nothing before them, so any step can be reached at once, and only one window is ever held. (With a token budget the number of
a window's batches is known only when it was planned, so there the first step looks at all lengths once.)

Beyond some 100 million lengths, set `block_size`: blocks of neighbouring examples are shuffled instead of single ones, and then
the examples inside each window. Memory no longer grows with the number of examples (but for 8 bytes per block), and lengths are
read block by block. A window must hold several blocks, or neighbours in the file would stay together in a batch.
"""

import bisect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.settings import Lengths, PlanSettings, as_lengths, check_whole, chunks
from agnews_dist.errors import UserError

Ints = NDArray[np.int64]
_CHUNK = 1 << 20
"""Examples looked at together when all have to be."""
_BLOCKS_PER_WINDOW = 4


def plan(lengths: Lengths, settings: PlanSettings, *, epoch: int, max_length: int | None = None) -> "Plan":
    """The epoch's global batches; epochs count from 0. `max_length`: what the model can take, if it is to be checked.

    Raises:
        UserError: lengths that are not one whole number each, or below 1, or above `max_length`; windows of too few blocks;
            when the first step is asked for, a token budget below the longest text. Lengths behind a `block_size` above 1
            are checked when their window is planned.
    """
    if epoch < 0:
        raise UserError(f"epoch {epoch}: there is no plan for it. Count epochs from 0.")
    return Plan(as_lengths(lengths), settings, epoch, max_length)


class Plan:
    """The global batches of one epoch, made window by window as they are asked for."""

    def __init__(self, lengths: Lengths, settings: PlanSettings, epoch: int, max_length: int | None) -> None:
        self._lengths, self._settings, self._epoch, self._max_length = lengths, settings, epoch, max_length
        self._last: tuple[int, list[Ints]] = (-1, [])
        self.num_examples = len(lengths)
        self._block_size = min(settings.block_size, max(1, self.num_examples))
        if settings.block_size == 1:
            for begin, chunk in chunks(lengths):
                self._check(chunk, begin)
        elif settings.global_token_budget is None:
            self._check_blocks(len(self._first_step_W) - 1)

    @property
    def num_steps(self) -> int:
        """Global batches of the epoch. With a token budget it is known after planning every window once."""
        return int(self._first_step_W[-1])

    def global_batch(self, step: int) -> Ints:
        """Ids of the examples of one global batch, longest first. Of a fixed size, no other window's lengths are looked at."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps}")
        window = int(np.searchsorted(self._first_step_W, step, side="right")) - 1
        if self._last[0] != window:
            self._last = (window, self._window(window))
        return self._last[1][step - int(self._first_step_W[window])]

    def global_batches(self, start: int = 0) -> Iterator[Ints]:
        """All global batches from step `start` on."""
        return (self.global_batch(step) for step in range(start, self.num_steps))

    @cached_property
    def _first_step_W(self) -> Ints:
        """First step of every window, and the number of steps: shape (windows + 1,)."""
        size, reach = self._settings.global_batch_size, self._settings.bucket_window
        if self._settings.global_token_budget is not None:
            counts = [len(self._window(window)) for window in range(len(self._begin_W) - 1)]
            return np.cumsum([0, *counts], dtype=np.int64)
        num_steps = -(-self.num_examples // size)
        num_windows = 1 if reach == "epoch" else max(1, round(num_steps / reach))
        # Windows of equal size, rather than full ones and a rest that would be nearly random batches.
        return np.arange(num_windows + 1, dtype=np.int64) * num_steps // num_windows

    @cached_property
    def _begin_W(self) -> Ints:
        """Where every window begins in the shuffled order, and the number of examples: shape (windows + 1,)."""
        budget, reach = self._settings.global_token_budget, self._settings.bucket_window
        if budget is None:
            # One batch is smaller, in a random window: all windows behind it begin so much earlier.
            size, num_windows = self._settings.global_batch_size, len(self._first_step_W) - 1
            short_window = _bits(self._settings.seed, self._epoch).random_raw() % num_windows
            missing_W = (np.arange(num_windows + 1) > short_window) * (self.num_steps * size - self.num_examples)
            return self._first_step_W * size - missing_W
        num_tokens = longest = 0
        for _, chunk in chunks(self._lengths):
            num_tokens, longest = num_tokens + int(chunk.sum(dtype=np.int64)), max(longest, int(chunk.max()))
        if longest > budget:
            raise UserError(
                f"global_token_budget {budget} is below the longest text ({longest} tokens): that text fits into no batch. "
                "Raise the budget, or truncate the texts (data.max_length)."
            )
        span = num_tokens + 1
        if reach != "epoch":
            # So much less than `reach` budgets that it can be cut into `reach` batches: the window's last text may stick out,
            # and rounding (see `_fill`) leaves a thirty-second of the budgets unused.
            span = max(1, reach * budget * 31 // 32 - longest, reach * budget // 2)
        num_windows = max(1, -(-num_tokens // span))
        self._check_blocks(num_windows)
        targets = np.arange(1, num_windows) * num_tokens // num_windows
        bounds, seen = [np.zeros(1, np.int64)], 0
        for begin in range(0, self.num_examples, _CHUNK):
            end = min(begin + _CHUNK, self.num_examples)
            sums = seen + np.cumsum(self._lengths[self._shuffled(begin, end)], dtype=np.int64)
            first, last = np.searchsorted(targets, (seen, int(sums[-1])), side="left")
            bounds.append(begin + np.searchsorted(sums, targets[first:last], side="right"))
            seen = int(sums[-1])
        return np.concatenate([*bounds, [self.num_examples]]).astype(np.int64)

    @cached_property
    def _block_order(self) -> Ints:
        """Blocks in shuffled order; the last, shorter one keeps its place at the end, `_shift` moves its content about."""
        num_full, rest = divmod(self.num_examples, self._block_size)
        order = shuffle(num_full, _bits(self._settings.seed, self._epoch))
        return np.append(order, num_full) if rest else order

    @cached_property
    def _shift(self) -> int:
        """By how many examples the blocks' borders are displaced in this epoch."""
        return int(_bits(self._settings.seed, self._epoch).random_raw() % max(1, self.num_examples))

    def _shuffled(self, begin: int, end: int) -> Ints:
        """Ids at the places `begin` to `end` of the shuffled order."""
        size = self._block_size
        if self._settings.block_size == 1:
            return self._block_order[begin:end]
        first, last = begin // size, -(-end // size)
        places = self._block_order[first:last, None] * size + np.arange(size)
        ids = places.reshape(-1)[begin - first * size : end - first * size] + self._shift
        return np.where(ids < self.num_examples, ids, ids - self.num_examples)

    def _window(self, window: int) -> list[Ints]:
        """The global batches of one window, in the order of their steps."""
        bits = _bits(self._settings.seed, self._epoch, window)
        ids = self._shuffled(int(self._begin_W[window]), int(self._begin_W[window + 1]))
        lengths_N = np.asarray(self._lengths[ids])
        if self._settings.block_size > 1:
            self._check(lengths_N, ids)
            mixed = shuffle(len(ids), bits)
            ids, lengths_N = ids[mixed], lengths_N[mixed]
        longest_first = _descending(lengths_N)
        ids, lengths_N = ids[longest_first], lengths_N[longest_first]
        if self._settings.global_token_budget is None:
            bounds = _cut_by_examples(len(ids), self._settings.global_batch_size, bits)
        else:
            bounds = _cut_by_tokens(lengths_N, self._settings.global_token_budget)
        return [ids[bounds[i] : bounds[i + 1]] for i in shuffle(len(bounds) - 1, bits)]

    def _check_blocks(self, num_windows: int) -> None:
        if (
            self._settings.block_size > 1
            and num_windows > 1
            and self.num_examples < num_windows * _BLOCKS_PER_WINDOW * self._block_size
        ):
            raise UserError(
                f"block_size {self._settings.block_size}, and {self.num_examples // num_windows} examples in a window: batches "
                "would be made of neighbours in the file, often of one class. Lower block_size, or raise bucket_window."
            )

    def _check(self, lengths_N: NDArray[Any], ids: Ints | int) -> None:
        """`ids`: which examples these are, or the first of a run."""
        check_whole(lengths_N)
        limit = self._max_length
        if not len(lengths_N) or (lengths_N.min() >= 1 and (limit is None or lengths_N.max() <= limit)):
            return
        is_bad = (lengths_N < 1) | (lengths_N > (limit if limit is not None else lengths_N.max()))
        row = int(np.flatnonzero(is_bad)[0])
        example = ids + row if isinstance(ids, int) else int(ids[row])
        tokens = int(lengths_N[row])
        if tokens < 1:
            raise UserError(
                f"example {example} has {tokens} tokens: an example without a token has no last token to classify from. "
                "Remove the row or rebuild the token cache."
            )
        raise UserError(
            f"example {example} has {tokens} tokens, more than the maximum of {limit}: the model has no position for the "
            "rest. Truncate it, or raise the maximum if the model allows."
        )


def _bits(seed: int, *key: int) -> np.random.PCG64:
    """An independent stream of random bits per key. Of numpy's generators only these streams never change between versions."""
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key))


def shuffle(count: int, bits: np.random.PCG64) -> Ints:
    """A random permutation of 0 .. count - 1, of shape (count,).

    Random keys are sorted. Each carries its index in its low bits, so no two are equal and every sorting algorithm, on every
    machine, gives the same order.
    """
    index_bits = np.uint64(max(1, count - 1).bit_length())
    keys = bits.random_raw(count)
    keys >>= index_bits
    keys <<= index_bits
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << index_bits) - np.uint64(1)
    return keys.view(np.int64)


def _descending(lengths_N: NDArray[Any]) -> Ints:
    """Stable order by falling length: equal lengths stay shuffled. Two bytes are enough for most lengths, and sort fastest."""
    longest = int(lengths_N.max()) if len(lengths_N) else 0
    kind = np.uint16 if longest < 1 << 16 else np.int64
    return np.argsort((longest - lengths_N).astype(kind), kind="stable")


def _cut_by_examples(count: int, size: int, bits: np.random.PCG64) -> Ints:
    """Bounds of batches of `size`; a smaller one, if any, takes a random place, lest it always hold the extreme lengths."""
    num_full, remainder = divmod(count, size)
    sizes = np.full(num_full + (remainder > 0), size)
    if remainder:
        sizes[bits.random_raw() % len(sizes)] = remainder
    return np.cumsum([0, *sizes], dtype=np.int64)


def _cut_by_tokens(lengths_N: NDArray[Any], budget: int) -> Ints:
    """Bounds of as few batches as `_fill` needs, of as equal numbers of tokens as these can have: every batch is one update,
    so a small rest would weigh as much as a full one."""
    if not len(lengths_N):
        return np.zeros(1, np.int64)
    sums = np.cumsum(lengths_N, dtype=np.int64).tolist()
    bounds = _fill(sums, budget)
    low, high = max(int(lengths_N[0]), -(-sums[-1] // (len(bounds) - 1))), budget
    while low < high:
        middle = (low + high) // 2
        tried = _fill(sums, middle)
        if len(tried) <= len(bounds):
            bounds, high = tried, middle
        else:
            low = middle + 1
    return np.array(bounds, dtype=np.int64)


def _fill(sums: list[int], cap: int) -> list[int]:
    """Bounds of batches that each take what fits below `cap`; `sums` are the running sums of the lengths.

    The number of examples is rounded down to a multiple of a power of two, at most a sixteenth of it, so that most numbers of
    ranks divide it: on 8 ranks that costs 2 % more batches and spares 1.2 % of the time (measured at 256 examples a batch).
    """
    bounds = [0]
    while bounds[-1] < len(sums):
        begin = bounds[-1]
        end = bisect.bisect_right(sums, (sums[begin - 1] if begin else 0) + cap)
        if end < len(sums):
            end -= (end - begin) % (1 << max(0, (end - begin).bit_length() - 5))
        bounds.append(end)
    return bounds
