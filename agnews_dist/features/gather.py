"""Features of a batch gathered from cached rows."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.rows import Ints
from agnews_dist.model.prefix import Features, FeatureSource


class FeatureTable(TokenTable):
    """The texts of a split, with rows of features in the place of tokens."""

    def __init__(self, table: TokenTable, source: FeatureSource) -> None:
        """`source`: features of the split's texts, one row per token."""
        vars(self).update(vars(table))
        self._source = source

    def pack(self, ids_B: Ints) -> tuple[Tensor, list[int]]:
        """Gather the features of the examples `ids_B` end to end without padding; returns rows_PD and the lengths."""
        batch = self.batch(ids_B)
        hidden_BTD, lengths_B = self._source(batch)
        columns_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        return hidden_BTD[columns_T < lengths_B[:, None]], self.lengths_N[ids_B].tolist()


class CachedFeatures:
    """A source of features that were computed before; the rows are on the device, in host memory or memory-mapped."""

    def __init__(self, parts: Sequence[Tensor], *, part_N: Ints, begin_N: Ints, rows_N: Ints) -> None:
        """Text i has the rows `begin_N[i]` to `begin_N[i] + rows_N[i]` of `parts[part_N[i]]`, each of shape (rows, D).

        A text that is not cached begins at -1.
        """
        self._parts = list(parts)
        device = self._parts[0].device
        self._part_N, self._rows_N = (torch.from_numpy(values_N).to(device) for values_N in (part_N, rows_N))
        cached = np.flatnonzero(begin_N >= 0)
        self._filler: int | None = int(cached[0]) if len(cached) else None
        # A text that is not cached begins beyond the last row: indexing raises, and no batch needs a check.
        begin_N = np.where(begin_N < 0, max(map(len, self._parts)), begin_N)
        self._begin_N = torch.from_numpy(begin_N).to(device)
        self._one_row_per_text = bool((rows_N == 1).all())

    def __call__(self, batch: Batch) -> Features:
        """Return the features of `batch.ids_B`. A filler row (id -1, weight 0) gets the first row of a cached text."""
        first = self._parts[0]
        device = first.device
        # A rank without cached texts gets only filler rows.
        if self._filler is None:
            hidden_BTD = first.new_zeros(len(batch.ids_B), 1, first.shape[1])
            return Features(hidden_BTD.to(batch.ids_B.device), torch.ones_like(batch.ids_B))
        is_filler_B = batch.ids_B.to(device) < 0
        ids_B = batch.ids_B.to(device).masked_fill(is_filler_B, self._filler)
        begin_B = self._begin_N[ids_B]
        lengths_B = self._rows_N[ids_B].masked_fill(is_filler_B, 1)
        # From the shape: reading the lengths from a GPU would make the CPU wait for it.
        num_columns = 1 if self._one_row_per_text else batch.tokens_BT.shape[1]
        column_T = torch.arange(num_columns, device=device)
        # The padding repeats a row of the text: other rows may be unfinished.
        index_BT = begin_B[:, None] + torch.where(column_T < lengths_B[:, None], column_T, 0)
        hidden_BTD = first[index_BT] if len(self._parts) == 1 else self._gather_parts(index_BT, self._part_N[ids_B])
        return Features(hidden_BTD.to(batch.ids_B.device), lengths_B.to(batch.ids_B.device))

    def _gather_parts(self, index_BT: Tensor, part_B: Tensor) -> Tensor:
        hidden_BTD = self._parts[0].new_empty(*index_BT.shape, self._parts[0].shape[1])
        for number, rows in enumerate(self._parts):
            (of_part,) = torch.where(part_B == number)
            hidden_BTD[of_part] = rows[index_BT[of_part]]
        return hidden_BTD
