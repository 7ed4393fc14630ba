"""The index of a piece: which texts a file of features has, in which order.

A piece is one directory (see store.py). Runs add pieces for the texts that no piece has, and change none.
"""

import io
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.rows import Ints
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.eviction import INDEX
from agnews_dist.features.layout import Layout

MISSING = -1
"""Number of the piece of a text that no piece has."""


@dataclass(frozen=True)
class PieceIndex:
    """The texts of a piece in their order: number i within the piece."""

    hashes_I: NDArray[np.void]
    rows_I: Ints
    """Rows of features of each text."""
    texts_S: Ints
    """Segment s has the texts `texts_S[s]` to `texts_S[s + 1]`: shape (S + 1,)."""

    @classmethod
    def of_layout(cls, texts: DistinctTexts, layout: Layout) -> "PieceIndex":
        """Return the index of a piece with this layout."""
        return cls(texts.hashes_U[layout.order], texts.rows_U[layout.order], layout.texts_S)

    @cached_property
    def begin_I(self) -> Ints:
        """First row of each text, and the end of the last one: shape (I + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows_I)]).astype(np.int64)

    @cached_property
    def bounds_S(self) -> Ints:
        """Segment s has the rows `bounds_S[s]` to `bounds_S[s + 1]`: shape (S + 1,)."""
        return self.begin_I[self.texts_S]

    @cached_property
    def _order_by_hash(self) -> Ints:
        return np.argsort(self.hashes_I)

    def find(self, hashes_U: NDArray[np.void]) -> Ints:
        """Return the number of each text within the piece, MISSING where the piece does not have it."""
        if not len(self.hashes_I):
            return np.full(len(hashes_U), MISSING)
        at_U = np.searchsorted(self.hashes_I, hashes_U, sorter=self._order_by_hash)
        found_U = self._order_by_hash[np.minimum(at_U, len(self.hashes_I) - 1)]
        return np.where(self.hashes_I[found_U] == hashes_U, found_U, MISSING)

    def numbers_in(self, texts: DistinctTexts) -> Ints:
        """Return the number of each text of the piece among distinct texts, MISSING where it is not one of them."""
        found_U = self.find(texts.hashes_U)
        numbers_I = np.full(len(self.hashes_I), MISSING)
        numbers_I[found_U[found_U != MISSING]] = np.flatnonzero(found_U != MISSING)
        return numbers_I

    def to_bytes(self) -> bytes:
        """Return the content of the index file."""
        buffer = io.BytesIO()
        np.savez(buffer, hashes=self.hashes_I, rows=self.rows_I.astype("<i4"), texts_of_segments=self.texts_S.astype("<i8"))
        return buffer.getvalue()

    @classmethod
    def read(cls, directory: Path) -> "PieceIndex | None":
        """Read the index of a piece; None if there is none, or it cannot be read."""
        try:
            with np.load(directory / INDEX, allow_pickle=False) as arrays:
                rows_I, texts_S = arrays["rows"].astype(np.int64), arrays["texts_of_segments"].astype(np.int64)
                return cls(arrays["hashes"], rows_I, texts_S)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


class Located(NamedTuple):
    """Places of the features of distinct texts."""

    piece_U: Ints
    """Number of the piece with the features of text u; MISSING: they are to be computed for a new piece."""
    begin_U: Ints
    """First row within the piece."""
    adopted: tuple[tuple[int, ...], ...]
    """Unfinished segments of each piece that are to be computed: their texts are all among these, and nowhere else."""

    @property
    def missing(self) -> Ints:
        """Numbers of the texts that no piece has."""
        return np.flatnonzero(self.piece_U == MISSING)


def locate(texts: DistinctTexts, pieces: Sequence[tuple[PieceIndex, Collection[int]]], *, adopt: bool) -> Located:
    """Find texts in the finished segments of pieces, the first piece first.

    `pieces`: index and finished segments of each. `adopt`: also take unfinished segments, as a builder that was killed left
    them, if every text of the segment is one of these and is missing.
    """
    piece_U, begin_U = np.full(len(texts), MISSING), np.zeros(len(texts), np.int64)
    found: list[Ints] = []
    segments: list[Ints] = []

    def take(number: int, taken_U: NDArray[np.bool_]) -> None:
        piece_U[taken_U] = number
        begin_U[taken_U] = pieces[number][0].begin_I[found[number][taken_U]]

    for number, (index, finished) in enumerate(pieces):
        found.append(index.find(texts.hashes_U))
        segments.append(np.searchsorted(index.texts_S, found[number], side="right") - 1)
        take(number, (piece_U == MISSING) & (found[number] != MISSING) & np.isin(segments[number], list(finished)))
    adopted: list[tuple[int, ...]] = []
    for number, (index, finished) in enumerate(pieces):
        is_missing_U = (piece_U == MISSING) & (found[number] != MISSING)
        counts_S = np.bincount(segments[number][is_missing_U], minlength=len(index.texts_S) - 1)
        whole = np.setdiff1d(np.flatnonzero(counts_S == np.diff(index.texts_S)), list(finished)) if adopt else np.empty(0, int)
        take(number, is_missing_U & np.isin(segments[number], whole))
        adopted.append(tuple(whole.tolist()))
    return Located(piece_U, begin_U, tuple(adopted))
