"""Computation of features, segment by segment, into memory or into a file that processes share."""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.rows import Ints
from agnews_dist.events import Emit, Progress
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.layout import Layout
from agnews_dist.features.piece_index import MISSING, Located
from agnews_dist.model.packed import cut_by_size
from agnews_dist.model.prefix import Prefix


class FeatureRows:
    """Rows of features of texts: computed by the frozen part, or copied from pieces that have them."""

    def __init__(self, prefix: Prefix, texts: DistinctTexts, located: Located, pieces: Sequence[Tensor]) -> None:
        """`pieces`: the rows of the pieces that `located` names; they are read if a layout has texts of them."""
        self._prefix, self.texts, self._located, self._pieces = prefix, texts, located, pieces
        self.width, self.dtype = prefix.wte.embedding_dim, prefix.wte.weight.dtype

    def of_segment(self, layout: Layout, segment: int) -> Tensor:
        """Return the rows of one segment of a layout: all computed, or all copied."""
        numbers = layout.texts(segment)
        return self.compute(numbers) if self._is_missing(numbers) else self._copy(numbers)

    def compute_segment(self, texts_of: Mapping[int, Ints], segment: int) -> Tensor:
        """Compute the rows of one of the segments `texts_of`."""
        return self.compute(texts_of[segment])

    def _is_missing(self, numbers: Ints) -> bool:
        return bool(self._located.piece_U[numbers[0]] == MISSING)

    def compute(self, numbers: Ints) -> Tensor:
        """Compute the rows of texts, end to end, on the prefix's device."""
        limit = self._prefix.call_tokens
        calls = [numbers[begin:end] for begin, end in cut_by_size(self.texts.lengths_U[numbers], limit)]
        return torch.cat([self._prefix.rows(*self.texts.pack(ids), min_rows=limit) for ids in calls])

    def _copy(self, numbers: Ints) -> Tensor:
        rows_B, begin_B = self.texts.rows_U[numbers], self._located.begin_U[numbers]
        index = np.repeat(begin_B - (np.cumsum(rows_B) - rows_B), rows_B) + np.arange(int(rows_B.sum()))
        return self._pieces[int(self._located.piece_U[numbers[0]])][torch.from_numpy(index)]

    def count_tokens(self, numbers: Ints) -> int:
        """Count the tokens of texts."""
        return int(self.texts.lengths_U[numbers].sum())

    def count_missing_tokens(self, numbers: Ints) -> int:
        """Count the tokens of a segment's texts, if they are computed and not copied."""
        return self.count_tokens(numbers) if self._is_missing(numbers) else 0

    def prepare_in_memory(
        self, layout: Layout, device: torch.device, on_segment: Callable[[int], None]
    ) -> tuple[Tensor, list[Callable[[], None]]]:
        """Allocate all rows on `device`, and return them with one task per segment that fills them."""
        rows = torch.empty(layout.num_rows, self.width, dtype=self.dtype, device=device)
        bounds_S = layout.bounds_S

        def fill(segment: int) -> None:
            rows[bounds_S[segment] : bounds_S[segment + 1]] = self.of_segment(layout, segment)
            on_segment(segment)

        return rows, [partial(fill, segment) for segment in range(layout.num_segments)]


class FeatureProgress:
    """Progress over all texts, in tokens. Any thread may report."""

    def __init__(self, emit: Emit, *, num_tokens: int, num_cached: int) -> None:
        """`num_cached`: tokens whose features existed at the start; they do not count towards the rate."""
        self._emit, self._total, self._done = emit, num_tokens, num_cached
        self._lock = threading.Lock()
        self._add(0)

    def add_segment(self, tokens_of: Mapping[int, int], segment: int) -> None:
        """Count one of the segments `tokens_of`, unless it existed at the start and so has no tokens to count."""
        if tokens_of[segment]:
            self._add(tokens_of[segment])

    def _add(self, num_tokens: int) -> None:
        with self._lock:
            self._done += num_tokens
            self._emit(Progress(task="frozen part", done=self._done, total=self._total, unit="tokens"))
