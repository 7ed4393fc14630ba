"""Computation of one split's features, segment by segment, into memory or into a file that processes share."""

import threading
from collections.abc import Callable, Set
from functools import partial

import torch
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.events import Emit, Progress
from agnews_dist.features.layout import Layout
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.prefix import Prefix


class SplitFeatures:
    """The frozen part's output for one split, in the order of a layout."""

    def __init__(self, prefix: Prefix, table: TokenTable, layout: Layout) -> None:
        self._prefix, self._table, self.layout = prefix, table, layout
        self.name = table.name
        self.width, self.dtype = prefix.wte.embedding_dim, prefix.wte.weight.dtype
        self.num_tokens = sum(map(self.segment_tokens, range(layout.num_segments)))
        self.num_bytes = layout.num_rows * prefix.row_bytes

    def compute_segment(self, segment: int) -> Tensor:
        """Compute the rows of one segment, on the prefix's device."""
        return torch.cat([self._prefix.rows(*self._table.pack(ids)) for ids in self.layout.calls(segment)])

    def read_or_compute(self, file: FeatureFile | None, segment: int) -> Tensor:
        """Read the rows of a segment from an earlier run's file; compute them if they are missing or damaged there."""
        rows = file.read_segment(segment) if file is not None else None
        return self.compute_segment(segment) if rows is None else rows

    def segment_tokens(self, segment: int) -> int:
        """Count the tokens of a segment's texts."""
        return sum(int(self._table.lengths_N[ids].sum()) for ids in self.layout.calls(segment))

    def prepare_in_memory(
        self, device: torch.device, get_rows: Callable[[int], Tensor], on_segment: Callable[[int], None]
    ) -> tuple[Tensor, list[Callable[[], None]]]:
        """Allocate all rows on `device`, and return them with one task per segment that fills them by `get_rows`."""
        rows = torch.empty(self.layout.num_rows, self.width, dtype=self.dtype, device=device)
        bounds_S = self.layout.bounds_S

        def fill(segment: int) -> None:
            rows[bounds_S[segment] : bounds_S[segment + 1]] = get_rows(segment)
            on_segment(segment)

        return rows, [partial(fill, segment) for segment in range(self.layout.num_segments)]


class FeatureProgress:
    """Progress over all splits, in tokens. Any thread may report a segment."""

    def __init__(self, emit: Emit, *, num_tokens: int, num_cached: int) -> None:
        """`num_cached`: tokens whose features existed at the start; they do not count towards the rate."""
        self._emit, self._total, self._done = emit, num_tokens, num_cached
        self._lock = threading.Lock()
        self._add(0)

    def add_segment(self, split: SplitFeatures, cached: Set[int], segment: int) -> None:
        """Count a segment, unless it is one of those that existed at the start."""
        if segment not in cached:
            self._add(split.segment_tokens(segment))

    def _add(self, num_tokens: int) -> None:
        with self._lock:
            self._done += num_tokens
            self._emit(Progress(task="frozen part", done=self._done, total=self._total, unit="tokens"))
