"""The share of each rank in a global batch, balanced so that no rank waits for another. Pure numpy.

A step is as slow as its slowest rank. The rows of a batch are sorted by length. Each rank computes contiguous slices of them,
with unequal numbers of rows and nearly equal padded cost.

For any cost that grows with the number of rows and with the longest row, no other split has a cheaper largest slice. Proof:
take any split and order its groups by their longest rows. Refill the groups, keeping their sizes, with the sorted rows. No
group's longest row becomes longer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.batching.settings import check_integers
from agnews_dist.data.rows import Ints
from agnews_dist.errors import UserError

_NO_CAP = 1 << 62
_COST_UNITS = 16
"""Cost units per token. Costs are integers, so that all ranks and machines find the same split."""


@dataclass(frozen=True)
class Share:
    """Split of one global batch into slices for micro-batches and ranks."""

    bounds_S: Ints
    """Row bounds: slice s is the rows `bounds_S[s]` to `bounds_S[s + 1]` of the batch, possibly none. S = M x R."""
    slice_MR: Ints
    """Slice that each rank computes in each micro-batch."""
    tokens_MR: Ints
    """Padded tokens per micro-batch and rank, filler rows included."""
    num_real_tokens: int

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank, equal on all ranks."""
        return self.tokens_MR.shape[0]

    @property
    def critical_tokens(self) -> int:
        """Padded tokens of the slowest rank."""
        return int(self.tokens_MR.sum(axis=0).max())

    def slices(self, rank: int) -> list[slice]:
        """Return the rows of the global batch that `rank` computes: one slice per micro-batch, possibly empty."""
        return [slice(int(self.bounds_S[i]), int(self.bounds_S[i + 1])) for i in self.slice_MR[:, rank]]


def quadratic_weight(hidden_dim: int) -> float:
    """Return the cost of attention per pair of tokens, relative to the other cost of a transformer block per token.

    For T tokens, a block of width d does 24 d^2 operations per token in its matrices and 4 T d in attention.
    The ratio is T / (6 d). Source: Kaplan et al. 2020, table 1, with d_attn = d and d_ff = 4 d.
    """
    return 1 / (6 * hidden_dim)


