"""The pieces on disk that a run reads: those that every rank sees, held against eviction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.eviction import list_of_frozen
from agnews_dist.features.keys import piece_key
from agnews_dist.features.piece_index import Located, PieceIndex, locate
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.packed import run_in_threads


@dataclass(frozen=True)
class Piece:
    """One file of features, and the segments of it that this run may read."""

    index: PieceIndex
    file: FeatureFile
    finished: frozenset[int]
    is_damaged: bool = False
    """True if a segment that is marked as finished does not match its checksum."""


def locate_in(pieces: Sequence[Piece], texts: DistinctTexts, *, adopt: bool) -> Located:
    """Find texts in pieces: see `locate`."""
    return locate(texts, [(piece.index, piece.finished) for piece in pieces], adopt=adopt)


def keep_used(pieces: Sequence[Piece], texts: DistinctTexts, *, adopt: bool) -> list[Piece]:
    """Return the pieces that have or get a text which no earlier one has; close the others."""
    numbers = set(locate_in(pieces, texts, adopt=adopt).piece_U.tolist())
    for number, piece in enumerate(pieces):
        if number not in numbers:
            piece.file.close()
    return [piece for number, piece in enumerate(pieces) if number in numbers]


def find_pieces(
    root: Path, frozen: str, texts: DistinctTexts, open_file: Callable[[Path, PieceIndex], FeatureFile], world: World
) -> list[Piece]:
    """Find the pieces of a frozen part that have some of the texts, the same on every rank. Collective.

    Local rank 0 locks them. Where the ranks do not see the same disk, pieces of one node are of no use.
    """
    own: dict[str, Piece] = {}
    for directory in list_of_frozen(root, frozen):
        index = PieceIndex.read(directory)
        if index is not None and piece_key(frozen, index) == directory.name:
            file = open_file(directory, index)
            own[directory.name] = Piece(index, file, file.finished_segments)
    seen = collectives.all_gather({key: piece.finished for key, piece in own.items()})
    pieces = [
        replace(piece, finished=frozenset.intersection(*(each[key] for each in seen)))
        for key, piece in own.items()
        if all(key in each for each in seen)
    ]
    # The largest first, so that one piece with everything is read alone.
    pieces.sort(key=lambda piece: (-len(piece.index.hashes_I), piece.file.directory.name))
    while True:
        pieces = keep_used(pieces, texts, adopt=True)
        removed = {key for each in collectives.all_gather(_lock(pieces) if world.local_rank == 0 else []) for key in each}
        if not removed:
            return pieces
        pieces = [piece for piece in pieces if piece.file.directory.name not in removed]


def _lock(pieces: Sequence[Piece]) -> list[str]:
    """Lock pieces; return the names of those that another process has removed, or that cannot be locked."""
    removed: list[str] = []
    for piece in pieces:
        try:
            piece.file.lock()
            # Locking makes a directory that was removed since it was listed.
            is_there = piece.finished <= piece.file.finished_segments
        except OSError:
            is_there = False
        if not is_there:
            piece.file.close()
            removed.append(piece.file.directory.name)
    return removed


def verify(pieces: Sequence[Piece], world: World) -> list[Piece]:
    """Leave out the damaged segments of pieces. Collective.

    The ranks of a node share the work. A piece that has not changed since it was last verified is not read.
    """
    segments: list[tuple[FeatureFile, int]] = []
    for piece in pieces:
        if not piece.file.begin_verification():
            own = sorted(piece.finished)[world.local_rank :: world.ranks_per_node]
            segments += [(piece.file, segment) for segment in own]
    tasks = [partial(_find_damage, file, segment) for file, segment in segments]
    damage = {found for found in run_in_threads(tasks, torch.device("cpu")) if found is not None}
    all_damage = set[tuple[str, int]]().union(*collectives.all_gather(damage))
    checked: list[Piece] = []
    for piece in pieces:
        bad = {segment for name, segment in all_damage if name == piece.file.directory.name}
        checked.append(replace(piece, finished=piece.finished - bad, is_damaged=bool(bad)))
    return checked


def _find_damage(file: FeatureFile, segment: int) -> tuple[str, int] | None:
    """Read a segment; return its name if it is damaged."""
    return None if file.read_segment(segment) is not None else (file.directory.name, segment)
