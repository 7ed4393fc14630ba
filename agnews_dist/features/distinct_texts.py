"""The texts of some splits, each one once: equal tokens are one text, whatever its label, row or split."""

from collections.abc import Mapping
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.rows import Ints

NO_TEXT = -1
"""Number of a row whose text is not among these."""


class DistinctTexts:
    """Distinct texts, numbered in the order in which they first occur: number u."""

    def __init__(
        self, tables: Mapping[str, TokenTable], *, one_row_per_text: bool, chosen: Mapping[str, Ints] | None = None
    ) -> None:
        """`tables`: split name -> tokens. `chosen`: the rows of each split to take; None: all."""
        self._tables = list(tables.values())
        ids = [np.arange(len(table)) if chosen is None else chosen[name] for name, table in tables.items()]
        hashes = [table.hashes_N[ids_N] for table, ids_N in zip(self._tables, ids, strict=True)]
        _, first_U, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
        order_U = np.argsort(first_U)
        number_of_sorted = np.empty_like(order_U)
        number_of_sorted[order_U] = np.arange(len(order_U))
        first_U, number = first_U[order_U], number_of_sorted[inverse]
        self.hashes_U = np.concatenate(hashes)[first_U]
        self._table_U = np.repeat(np.arange(len(ids)), [len(ids_N) for ids_N in ids])[first_U]
        self._id_U = np.concatenate(ids)[first_U]
        lengths = [table.lengths_N[ids_N].astype(np.int64) for table, ids_N in zip(self._tables, ids, strict=True)]
        self.lengths_U: Ints = np.concatenate(lengths)[first_U]
        self.rows_U: Ints = np.ones_like(self.lengths_U) if one_row_per_text else self.lengths_U
        """Rows of features of each text."""
        self.number_N: dict[str, Ints] = {}
        """Split -> number of each row's text, NO_TEXT where it was not chosen."""
        parts = np.split(number, np.cumsum([len(ids_N) for ids_N in ids])[:-1])
        for table, ids_N, part in zip(self._tables, ids, parts, strict=True):
            self.number_N[table.name] = np.full(len(table), NO_TEXT)
            self.number_N[table.name][ids_N] = part

    def __len__(self) -> int:
        return len(self.hashes_U)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all texts."""
        return int(self.lengths_U.sum())

    def pack(self, numbers: Ints) -> tuple[Tensor, list[int]]:
        """Gather texts end to end without padding; returns tokens_P on the device and the lengths."""
        tokens: list[Tensor] = []
        begin = 0
        for table, run in groupby(self._table_U[numbers].tolist()):
            end = begin + sum(1 for _ in run)
            tokens.append(self._tables[table].pack(self._id_U[numbers[begin:end]])[0])
            begin = end
        return torch.cat(tokens), self.lengths_U[numbers].tolist()
