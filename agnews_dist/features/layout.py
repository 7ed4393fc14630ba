"""Order of a split's features, and the pieces in which they are computed: a pure function of the lengths.

Texts form calls: one call is one run of the packed prefix. Calls form segments: one segment is stored, checked and assigned to
a process as a whole. Neither depends on the training order, the number of ranks or restarts. So a text's features are the same
to the last bit on every process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agnews_dist.data.rows import Ints
from agnews_dist.model.packed import cut_by_size

SEGMENT_BYTES = 64 << 20
"""Largest segment, unless a single call is larger. A killed process loses at most one segment per thread."""
NUM_SEGMENTS = 256
"""Approximate number of segments of a small split: enough work for many ranks."""


@dataclass(frozen=True)
class Layout:
    """Rows of features, end to end in the order in which they are computed."""

    texts: tuple[Ints, ...]
    """Ids of the texts of each call."""
    begin_N: Ints
    """First row of text i; -1 if the layout does not contain it."""
    rows_N: Ints
    """Number of rows of text i: its number of tokens, or 1."""
    calls_S: Ints
    """Segment s is the calls `calls_S[s]` to `calls_S[s + 1]`: shape (S + 1,)."""
    bounds_S: Ints
    """Segment s is the rows `bounds_S[s]` to `bounds_S[s + 1]`: shape (S + 1,)."""

    @property
    def num_rows(self) -> int:
        return int(self.bounds_S[-1])

    @property
    def num_segments(self) -> int:
        return len(self.bounds_S) - 1

    def calls(self, segment: int) -> tuple[Ints, ...]:
        """Return the ids of the texts of each call of a segment."""
        return self.texts[self.calls_S[segment] : self.calls_S[segment + 1]]


def order_longest_first(lengths_N: Ints) -> Ints:
    """Return all ids, longest text first; texts of equal length in file order."""
    return np.argsort(-lengths_N.astype(np.int64), kind="stable")


def lay_out(
    lengths_N: Ints, groups: Sequence[Ints], *, call_tokens: int, row_bytes: int, one_row_per_text: bool = False
) -> Layout:
    """Cut texts into calls of at most `call_tokens` tokens and calls into segments; no call contains texts of two groups.

    `groups`: disjoint ids, each group in order of length. The training split is one group, longest text first. The groups of an
    evaluated split are its evaluation micro-batches. Then the calls, and with them the last bits of the scores, are the same
    with and without a cache.
    """
    texts = tuple(ids[begin:end] for ids in groups for begin, end in cut_by_size(lengths_N[ids], call_tokens))
    rows_N = np.ones_like(lengths_N) if one_row_per_text else lengths_N.astype(np.int64)
    order = np.concatenate([np.empty(0, np.int64), *texts])
    begin_N = np.full(len(lengths_N), -1, np.int64)
    ends = np.cumsum(rows_N[order])
    begin_N[order] = ends - rows_N[order]
    rows_of_calls = np.array([rows_N[ids].sum() for ids in texts], np.int64)
    limit = max(1, min(SEGMENT_BYTES // row_bytes, -(-int(rows_of_calls.sum()) // NUM_SEGMENTS)))
    calls_S = np.array([0, *(end for _, end in cut_by_size(rows_of_calls, limit))], np.int64)
    return Layout(texts, begin_N, rows_N, calls_S, np.concatenate([[0], rows_of_calls.cumsum()])[calls_S])


def assign_owners(lengths_N: Ints, num_ranks: int) -> Ints:
    """Assign texts to ranks in turn, longest first: the rank of each text when features are sharded over device memories.

    Every rank gets its share of every length, so its shares of the global batches are balanced too.
    """
    owner_N = np.empty(len(lengths_N), np.int64)
    owner_N[order_longest_first(lengths_N)] = np.arange(len(lengths_N)) % num_ranks
    return owner_N
