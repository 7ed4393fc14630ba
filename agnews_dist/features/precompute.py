"""The features of one split, computed segment by segment: in this process's memory, or into a file that processes share."""

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.events import Emit, Progress
from agnews_dist.features.layout import Layout
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.prefix import Prefix


class SplitFeatures:
    """What the frozen part makes of a split, in the order of a layout."""

    def __init__(self, prefix: Prefix, table: TokenTable, layout: Layout) -> None:
        self._prefix, self._table, self.layout = prefix, table, layout
        self.name = table.name
        self.num_tokens = sum(int(table.lengths_N[ids].sum()) for ids in layout.texts)

    @property
    def width(self) -> int:
        """D."""
        return self._prefix.wte.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """That of the frozen weights."""
        return self._prefix.wte.weight.dtype

    @property
    def num_bytes(self) -> int:
        """Of all rows."""
        return self.layout.num_rows * self.width * self.dtype.itemsize

    def segment(self, number: int) -> Tensor:
        """The rows of one segment, on the prefix's device."""
        return torch.cat([self._prefix.rows(*self._table.pack(ids)) for ids in self.layout.calls(number)])

    def segment_tokens(self, number: int) -> int:
        """Tokens that go into it."""
        return sum(int(self._table.lengths_N[ids].sum()) for ids in self.layout.calls(number))

    def in_memory(
        self, device: torch.device, rows_of: Callable[[int], Tensor], done: Callable[[int], None]
    ) -> tuple[Tensor, list[Callable[[], None]]]:
        """Room for all rows on `device`, and the pieces of work that fill it, a segment each.

        `rows_of` gives a segment's rows, `done` hears of each segment.
        """
        rows = torch.empty(self.layout.num_rows, self.width, dtype=self.dtype, device=device)
        bounds_S = self.layout.bounds_S

        def fill(segment: int) -> None:
            rows[bounds_S[segment] : bounds_S[segment + 1]] = rows_of(segment)
            done(segment)

        return rows, [partial(fill, segment) for segment in range(self.layout.num_segments)]


class Meter:
    """Progress of the frozen part over all splits, in tokens; segments may end in any thread."""

    def __init__(self, emit: Emit, total: int, found: int) -> None:
        """`found`: tokens of what was there before, which is no part of the rate."""
        self._emit, self._total, self._done = emit, total, found
        self._lock = threading.Lock()
        self.add(0)

    def add(self, num_tokens: int) -> None:
        """So many more are there."""
        with self._lock:
            self._done += num_tokens
            self._emit(Progress(task="frozen part", done=self._done, total=self._total, unit="tokens"))


def read_or_compute(split: SplitFeatures, former: FeatureFile | None, segment: int) -> Tensor:
    """A segment's rows, from a file of a former run or try if they are whole there."""
    found = former.read(segment) if former is not None else None
    return split.segment(segment) if found is None else found


def count(split: SplitFeatures, found: frozenset[int], meter: Meter, segment: int) -> None:
    """Tell the meter of a segment that was not there before."""
    if segment not in found:
        meter.add(split.segment_tokens(segment))
