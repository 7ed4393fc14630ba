"""The feature cache of a run: chooses a place, computes or opens the features, provides each split's source."""

import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.engine.device import free_device_bytes
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Emit, Warned, ignore_event
from agnews_dist.features.eviction import evict, job_directory, remove
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.features.keys import features_key
from agnews_dist.features.layout import assign_owners, lay_out, order_longest_first
from agnews_dist.features.placement import Choice, Place, RequestedPlace, Resources, choose
from agnews_dist.features.precompute import FeatureProgress, SplitFeatures
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.packed import run_in_threads
from agnews_dist.model.prefix import FeatureSource, uncached_features
from agnews_dist.storage import capacity
from agnews_dist.storage.directories import used_disk_bytes


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


class FeatureCache:
    """Features of all splits, cached in the first place where they fit.

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
        self._files: dict[str, FeatureFile] = {}
        self._failed: set[Place] = set()
        self._splits: dict[tuple[str, bool], SplitFeatures] = {}
        self._keys: dict[str, str] = {}
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
        """Size of the cached features, over all ranks."""
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
            # One rank per node reserves the space before the others write; all have written before any reads.
            failure = self._run_on_all_ranks(self._reserve) or self._run_on_all_ranks(lambda: self._fill(emit))
            if failure is None:
                self._open()
                break
            fault = f"features cannot be cached in {self.choice.place} ({failure})"
            self._failed.add(self.choice.place)
            self.close()
            self._sources, self._files = {}, {}
            self.choice = self._choose()
            remedy = "Free some space, or set another --data.cache_dir or --engine.feature_cache."
            emit(Warned(message=f"{fault}: now {self.choice.place}, {self.choice.reason}. {remedy}"))
        if "disk" in self._failed and self._world.local_rank == 0:
            # Incomplete files would only take space from the run's own results.
            for file in map(self._file, self._cached_splits("disk")):
                if not file.is_complete:
                    remove(file.directory)

    def close(self) -> None:
        """Release the files: they may be evicted from now on. Sources stay readable."""
        for file in self._files.values():
            file.close()

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
        is_on_disk = settings.requested in ("auto", "disk") and all(
            self._file(name).is_complete for name in self._cached_splits("disk")
        )
        own_bytes = {
            "device_bytes": free_device_bytes(device, world.ranks_per_node),
            "host_bytes": capacity.free_host_bytes(),
            "shared_bytes": capacity.free_shared_bytes(),
            "disk_bytes": max(0, capacity.free_disk_bytes(settings.directory) - settings.reserved_bytes) + self._taken_bytes(),
        }
        of_ranks = collectives.all_gather((own_bytes, is_on_disk))
        resources = Resources(
            num_ranks=world.num_ranks,
            ranks_per_node=world.ranks_per_node,
            has_gpu=device.type == "cuda",
            disk_limit_bytes=settings.limit_bytes,
            **{name: min(free[name] for free, _ in of_ranks) for name in own_bytes},
        )
        return choose(
            settings.requested,
            self._num_bytes("host"),
            resources,
            num_epochs=settings.num_epochs,
            is_on_disk=all(is_there for _, is_there in of_ranks),
            failed=self._failed,
        )

    def _taken_bytes(self) -> int:
        """Return the space on disk that a builder of these features had reserved before it was killed."""
        if self._settings.requested not in ("auto", "disk"):
            return 0
        with suppress(FileNotFoundError):  # another process removes them
            return sum(used_disk_bytes(self._file(name).directory) for name in self._cached_splits("disk"))
        return 0

    def _cached_splits(self, place: Place) -> list[str]:
        """Return the splits to cache in a place. The test split is evaluated once, so only files of it have a later use."""
        return [name for name in self._tables if place == "disk" or name != "test"]

    def _num_bytes(self, place: Place) -> int:
        return sum(self._split(name).num_bytes for name in self._cached_splits(place))

    def _reserve(self) -> None:
        """Reserve the space of the features, if they are files."""
        place = self.choice.place
        if place == "host" and self._world.ranks_per_node > 1:
            job = collectives.all_gather(uuid.uuid4().hex)[0]
            directory = job_directory(capacity.SHARED_MEMORY, job, sweep=self._world.local_rank == 0)
            self._files = {name: self._file(name, directory) for name in self._cached_splits(place)}
        elif place == "disk":
            self._files = {name: self._file(name) for name in self._cached_splits(place)}
        if self._world.local_rank == 0 and self._files:
            if place == "disk":
                keep = {file.directory.name for file in self._files.values()}
                evict(self._settings.directory, self._num_bytes(place), self._settings.limit_bytes, keep=keep)
            for file in self._files.values():
                file.allocate()

    def _fill(self, emit: Emit) -> None:
        """Compute this rank's part, or what is missing of it."""
        place, world = self.choice.place, self._world
        splits = {name: self._split(name, sharded=self._is_sharded) for name in self._cached_splits(place)}
        cached = {name: file.finished_segments for name, file in self._files.items()}
        progress = FeatureProgress(
            emit,
            num_tokens=sum(split.num_tokens for split in splits.values()),
            num_cached=sum(splits[name].segment_tokens(segment) for name, ids in cached.items() for segment in ids),
        )
        tasks: list[Callable[[], None]] = []
        for name, split in splits.items():
            earlier_file = None if self._is_sharded or place == "disk" else self._file(name)
            get_rows = partial(split.read_or_compute, earlier_file)
            on_segment = partial(progress.add_segment, split, cached.get(name, frozenset()))
            if file := self._files.get(name):
                file.allocate()
                worker = file.make_worker(get_rows, on_segment, rank=world.local_rank, num_ranks=world.ranks_per_node)
                run_in_threads([worker] * torch.get_num_threads(), self._engine.device)
            else:
                device = self._engine.device if place == "device" else torch.device("cpu")
                rows, split_tasks = split.prepare_in_memory(device, get_rows, on_segment)
                self._sources[name] = CachedFeatures(rows, split.layout)
                tasks += split_tasks
        # All splits at once, so that no thread waits for the last segment of one split.
        run_in_threads(tasks, self._engine.device)

    def _open(self) -> None:
        """Map the files that all ranks have filled."""
        for name, file in self._files.items():
            self._sources[name] = CachedFeatures(file.map_rows(), self._split(name).layout)
            if self.choice.place == "disk" and self._world.local_rank == 0:
                file.mark_as_verified()
        if self.choice.place == "host" and self._files:
            collectives.all_gather(None)
            # Mapped memory lives as long as its processes. Without a name in the file system it cannot outlive a kill.
            if self._world.local_rank == 0:
                for file in self._files.values():
                    shutil.rmtree(file.directory.parent, ignore_errors=True)

    def _split(self, name: str, *, sharded: bool = False) -> SplitFeatures:
        """Return a split with its layout; `sharded`: only this rank's part of it."""
        if (name, sharded) not in self._splits:
            self._splits[name, sharded] = self._lay_out(name, sharded=sharded)
        return self._splits[name, sharded]

    def _lay_out(self, name: str, *, sharded: bool) -> SplitFeatures:
        table, prefix, world = self._tables[name], self._classifier.prefix, self._world
        groups = [order_longest_first(table.lengths_N)] if name == "train" else evaluation_batches(table)
        if sharded and name == "train":
            owner_N = assign_owners(table.lengths_N, world.num_ranks)
            groups = [ids[owner_N[ids] == world.rank] for ids in groups]
        elif sharded:
            groups = groups[world.rank :: world.num_ranks]
        layout = lay_out(
            table.lengths_N,
            groups,
            call_tokens=prefix.call_tokens,
            row_bytes=prefix.row_bytes,
            one_row_per_text=prefix.one_row_per_text,
        )
        return SplitFeatures(prefix, table, layout)

    def _file(self, name: str, directory: Path | None = None) -> FeatureFile:
        """Return the file of a split's features, by default the one on disk."""
        split, table, settings = self._split(name), self._tables[name], self._settings
        if name not in self._keys:
            self._keys[name] = features_key(
                frozen_weights=settings.frozen_weights,
                config=self._classifier.config,
                num_blocks=len(self._classifier.prefix.h),
                table=table,
                layout=split.layout,
                dtype=split.dtype,
                are_means=self._classifier.prefix.computes_means,
            )
        return FeatureFile(
            (directory or settings.directory) / self._keys[name],
            key=self._keys[name],
            bounds_S=split.layout.bounds_S.tolist(),
            width=split.width,
            dtype=split.dtype,
            about={"model": settings.model_name, "split": name, "texts": len(table), "tokens": split.num_tokens},
            say=lambda message: self._emit(Warned(message=message)),
        )
