"""Where the features of a split lie and in which pieces they are computed: a pure function of the lengths. Pure numpy.

The frozen part has an order of its own: texts sorted by length, whatever the training order is. Texts form calls (one run of
the packed prefix), calls form segments (what is stored, checked, and dealt to processes). Neither depends on the number of
ranks or on restarts, so a text's features are the same to the last bit whoever computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agnews_dist.data.batching.epoch_plan import Ints
from agnews_dist.model.packed import call_bounds

SEGMENT_BYTES = 64 << 20
"""A segment is no larger (one call at the least): what a killed builder loses."""
NUM_SEGMENTS = 256
"""Small splits are cut into about so many segments, so that many ranks find work."""


@dataclass(frozen=True)
class Layout:
    """Rows of features, end to end in the order in which they are computed."""

    texts: tuple[Ints, ...]
    """Ids of the texts of each call."""
    begin_N: Ints
    """First row of text i; -1 where the layout does not hold it."""
    rows_N: Ints
    """Number of rows of text i: its tokens, or 1."""
    calls_S: Ints
    """Segment s is the calls `calls_S[s]` to `calls_S[s + 1]`: shape (S + 1,)."""
    bounds_S: Ints
    """Segment s is the rows `bounds_S[s]` to `bounds_S[s + 1]`: shape (S + 1,)."""

    @property
    def num_rows(self) -> int:
        """Of all segments."""
        return int(self.bounds_S[-1])

    @property
    def num_segments(self) -> int:
        """At least 1, unless there is no text."""
        return len(self.bounds_S) - 1

    def calls(self, segment: int) -> tuple[Ints, ...]:
        """Ids of the texts of each call of a segment."""
        return self.texts[self.calls_S[segment] : self.calls_S[segment + 1]]


def longest_first(lengths_N: Ints) -> Ints:
    """All ids, longest text first; equally long ones in file order."""
    return np.argsort(-lengths_N.astype(np.int64), kind="stable")


def lay_out(
    lengths_N: Ints, groups: Sequence[Ints], *, call_tokens: int, row_bytes: int, one_row_per_text: bool = False
) -> Layout:
    """Calls of at most `call_tokens` tokens, none across the border of two `groups` of ids (disjoint, each in order of length).

    For training one group: all texts, longest first. For a split that is scored: the scoring micro-batches, so that a text's
    call, and with it the last bit of its result, is the same whether features are kept or not.
    """
    texts = tuple(ids[begin:end] for ids in groups for begin, end in call_bounds(lengths_N[ids], call_tokens))
    rows_N = np.ones_like(lengths_N) if one_row_per_text else lengths_N.astype(np.int64)
    order = np.concatenate([np.empty(0, np.int64), *texts])
    begin_N = np.full(len(lengths_N), -1, np.int64)
    ends = np.cumsum(rows_N[order])
    begin_N[order] = ends - rows_N[order]
    rows_of_calls = np.array([0, *(int(rows_N[ids].sum()) for ids in texts)], np.int64).cumsum()
    calls_S = [0]
    limit = max(1, min(SEGMENT_BYTES // row_bytes, -(-int(rows_of_calls[-1]) // NUM_SEGMENTS)))
    while calls_S[-1] < len(texts):
        begin = calls_S[-1]
        fitting = int(np.searchsorted(rows_of_calls, rows_of_calls[begin] + limit, side="right")) - 1
        calls_S.append(max(begin + 1, fitting))
    return Layout(texts, begin_N, rows_N, np.array(calls_S), rows_of_calls[calls_S])


def round_robin(lengths_N: Ints, num_ranks: int) -> Ints:
    """The rank that owns each text when memory is divided: every length spread evenly, so that global batches are too."""
    owner_N = np.empty(len(lengths_N), np.int64)
    owner_N[longest_first(lengths_N)] = np.arange(len(lengths_N)) % num_ranks
    return owner_N
