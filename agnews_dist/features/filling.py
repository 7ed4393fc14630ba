"""The features that a run writes: planned from what pieces on disk have, then computed or copied by all threads and ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.rows import Ints
from agnews_dist.distributed.world import World
from agnews_dist.events import Emit
from agnews_dist.features.distinct_texts import NO_TEXT, DistinctTexts
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.features.layout import Layout, lay_out
from agnews_dist.features.piece_index import Located
from agnews_dist.features.piece_search import Piece, keep_used, locate_in
from agnews_dist.features.precompute import FeatureProgress, FeatureRows
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.packed import run_in_threads
from agnews_dist.model.prefix import Prefix


@dataclass(frozen=True)
class Work:
    """Features of distinct texts: some stay in pieces on disk, the others are written."""

    texts: DistinctTexts
    pieces: list[Piece]
    located: Located
    copies: bool
    """True if the rows of the pieces are copied, so that only the written rows are read."""
    layout: Layout
    """Texts of the rows to write."""

    def files_to_fill(self, new_file: FeatureFile | None) -> list[FeatureFile]:
        """Return the files that this run writes: the new one, and pieces that a killed builder left unfinished."""
        unfinished = [piece.file for piece, segments in zip(self.pieces, self.located.adopted, strict=True) if segments]
        return unfinished if new_file is None else [new_file, *unfinished]

    def source(self, split: str, written: Sequence[Tensor]) -> CachedFeatures:
        """Return the source of a split's features; `written`: the written rows, or nothing if there are none."""
        texts, order = self.texts, self.layout.order
        parts = [] if self.copies else [piece.file.map_rows() for piece in self.pieces]
        part_U, begin_U = self.located.piece_U.copy(), self.located.begin_U.copy()
        part_U[order] = len(parts)
        begin_U[order] = np.cumsum(texts.rows_U[order]) - texts.rows_U[order]
        number_N = texts.number_N[split]
        is_cached_N = number_N != NO_TEXT
        # A row that another rank caches has one row of features here, which is never read.
        part_N, begin_N, rows_N = (np.full(len(number_N), filler) for filler in (0, -1, 1))
        for values_N, values_U in ((part_N, part_U), (begin_N, begin_U), (rows_N, texts.rows_U)):
            values_N[is_cached_N] = values_U[number_N[is_cached_N]]
        return CachedFeatures([*parts, *written], part_N=part_N, begin_N=begin_N, rows_N=rows_N)


def plan_work(texts: DistinctTexts, pieces: Sequence[Piece], prefix: Prefix, *, copies: bool) -> Work:
    """Decide which rows are computed, and which are copied or stay in their pieces.

    The rows to compute come first, in calls of their own. A piece that has none of the texts is closed.
    """
    used = keep_used(pieces, texts, adopt=not copies)
    located = locate_in(used, texts, adopt=not copies)
    copied: list[Ints] = []
    for number in range(len(used) if copies else 0):
        numbers = np.flatnonzero(located.piece_U == number)
        copied.append(numbers[np.argsort(located.begin_U[numbers])])
    layout = lay_out(
        texts.lengths_U,
        texts.rows_U,
        computed=located.missing,
        copied=copied,
        call_tokens=prefix.call_tokens,
        row_bytes=prefix.row_bytes,
    )
    return Work(texts, used, located, copies, layout)


def fill(
    work: Work, new_file: FeatureFile | None, prefix: Prefix, *, memory: torch.device, world: World, emit: Emit
) -> list[Tensor]:
    """Write this rank's part of the rows: into files, or without a new file into `memory`, which returns them.

    Raises:
        OSError: no space, no permission, or a process with a lock shows no sign of life.
    """
    texts, layout, device = work.texts, work.layout, prefix.wte.weight.device
    mapped = [piece.file.map_rows() for piece in work.pieces] if work.copies else []
    rows = FeatureRows(prefix, texts, work.located, mapped)
    unfinished = _unfinished_segments(work)
    at_start = frozenset[int]() if new_file is None else new_file.finished_segments
    # Copying takes no time worth a report.
    new = {segment: rows.count_missing_tokens(layout.texts(segment)) for segment in range(layout.num_segments)}
    new |= dict.fromkeys(at_start, 0)
    old = [{segment: rows.count_tokens(numbers) for segment, numbers in each.items()} for each in unfinished]
    num_left = sum(sum(tokens.values()) for tokens in [new, *old])
    progress = FeatureProgress(emit, num_tokens=texts.num_tokens, num_cached=texts.num_tokens - num_left)
    on_rank = partial(_make_worker, world=world, progress=progress)
    workers: list[Callable[[], None]] = []
    for piece, of_piece, tokens in zip(work.pieces, unfinished, old, strict=True):
        if of_piece:
            workers.append(on_rank(piece.file, partial(rows.compute_segment, of_piece), tokens, segments=list(of_piece)))
    if new_file is not None:
        workers.append(on_rank(new_file, partial(rows.of_segment, layout), new))
    for worker in workers:
        run_in_threads([worker] * torch.get_num_threads(), device)
    if new_file is not None or not work.copies:
        return []
    written, tasks = rows.prepare_in_memory(layout, memory, partial(progress.add_segment, new))
    run_in_threads(tasks, device)
    return [written]


def _unfinished_segments(work: Work) -> list[dict[int, Ints]]:
    """Return the segments of each piece that this run completes: segment -> numbers of its texts, in order."""
    found: list[dict[int, Ints]] = []
    for piece, segments in zip(work.pieces, work.located.adopted, strict=True):
        numbers_I, texts_S = piece.index.numbers_in(work.texts), piece.index.texts_S
        found.append({segment: numbers_I[texts_S[segment] : texts_S[segment + 1]] for segment in segments})
    return found


def _make_worker(
    file: FeatureFile,
    compute: Callable[[int], Tensor],
    tokens_of: Mapping[int, int],
    *,
    world: World,
    progress: FeatureProgress,
    segments: Sequence[int] | None = None,
) -> Callable[[], None]:
    file.allocate()
    report = partial(progress.add_segment, tokens_of)
    return file.make_worker(compute, report, segments=segments, rank=world.local_rank, num_ranks=world.ranks_per_node)
