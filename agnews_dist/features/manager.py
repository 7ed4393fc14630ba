"""The feature cache of a run: chooses a place, computes or opens the features, provides each split's source."""

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.engine.device import free_device_bytes
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Emit, Warned, ignore_event
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.eviction import FROZEN, evict, job_directory, read_about, remove
from agnews_dist.features.filling import Work, fill, plan_work
from agnews_dist.features.gather import CachedFeatures, FeatureTable
from agnews_dist.features.keys import frozen_key, piece_key
from agnews_dist.features.layout import assign_owners
from agnews_dist.features.piece_index import MISSING, PieceIndex
from agnews_dist.features.piece_search import Piece, find_pieces, locate_in, verify
from agnews_dist.features.placement import DISK_SHARE, Choice, Place, RequestedPlace, Resources, choose
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource, uncached_features
from agnews_dist.storage import capacity

MAX_PIECES = 8
"""Pieces on disk that a run reads as they are. More are copied into one: each costs a copy of rows per batch."""


@dataclass(frozen=True)
class CacheSettings:
    """Settings of a run's feature cache."""

    requested: RequestedPlace
    num_epochs: int
    directory: Path
    """Root of the feature caches on disk."""
    limit_bytes: int
    """Limit of all caches below `directory` together."""
    reserved_bytes: int
    """Free bytes of its file system that the run needs for other files."""
    frozen_weights: str
    """Fingerprint of the frozen weights."""
    model_name: str
    """For listings of the caches."""
    excluded: frozenset[Place] = frozenset()
    """Places that are not tried, unless one is requested."""


