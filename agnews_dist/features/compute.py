"""The features of one split, computed segment by segment: in this process's memory, or into a file that processes share."""

import threading
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from agnews_dist.data.calls import Layout
from agnews_dist.data.loader import TokenTable
from agnews_dist.events import Emit, Progress
from agnews_dist.model.prefix import Prefix
from agnews_dist.model.side_by_side import side_by_side


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

    def in_memory(self, device: torch.device, rows_of: Callable[[int], Tensor], done: Callable[[int], None]) -> Tensor:
        """All rows on `device`; `rows_of` gives a segment's, `done` hears of each segment."""
        rows = torch.empty(self.layout.num_rows, self.width, dtype=self.dtype, device=device)
        bounds_S = self.layout.bounds_S

        def fill(segment: int) -> None:
            rows[bounds_S[segment] : bounds_S[segment + 1]] = rows_of(segment)
            done(segment)

        side_by_side([partial(fill, segment) for segment in range(self.layout.num_segments)], self.device)
        return rows

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._prefix.wte.weight.device


class Meter:
    """Progress of one split in tokens; segments may end in any thread."""

    def __init__(self, split: SplitFeatures, emit: Emit, found: Collection[int] = ()) -> None:
        """`found`: segments that were there before; they are no part of the rate."""
        self._split, self._emit, self._found = split, emit, found
        self._done = sum(map(split.segment_tokens, found))
        self._lock = threading.Lock()
        self._show()

    def add(self, segment: int) -> None:
        """One more segment is there."""
        if segment in self._found:
            return
        with self._lock:
            self._done += self._split.segment_tokens(segment)
            self._show()

    def _show(self) -> None:
        task, total = f"frozen part of {self._split.name}", self._split.num_tokens
        self._emit(Progress(task=task, done=self._done, total=total, unit="tokens"))