def share_batch(
    lengths_B: NDArray[Any],
    *,
    num_ranks: int,
    accumulation: int = 1,
    max_tokens_per_rank: int | None = None,
    quadratic: float = 0.0,
) -> Share:
    """Split one global batch among the ranks at nearly equal cost.

    Args:
        lengths_B: tokens per row, at least 1, longest first.
        num_ranks: ranks of the job; a rank without rows computes a filler row of one token.
        accumulation: minimum of micro-batches per rank.
        max_tokens_per_rank: maximum of padded tokens per micro-batch and rank; the number of micro-batches follows from it.
        quadratic: a row of T tokens costs T + quadratic x T^2 (see `quadratic_weight`); 0 counts tokens.

    Raises:
        UserError: the longest row exceeds `max_tokens_per_rank`; lengths are not integers, not sorted or below 1; an argument
            is out of range.
    """
    check_integers(lengths_B)
    if not 0 <= quadratic <= 1:
        raise UserError(f"quadratic {quadratic}: must be from 0 to 1. Set it to quadratic_weight(hidden_dim), or to 0.")
    if num_ranks < 1 or accumulation < 1:
        raise UserError(f"num_ranks {num_ranks}, accumulation {accumulation}: must be at least 1. Set both to 1 or more.")
    if len(lengths_B) and ((lengths_B[1:] > lengths_B[:-1]).any() or lengths_B[-1] < 1):
        raise UserError(
            f"lengths of {int(lengths_B.min())} to {int(lengths_B.max())} tokens are not sorted or below 1: costs would be "
            "wrong. Sort them longest first, and remove empty texts."
        )
    longest, num_real = int(lengths_B[0]) if len(lengths_B) else 0, int(lengths_B.sum(dtype=np.int64))
    limit = max_tokens_per_rank
    if limit is not None and (longest > limit or limit < 1):
        raise UserError(
            f"max_tokens_per_rank {limit} is below the longest text ({longest} tokens): that text fits into no "
            "micro-batch. Raise batch.max_tokens_per_rank, or lower data.max_length."
        )
    runs = _find_runs(lengths_B, quadratic, limit)
    num_micro = max(accumulation, -(-_count_slices(runs, _NO_CAP) // num_ranks))
    bounds_S = _cut_slices(runs, num_micro * num_ranks)
    rows_S = np.diff(bounds_S)
    longest_S = lengths_B[np.minimum(bounds_S[:-1], len(lengths_B) - 1)] if len(lengths_B) else np.zeros_like(rows_S)
    tokens_S = np.maximum(rows_S * longest_S.astype(np.int64), 1)
    slice_MR = np.arange(len(tokens_S)).reshape(num_micro, num_ranks)
    # A rank's total over all micro-batches counts: the rank with the largest slice of one gets the smallest of the next.
    snake_MR = np.argsort(-tokens_S, kind="stable").reshape(num_micro, num_ranks)
    snake_MR[1::2] = snake_MR[1::2, ::-1]
    slice_MR = min(slice_MR, snake_MR, key=lambda order_MR: int(tokens_S[order_MR].sum(axis=0).max()))
    return Share(bounds_S, slice_MR, tokens_S[slice_MR], num_real)


def share_by_owner(
    lengths_B: Ints, owner_B: Ints, *, num_ranks: int, max_tokens_per_rank: int, quadratic: float = 0.0
) -> tuple[Ints, Share]:
    """Split one global batch (`lengths_B`, longest first) so that each rank computes the rows it owns, at any imbalance.

    Returns (order_B, share). The share's slices are rows of the batch in that order. Arguments and errors: see `share_batch`.
    """
    order_B = np.argsort(owner_B, kind="stable")
    begins = np.searchsorted(owner_B[order_B], np.arange(num_ranks + 1))
    rows_R = np.split(order_B, begins[1:-1])

    def split(num_micro: int) -> list[Share]:
        options: dict[str, Any] = {"max_tokens_per_rank": max_tokens_per_rank, "quadratic": quadratic}
        return [share_batch(lengths_B[rows], num_ranks=1, accumulation=num_micro, **options) for rows in rows_R]

    num_micro = max(each.num_micro_batches for each in split(1))
    shares = split(num_micro)
    bounds = [begin + each.bounds_S[:-1] for begin, each in zip(begins[:-1], shares, strict=True)]
    slice_MR = np.stack([rank * num_micro + each.slice_MR[:, 0] for rank, each in enumerate(shares)], axis=1)
    tokens_MR = np.concatenate([each.tokens_MR for each in shares], axis=1)
    num_real = sum(each.num_real_tokens for each in shares)
    return order_B, Share(np.concatenate([*bounds, begins[-1:]]), slice_MR, tokens_MR, num_real)


class _Run(NamedTuple):
    """Consecutive rows of equal length. A global batch has few runs, so splitting it is cheap."""

    end: int
    """Row after the last one."""
    cost: int
    """Cost of one row."""
    max_rows: int
    """Maximum of rows per slice under the token limit. A cap on a quadratic cost does not imply it: short rows have more tokens
    than one long row of the same cost."""

    def count_rows(self, cap: int) -> int:
        """Count the rows that a slice which begins in this run may take."""
        return min(cap // self.cost, self.max_rows)


def _find_runs(lengths_B: NDArray[Any], quadratic: float, limit: int | None) -> list[_Run]:
    if not len(lengths_B):
        return []
    ends = np.append(np.flatnonzero(np.diff(lengths_B)) + 1, len(lengths_B))
    lengths = lengths_B[ends - 1].astype(np.int64)
    costs = np.rint(_COST_UNITS * (lengths + quadratic * lengths.astype(np.float64) ** 2)).astype(np.int64)
    max_rows = (_NO_CAP if limit is None else limit) // lengths
    return [_Run(*each) for each in zip(ends.tolist(), costs.tolist(), max_rows.tolist(), strict=True)]


def _fill_slices(runs: list[_Run], cap: int) -> Iterator[range]:
    """Fill slices up to `cap` and yield the ends of those that begin in the same run. The last end may exceed the rows."""
    begin = 0
    for run in runs:
        if begin < run.end:
            rows = run.count_rows(cap)
            ends = range(begin + rows, run.end + rows, rows)
            begin = ends[-1]
            yield ends


def _count_slices(runs: list[_Run], cap: int) -> int:
    """Count the slices that hold all rows when each is filled up to `cap`."""
    return sum(map(len, _fill_slices(runs, cap)))


def _cut_slices(runs: list[_Run], num_slices: int) -> Ints:
    """Cut the rows into contiguous slices with the smallest possible largest cost and return their bounds.

    Slices that are not needed are empty, at the end.
    """
    bounds = [0, *chain.from_iterable(_fill_slices(runs, _find_smallest_cap(runs, num_slices)))]
    num_rows = runs[-1].end if runs else 0
    padded = bounds + [num_rows] * (num_slices + 1 - len(bounds))
    return np.minimum(np.array(padded, dtype=np.int64), num_rows)


def _find_smallest_cap(runs: list[_Run], num_slices: int) -> int:
    """Find the smallest cost per slice with which `num_slices` slices hold all rows, by binary search."""
    if not runs:
        return 0
    begins = [0, *(run.end for run in runs)]
    total = sum((run.end - begin) * run.cost for begin, run in zip(begins, runs, strict=False))
    low = max(runs[0].cost, -(-total // num_slices))
    high = max(low, runs[0].cost * -(-runs[-1].end // num_slices))
    while _count_slices(runs, high) > num_slices:  # equal slices may exceed the token limit
        high *= 2
    while low < high:
        middle = (low + high) // 2
        if _count_slices(runs, middle) <= num_slices:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Efficiency:
    """Ratios of real to computed tokens over some steps. `critical_path` = `padding` x `rank_balance`."""

    padding: float
    """Real tokens / padded tokens."""
    critical_path: float
    """Real tokens / (ranks x tokens of the slowest rank at each step)."""
    rank_balance: float
    """Padded tokens / (ranks x tokens of the slowest rank at each step)."""


@dataclass
class Tally:
    """Token totals of the steps so far."""

    real: int = 0
    padded: int = 0
    """Tokens computed on all ranks, padding and filler rows included."""
    slowest: int = 0
    """Sum over the steps of ranks x tokens of the slowest rank."""

    def add(self, share: Share) -> None:
        self.real += share.num_real_tokens
        self.padded += int(share.tokens_MR.sum())
        self.slowest += share.critical_tokens * share.tokens_MR.shape[1]

    @property
    def efficiency(self) -> Efficiency:
        """Ratios of these totals; 1.0 without any step."""
        if not self.slowest:
            return Efficiency(1.0, 1.0, 1.0)
        return Efficiency(self.real / self.padded, self.real / self.slowest, self.padded / self.slowest)


def measure_efficiency(shares: Iterable[Share]) -> Efficiency:
    """Measure the efficiency over the steps of `shares`."""
    tally = Tally()
    for share in shares:
        tally.add(share)
    return tally.efficiency


def plan_evaluation(lengths_N: NDArray[Any], *, max_tokens: int) -> list[Ints]:
    """Plan micro-batches for scoring: longest first, at most `max_tokens` padded tokens each, at least one row.

    They depend on the lengths alone, and rank `i % num_ranks` computes micro-batch i. Every example is therefore in the same
    matrix products on any number of ranks.
    """
    order_N = np.argsort(-lengths_N.astype(np.int64), kind="stable")
    batches: list[Ints] = []
    begin = 0
    while begin < len(order_N):
        rows = max(1, max_tokens // int(lengths_N[order_N[begin]]))
        batches.append(order_N[begin : begin + rows])
        begin += rows
    return batches
