"""The share: how the ranks split one global batch, in how many micro-batches, so that none waits for another. Pure numpy.

A step is as slow as its slowest rank. Each rank takes contiguous slices of the batch's rows, sorted by length: unequal numbers
of rows, equal padded cost. For a cost that grows with the number of rows and with the longest of them, no other split has a
cheaper largest slice, contiguous or not: deal the sorted rows out anew to the groups of any split, in the order of their
longest rows and keeping their sizes, and no group's longest row gets longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.epoch_plan import Ints
from agnews_dist.data.batching.settings import check_whole
from agnews_dist.errors import UserError

_NO_CAP = 1 << 62
_COST_UNITS = 16
"""Costs are whole sixteenths of a token, so that all ranks and machines find the same split."""


@dataclass(frozen=True)
class Share:
    """One global batch dealt out."""

    bounds_S: Ints
    """Slice s is the rows `bounds_S[s]` to `bounds_S[s + 1]` of the batch, maybe none; one for every micro-batch and rank."""
    slice_MR: Ints
    """Which slice a rank computes in a micro-batch: shape (micro-batches, ranks)."""
    tokens_MR: Ints
    """Padded tokens computed per micro-batch and rank, filler rows included: shape (micro-batches, ranks)."""
    num_real_tokens: int

    @property
    def num_micro_batches(self) -> int:
        """The same on every rank."""
        return self.tokens_MR.shape[0]

    @property
    def num_padded_tokens(self) -> int:
        """Over all ranks."""
        return int(self.tokens_MR.sum())

    @property
    def critical_tokens(self) -> int:
        """Of the rank with the most: what the step waits for."""
        return int(self.tokens_MR.sum(axis=0).max())

    def slices(self, rank: int) -> list[slice]:
        """Rows of the global batch that `rank` computes, one slice per micro-batch, empty where it has nothing to do."""
        mine = self.slice_MR[:, rank]
        return [slice(int(self.bounds_S[i]), int(self.bounds_S[i + 1])) for i in mine]


def quadratic_weight(hidden_dim: int) -> float:
    """Cost of a token's attention per token it looks at, in units of the rest of a transformer block's cost.

    Per token of a text of T tokens a block of width d needs 24 d^2 floating-point operations in its matrices and 4 T d in its
    attention: a ratio of T / (6 d). (Kaplan et al. 2020, table 1, with d_attn = d and d_ff = 4 d.)
    """
    return 1 / (6 * hidden_dim)


def share(
    lengths_B: NDArray[Any],
    *,
    num_ranks: int,
    accumulation: int = 1,
    max_tokens_per_rank: int | None = None,
    quadratic: float = 0.0,
) -> Share:
    """Deal one global batch (`lengths_B`, longest first) to the ranks.

    Args:
        lengths_B: tokens per row, at least 1, falling.
        num_ranks: ranks that take part; those without rows compute a filler row of one token.
        accumulation: the least number of micro-batches per rank.
        max_tokens_per_rank: padded tokens a rank may compute at once; more micro-batches are made until that holds.
        quadratic: a row of T tokens costs T + quadratic x T^2 (see `quadratic_weight`); 0 counts tokens.

    Raises:
        UserError: the longest row exceeds `max_tokens_per_rank`; lengths that are no whole numbers, do not fall or are below
            1; no rank or no micro-batch; a weight that is none.
    """
    check_whole(lengths_B)
    if not 0 <= quadratic <= 1:
        raise UserError(
            f"quadratic {quadratic}: it weighs a token's look at another against all else done for it, a small fraction. Take "
            "it from quadratic_weight(hidden_dim), or 0."
        )
    if num_ranks < 1 or accumulation < 1:
        raise UserError(
            f"num_ranks {num_ranks}, accumulation {accumulation}: nobody would compute the batch. Set both to 1 or more."
        )
    if len(lengths_B) and ((lengths_B[1:] > lengths_B[:-1]).any() or lengths_B[-1] < 1):
        raise UserError(
            f"lengths of {int(lengths_B.min())} to {int(lengths_B.max())} tokens that do not fall or are below 1: slices would "
            "be taken for cheaper than they are. Sort them, longest first, and leave out empty texts."
        )
    longest, num_real = int(lengths_B[0]) if len(lengths_B) else 0, int(lengths_B.sum(dtype=np.int64))
    limit = max_tokens_per_rank
    if limit is not None and (longest > limit or limit < 1):
        raise UserError(
            f"max_tokens_per_rank {limit} is below the longest text ({longest} tokens): it fits into no micro-batch. Raise it "
            "(batch.max_tokens_per_rank), or truncate the texts (data.max_length)."
        )
    runs = _runs(lengths_B, quadratic, limit)
    num_micro = max(accumulation, -(-_num_slices(runs, _NO_CAP) // num_ranks))
    bounds_S = _bounds(runs, num_micro * num_ranks)
    rows_S = np.diff(bounds_S)
    longest_S = lengths_B[np.minimum(bounds_S[:-1], len(lengths_B) - 1)] if len(lengths_B) else np.zeros_like(rows_S)
    tokens_S = np.maximum(rows_S * longest_S.astype(np.int64), 1)
    slice_MR = np.arange(len(tokens_S)).reshape(num_micro, num_ranks)
    # What a rank computes in all its micro-batches counts: whoever got the most in one gets the least in the next.
    turning_MR = np.argsort(-tokens_S, kind="stable").reshape(num_micro, num_ranks)
    turning_MR[1::2] = turning_MR[1::2, ::-1]
    slice_MR = min(slice_MR, turning_MR, key=lambda dealt_MR: int(tokens_S[dealt_MR].sum(axis=0).max()))
    return Share(bounds_S, slice_MR, tokens_S[slice_MR], num_real)


def share_by_owner(
    lengths_B: Ints, owner_B: Ints, *, num_ranks: int, max_tokens_per_rank: int, quadratic: float = 0.0
) -> tuple[Ints, Share]:
    """Deal one global batch (`lengths_B`, longest first) to the ranks that hold its rows, however unequal that is.

    Returns (order_B, share): the share's slices are rows of the batch in that order. See `share` for the arguments and errors.
    """
    order_B = np.argsort(owner_B, kind="stable")
    begins = np.searchsorted(owner_B[order_B], np.arange(num_ranks + 1))
    rows = np.split(order_B, begins[1:-1])

    def cut(num_micro: int) -> list[Share]:
        options: dict[str, Any] = {"max_tokens_per_rank": max_tokens_per_rank, "quadratic": quadratic}
        return [share(lengths_B[mine], num_ranks=1, accumulation=num_micro, **options) for mine in rows]

    num_micro = max(each.num_micro_batches for each in cut(1))
    shares = cut(num_micro)
    bounds = [begin + each.bounds_S[:-1] for begin, each in zip(begins[:-1], shares, strict=True)]
    slice_MR = np.stack([rank * num_micro + each.slice_MR[:, 0] for rank, each in enumerate(shares)], axis=1)
    tokens_MR = np.concatenate([each.tokens_MR for each in shares], axis=1)
    num_real = sum(each.num_real_tokens for each in shares)
    return order_B, Share(np.concatenate([*bounds, begins[-1:]]), slice_MR, tokens_MR, num_real)


class _Run(NamedTuple):
    """Rows of equal length; a global batch has few runs, so that splitting it costs little."""

    end: int
    """First row after it."""
    cost: int
    """Of one row."""
    most: int
    """Rows within the limit on tokens. With a quadratic cost no cap implies it: short rows that cost as much as one long row
    have more tokens."""

    def rows(self, cap: int) -> int:
        """How many rows a slice that begins in this run may take."""
        return min(cap // self.cost, self.most)


def _runs(lengths_B: NDArray[Any], quadratic: float, limit: int | None) -> list[_Run]:
    if not len(lengths_B):
        return []
    ends = np.append(np.flatnonzero(np.diff(lengths_B)) + 1, len(lengths_B))
    lengths = lengths_B[ends - 1].astype(np.int64)
    costs = np.rint(_COST_UNITS * (lengths + quadratic * lengths.astype(np.float64) ** 2)).astype(np.int64)
    most = (_NO_CAP if limit is None else limit) // lengths
    return [_Run(*each) for each in zip(ends.tolist(), costs.tolist(), most.tolist(), strict=True)]


def _num_slices(runs: list[_Run], cap: int) -> int:
    """How many slices, filled one after the other up to `cap`, hold all rows."""
    begin = used = 0
    for run in runs:
        if begin < run.end:
            rows = run.rows(cap)
            count = -(-(run.end - begin) // rows)
            begin, used = begin + count * rows, used + count
    return used


def _bounds(runs: list[_Run], num_slices: int) -> Ints:
    """Contiguous slices of the smallest possible largest cost (binary search); those left over are empty, at the end."""
    cap, begin, bounds = _smallest_cap(runs, num_slices), 0, [0]
    for run in runs:
        if begin < run.end:
            rows = run.rows(cap)
            count = -(-(run.end - begin) // rows)
            bounds.extend(range(begin + rows, begin + count * rows + 1, rows))
            begin += count * rows
    num_rows = runs[-1].end if runs else 0
    padded = bounds + [num_rows] * (num_slices + 1 - len(bounds))
    return np.minimum(np.array(padded, dtype=np.int64), num_rows)


def _smallest_cap(runs: list[_Run], num_slices: int) -> int:
    if not runs:
        return 0
    begins = [0, *(run.end for run in runs)]
    total = sum((run.end - begin) * run.cost for begin, run in zip(begins, runs, strict=False))
    low = max(runs[0].cost, -(-total // num_slices))
    high = max(low, runs[0].cost * -(-runs[-1].end // num_slices))
    while _num_slices(runs, high) > num_slices:  # equal slices may be against the limit on tokens
        high *= 2
    while low < high:
        middle = (low + high) // 2
        if _num_slices(runs, middle) <= num_slices:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Efficiency:
    """How much of the computed tokens is real, over the steps seen. `critical_path = padding x rank_balance`."""

    padding: float
    """Real tokens / tokens computed over all ranks."""
    critical_path: float
    """Real tokens / (ranks x tokens of the slowest rank at each step)."""
    rank_balance: float
    """Mean padded share / largest padded share."""


@dataclass
class Tally:
    """Tokens of the steps so far."""

    real: int = 0
    padded: int = 0
    """Computed over all ranks, padding and filler rows included."""
    slowest: int = 0
    """What would have been computed if every rank had done as much as the one with the most, at each step."""

    def add(self, dealt: Share) -> None:
        """Take in one step."""
        self.real += dealt.num_real_tokens
        self.padded += dealt.num_padded_tokens
        self.slowest += dealt.critical_tokens * dealt.tokens_MR.shape[1]

    @property
    def efficiency(self) -> Efficiency:
        """1.0 each when there was no step."""
        if not self.slowest:
            return Efficiency(1.0, 1.0, 1.0)
        return Efficiency(self.real / self.padded, self.real / self.slowest, self.padded / self.slowest)


def efficiency(shares: Iterable[Share]) -> Efficiency:
    """Over the steps of `shares`."""
    tally = Tally()
    for dealt in shares:
        tally.add(dealt)
    return tally.efficiency


def plan_evaluation(lengths_N: NDArray[Any], *, max_tokens: int) -> list[Ints]:
    """Fixed micro-batches for scoring: longest first, at most `max_tokens` padded tokens each (one row at the least).

    They depend on the lengths alone, and micro-batch i belongs to rank `i % num_ranks`, so every example is computed in the
    same matrix products on any number of ranks.
    """
    order_N = np.argsort(-lengths_N.astype(np.int64), kind="stable")
    batches: list[Ints] = []
    begin = 0
    while begin < len(order_N):
        rows = max(1, max_tokens // int(lengths_N[order_N[begin]]))
        batches.append(order_N[begin : begin + rows])
        begin += rows
    return batches
