"""Order of texts in a file of features, and the calls that compute them: a pure function of the lengths.

Texts form calls: one call is one run of the packed prefix. Calls form segments: one segment is stored, checked and assigned to
a process as a whole. A text's features have the same bits in any call, so files of any layout have the same rows.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agnews_dist.data.rows import Ints
from agnews_dist.model.packed import cut_by_size

SEGMENT_BYTES = 64 << 20
"""Largest segment, unless a single call is larger. A killed process loses at most one segment per thread."""
NUM_SEGMENTS = 256
"""Approximate number of segments of a small file: enough work for many ranks."""


@dataclass(frozen=True)
class Layout:
    """Rows of features, end to end in the order of their texts."""

    order: Ints
    """Numbers of the texts, in order."""
    texts_S: Ints
    """Segment s is the texts `order[texts_S[s]]` to `order[texts_S[s + 1]]`: shape (S + 1,)."""
    bounds_S: Ints
    """Segment s is the rows `bounds_S[s]` to `bounds_S[s + 1]`: shape (S + 1,)."""

    @property
    def num_rows(self) -> int:
        return int(self.bounds_S[-1])

    @property
    def num_segments(self) -> int:
        return len(self.bounds_S) - 1

    def texts(self, segment: int) -> Ints:
        """Return the numbers of the texts of a segment."""
        return self.order[self.texts_S[segment] : self.texts_S[segment + 1]]


def order_longest_first(lengths_N: Ints) -> Ints:
    """Return all ids, longest text first; texts of equal length in file order."""
    return np.argsort(-lengths_N.astype(np.int64), kind="stable")


def pack_calls(lengths_N: Ints, call_tokens: int) -> list[Ints]:
    """Pack texts into calls of at most `call_tokens` tokens; a longer text is a call of its own. Returns the ids of each call.

    A call takes the longest text that is left and fits, again and again. So calls are nearly full, and texts of equal length
    are neighbours.

    >>> [ids.tolist() for ids in pack_calls(np.array([3, 9, 2, 5]), 8)]
    [[1], [3, 0], [2]]
    """
    order = order_longest_first(lengths_N)
    values, counts = np.unique(lengths_N[order], return_counts=True)
    lengths, left = values.tolist(), counts.tolist()
    # Ids of equal length are neighbours in `order`, and are taken from the first on.
    first = (len(order) - np.cumsum(counts)).tolist()
    calls: list[Ints] = []
    while lengths:
        room, taken, at = call_tokens, list[Ints](), len(lengths) - 1
        while at >= 0:
            num_texts = min(left[at], max(room // lengths[at], 0 if taken else 1))
            taken.append(order[first[at] : first[at] + num_texts])
            room -= num_texts * lengths[at]
            first[at] += num_texts
            left[at] -= num_texts
            if not left[at]:
                del lengths[at], left[at], first[at]
            at = bisect_right(lengths, room, hi=min(at, len(lengths))) - 1
        calls.append(np.concatenate(taken))
    return calls


def lay_out(
    lengths_U: Ints, rows_U: Ints, *, computed: Ints, copied: Sequence[Ints] = (), call_tokens: int, row_bytes: int
) -> Layout:
    """Lay out texts in segments: the `computed` ones by their calls, then each group of `copied` ones in its order.

    `rows_U`: rows of features of each text. No segment contains texts of two groups.
    """
    groups = [[computed[ids] for ids in pack_calls(lengths_U[computed], call_tokens)]]
    groups += [[ids[begin:end] for begin, end in cut_by_size(lengths_U[ids], call_tokens)] for ids in copied]
    total = sum(int(rows_U[ids].sum()) for ids in (computed, *copied))
    limit = max(1, min(SEGMENT_BYTES // row_bytes, -(-total // NUM_SEGMENTS)))
    segments = [
        np.concatenate(calls[begin:end])
        for calls in groups
        for begin, end in cut_by_size(np.array([rows_U[ids].sum() for ids in calls], np.int64), limit)
    ]
    texts_S = np.cumsum([0, *map(len, segments)], dtype=np.int64)
    bounds_S = np.cumsum([0, *(int(rows_U[ids].sum()) for ids in segments)], dtype=np.int64)
    return Layout(np.concatenate([np.empty(0, np.int64), *segments]), texts_S, bounds_S)


def assign_owners(lengths_N: Ints, num_ranks: int) -> Ints:
    """Assign texts to ranks in turn, longest first: the rank of each text when features are sharded over device memories.

    Every rank gets its share of every length, so its shares of the global batches are balanced too.
    """
    owner_N = np.empty(len(lengths_N), np.int64)
    owner_N[order_longest_first(lengths_N)] = np.arange(len(lengths_N)) % num_ranks
    return owner_N
