"""Features of a batch gathered from cached rows."""

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.batching.batch import Batch
from agnews_dist.features.layout import Layout
from agnews_dist.model.prefix import Features


class CachedFeatures:
    """A source of features that were computed before; the rows are on the device, in host memory or memory-mapped."""

    def __init__(self, rows: Tensor, layout: Layout) -> None:
        """`rows`: shape (layout.num_rows, D)."""
        self._rows = rows
        # A text outside the layout begins beyond the last row: indexing raises, and no batch needs a check.
        begin_N = np.where(layout.begin_N < 0, layout.num_rows, layout.begin_N)
        self._begin_N = torch.from_numpy(begin_N).to(rows.device)
        self._rows_N = torch.from_numpy(np.array(layout.rows_N)).to(rows.device)
        self._one_row_per_text = bool((layout.rows_N == 1).all())

    def __call__(self, batch: Batch) -> Features:
        """Return the features of `batch.ids_B`. A filler row (id -1, weight 0) gets the first row of the cache."""
        device = self._rows.device
        ids_B = batch.ids_B.to(device)
        # A rank without cached texts gets only filler rows.
        if not len(self._rows):
            hidden_BTD = self._rows.new_zeros(len(ids_B), 1, self._rows.shape[1])
            return Features(hidden_BTD.to(batch.ids_B.device), torch.ones_like(batch.ids_B))
        is_filler_B = ids_B < 0
        begin_B = self._begin_N[ids_B].masked_fill(is_filler_B, 0)
        lengths_B = self._rows_N[ids_B].masked_fill(is_filler_B, 1)
        # From the shape: reading the lengths from a GPU would make the CPU wait for it.
        num_columns = 1 if self._one_row_per_text else batch.tokens_BT.shape[1]
        column_T = torch.arange(num_columns, device=device)
        index_BT = torch.where(column_T < lengths_B[:, None], begin_B[:, None] + column_T, 0)
        hidden_BTD = self._rows[index_BT]
        return Features(hidden_BTD.to(batch.ids_B.device), lengths_B.to(batch.ids_B.device))