class FeatureCache:
    """Features of all splits, cached in the first place where they fit.

    On disk they are pieces. A run reads the pieces of earlier runs and adds one with the texts that none of them has.
    Collective: every rank constructs one, and calls `build`, at the same point of the run.
    """

    def __init__(
        self, classifier: Classifier, tables: Mapping[str, TokenTable], engine: Engine, settings: CacheSettings
    ) -> None:
        """Choose the place; nothing is computed yet. `tables`: split name -> tokens, with a split 'train'."""
        self._classifier, self._tables, self._engine, self._world = classifier, tables, engine, engine.world
        self._settings = settings
        self._emit: Emit = ignore_event
        self._sources: dict[str, CachedFeatures] = {}
        self._pieces: list[Piece] = []
        self._file: FeatureFile | None = None
        """New file: the next piece on disk, or the rows that the ranks of a node share in memory."""
        self._failed: set[Place] = set()
        self._unfinished: list[FeatureFile] = []
        """Files that could not be completed on disk."""
        self._texts: dict[tuple[bool, bool], DistinctTexts] = {}
        self._has_room_to_copy = False
        self.choice = self._choose()

    @property
    def owner_N(self) -> Ints | None:
        """The rank that holds each training text's features; None if every rank can read all. `build` may change it."""
        return assign_owners(self._tables["train"].lengths_N, self._world.num_ranks) if self._is_sharded else None

    @property
    def _is_sharded(self) -> bool:
        return self.choice.place == "device" and self._world.num_ranks > 1

    @property
    def num_bytes(self) -> int:
        """Size of the cached features, over all ranks; equal texts count once."""
        return 0 if self.choice.place == "off" else self._num_bytes(self.choice.place)

    def source(self, split: str) -> FeatureSource:
        """Return the source of a split's features."""
        return self._sources.get(split) or uncached_features(self._classifier.prefix)

    def build(self, emit: Emit) -> None:
        """Compute the features, or open and verify cached ones. If that fails on any rank, all ranks take the next place."""
        self._emit = emit
        if self.choice.refusal:
            emit(Warned(message=f"engine.feature_cache {self._settings.requested}: {self.choice.refusal}."))
        while self.choice.place != "off":
            work = self._plan()
            rows: list[Tensor] = []
            # One rank per node reserves the space before the others write; all have written before any reads.
            failure = self._run_on_all_ranks(partial(self._reserve, work))
            failure = failure or self._run_on_all_ranks(partial(self._fill, work, rows))
            if failure is None:
                self._open(work, rows)
                break
            place = self.choice.place
            self._failed.add(place)
            if place == "disk":
                self._unfinished = work.files_to_fill(self._file)
            self.close()
            self.choice = self._choose()
            remedy = "Free some space, or set another --data.cache_dir or --engine.feature_cache."
            fault = f"features cannot be cached in {place} ({failure})"
            emit(Warned(message=f"{fault}: now {self.choice.place}, {self.choice.reason}. {remedy}"))
        if self.choice.place != "disk":
            self._close_pieces()
        if self._world.local_rank == 0:
            # Incomplete files would only take space from the run's own results.
            for file in self._unfinished:
                if not file.is_complete:
                    remove(file.directory)

    def extend(self, classifier: Classifier, below: FeatureSource) -> FeatureSource | None:
        """Compute the output of newly frozen blocks for the training texts, and keep it in memory. Collective.

        The blocks are the frozen part of `classifier`, and `below` is the source of the features below them. Return None if
        memory has too little room. On disk the output would be of no use to later runs, whose weights differ.
        """
        is_alone = self._world.num_ranks == 1
        is_on_device = self.choice.place == "device" or (self._engine.device.type == "cuda" and is_alone)
        settings = replace(
            self._settings,
            requested="device" if is_on_device else "host",
            # Several ranks must divide all features alike.
            excluded=frozenset(("disk",) if is_alone else ("device", "host", "disk")),
            frozen_weights="trained",
        )
        table = FeatureTable(self._tables["train"], below)
        extension = FeatureCache(classifier, {table.name: table}, self._engine, settings)
        # Its warnings speak of a setting that is not the one to change.
        extension.build(lambda event: None if isinstance(event, Warned) else self._emit(event))
        # Rows in memory stay readable.
        extension.close()
        if extension.choice.place != "off":
            return extension.source(table.name)
        fault = f"output of frozen blocks is {extension.choice.reason}"
        self._emit(Warned(message=f"model.freeze_schedule: {fault}. Free some memory to keep it."))
        return None

    def close(self) -> None:
        """Release the files: they may be evicted from now on. Sources stay readable."""
        self._close_pieces()
        if self._file is not None:
            self._file.close()
        # A file knows this object: in the cycle, features below an extension would keep their memory.
        self._pieces, self._file = [], None

    def _close_pieces(self) -> None:
        for piece in self._pieces:
            piece.file.close()

    def _run_on_all_ranks(self, part: Callable[[], None]) -> str | None:
        """Run `part` on this rank and wait for the others; return the first rank's error message, or None."""
        failure: str | None = None
        try:
            part()
        except OSError as error:
            failure = error.strerror or str(error)
        return next((message for message in collectives.all_gather(failure) if message), None)

    def _choose(self) -> Choice:
        """Choose a place from the minimum of all ranks' free bytes, so that every rank chooses the same."""
        if not self._classifier.prefix.fast_path:
            return Choice("off", "the plain path computes features at every use")
        if not len(self._classifier.prefix.h):
            is_any = any(True for _ in self._classifier.prefix.parameters())
            return Choice("off", "only the embeddings are frozen" if is_any else "nothing is frozen")
        settings, world, device = self._settings, self._world, self._engine.device
        if settings.requested == "off":
            return Choice("off", "as requested, computed at every use")
        missing_bytes, share = self._find_on_disk()
        own_bytes = {
            "device_bytes": free_device_bytes(device, world.ranks_per_node),
            "host_bytes": capacity.free_host_bytes(),
            "shared_bytes": capacity.free_shared_bytes(),
            "disk_bytes": max(0, capacity.free_disk_bytes(settings.directory) - settings.reserved_bytes),
        }
        of_ranks = collectives.all_gather(own_bytes)
        free = {name: min(each[name] for each in of_ranks) for name in own_bytes}
        all_bytes, used_bytes = self._num_bytes("disk"), sum(piece.file.num_bytes for piece in self._pieces)
        fits = used_bytes + all_bytes <= settings.limit_bytes
        self._has_room_to_copy = fits and all_bytes <= DISK_SHARE * free["disk_bytes"]
        resources = Resources(
            num_ranks=world.num_ranks,
            ranks_per_node=world.ranks_per_node,
            has_gpu=device.type == "cuda",
            disk_limit_bytes=settings.limit_bytes,
            **free,
        )
        return choose(
            settings.requested,
            self._num_bytes("host"),
            resources,
            num_epochs=settings.num_epochs,
            missing_bytes=missing_bytes,
            cached_share=share,
            failed=self._failed,
            excluded=settings.excluded,
        )

    def _find_on_disk(self) -> tuple[int, float]:
        """Find what earlier runs left on disk: bytes that a run needs in addition, and the share of tokens that it has."""
        texts = self._distinct_texts("disk")
        self._pieces = find_pieces(self._settings.directory, self._frozen_key(), texts, self._open_piece, self._world)
        is_found_U = locate_in(self._pieces, texts, adopt=False).piece_U != MISSING
        # A builder that was killed has reserved the space of the segments that this run completes.
        is_missing_U = locate_in(self._pieces, texts, adopt=True).piece_U == MISSING
        reused = np.concatenate([texts.number_N[name] for name in self._cached_splits("host")])
        is_missing_U &= np.isin(np.arange(len(texts)), reused)
        missing_bytes = int(texts.rows_U[is_missing_U].sum()) * self._classifier.prefix.row_bytes
        return missing_bytes, int(texts.lengths_U[is_found_U].sum()) / texts.num_tokens

    def _cached_splits(self, place: Place) -> list[str]:
        """Return the splits to cache in a place. The test split is evaluated once, so only files of it have a later use."""
        return [name for name in self._tables if place == "disk" or name != "test"]

    def _num_bytes(self, place: Place) -> int:
        return int(self._distinct_texts(place).rows_U.sum()) * self._classifier.prefix.row_bytes

    def _distinct_texts(self, place: Place, *, sharded: bool = False) -> DistinctTexts:
        """Return the texts to cache in a place; `sharded`: only this rank's part of them."""
        kind = (place == "disk", sharded)
        if kind not in self._texts:
            tables = {name: self._tables[name] for name in self._cached_splits(place)}
            chosen = {name: self._own_rows(table) for name, table in tables.items()} if sharded else None
            one_row = self._classifier.prefix.one_row_per_text
            self._texts[kind] = DistinctTexts(tables, one_row_per_text=one_row, chosen=chosen)
        return self._texts[kind]

    def _own_rows(self, table: TokenTable) -> Ints:
        """Return the rows of a split that this rank trains on or scores."""
        rank, num_ranks = self._world.rank, self._world.num_ranks
        if table.name == "train":
            return np.flatnonzero(assign_owners(table.lengths_N, num_ranks) == rank)
        return np.concatenate([np.empty(0, np.int64), *evaluation_batches(table)[rank::num_ranks]])

    def _plan(self) -> Work:
        """Verify the pieces on disk, and decide which rows are computed, copied or left where they are. Collective."""
        place, pieces = self.choice.place, verify(self._pieces, self._world)
        copies = place != "disk" or (self._has_room_to_copy and len(pieces) >= MAX_PIECES)
        work = plan_work(self._distinct_texts(place, sharded=self._is_sharded), pieces, self._classifier.prefix, copies=copies)
        self._pieces = work.pieces
        return work

    def _reserve(self, work: Work) -> None:
        """Reserve the space of the features, if they are files."""
        place, settings = self.choice.place, self._settings
        if place == "host" and self._world.ranks_per_node > 1:
            job = collectives.all_gather(uuid.uuid4().hex)[0]
            self._file = self._new_file(work, job_directory(capacity.SHARED_MEMORY, job, sweep=self._world.local_rank == 0))
        elif place == "disk" and len(work.layout.order):
            self._file = self._new_file(work, settings.directory)
        if self._world.local_rank == 0:
            if place == "disk" and self._file is not None:
                used = [*(piece.file for piece in self._pieces), self._file]
                keep = {file.directory.name for file in used}
                evict(settings.directory, sum(file.num_bytes for file in used), settings.limit_bytes, keep=keep)
            for file in work.files_to_fill(self._file):
                file.allocate()

    def _fill(self, work: Work, rows: list[Tensor]) -> None:
        """Compute this rank's part, or what is missing of it; add the rows in this process's memory to `rows`."""
        memory = self._engine.device if self.choice.place == "device" else torch.device("cpu")
        rows += fill(work, self._file, self._classifier.prefix, memory=memory, world=self._world, emit=self._emit)

    def _open(self, work: Work, rows: list[Tensor]) -> None:
        """Map the files that all ranks have filled."""
        written = rows if self._file is None else [self._file.map_rows()]
        self._sources = {name: work.source(name, written) for name in self._cached_splits(self.choice.place)}
        if self._world.local_rank == 0:
            whole = [piece.file for piece in self._pieces if not piece.is_damaged]
            for file in [*whole, self._file] if self._file is not None and self.choice.place == "disk" else whole:
                file.mark_as_verified()
        if self.choice.place == "host" and self._file is not None:
            collectives.all_gather(None)
            # Mapped memory lives as long as its processes. Without a name in the file system it cannot outlive a kill.
            if self._world.local_rank == 0:
                shutil.rmtree(self._file.directory.parent, ignore_errors=True)

    def _frozen_key(self) -> str:
        classifier = self._classifier
        return frozen_key(frozen_weights=self._settings.frozen_weights, config=classifier.config, prefix=classifier.prefix)

    def _new_file(self, work: Work, root: Path) -> FeatureFile:
        """Describe the file of the rows to write, below `root`."""
        index = PieceIndex.of_layout(work.texts, work.layout)
        num_tokens = int(work.texts.lengths_U[work.layout.order].sum())
        about = {"model": self._settings.model_name, "texts": len(index.hashes_I), "tokens": num_tokens}
        return self._describe(root / piece_key(self._frozen_key(), index), index, about | {FROZEN: self._frozen_key()})

    def _open_piece(self, directory: Path, index: PieceIndex) -> FeatureFile:
        """Describe a file of an earlier run."""
        return self._describe(directory, index, read_about(directory))

    def _describe(self, directory: Path, index: PieceIndex, about: Mapping[str, Any]) -> FeatureFile:
        weight = self._classifier.prefix.wte.weight
        return FeatureFile(
            directory,
            key=directory.name,
            bounds_S=index.bounds_S.tolist(),
            width=weight.shape[1],
            dtype=weight.dtype,
            about=about,
            index=index.to_bytes(),
            say=lambda message: self._emit(Warned(message=message)),
        )
