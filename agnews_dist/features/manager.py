"""The features of a run: decides where they are kept, has them computed or opened, hands out each split's source."""

import shutil
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from agnews_dist.data.batching.epoch_plan import Ints
from agnews_dist.data.batching.loader import TokenTable, scoring_batches
from agnews_dist.distributed import collectives
from agnews_dist.engine.device import free_device_bytes
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Emit, Warned
from agnews_dist.features.eviction import make_room, remove, shared_directory
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.features.keys import features_key
from agnews_dist.features.layout import lay_out, longest_first, round_robin
from agnews_dist.features.placement import Choice, FreeSpace, Place, Wanted, choose
from agnews_dist.features.precompute import Meter, SplitFeatures, count, read_or_compute
from agnews_dist.features.store import FeatureFile
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.packed import side_by_side
from agnews_dist.model.prefix import FeatureSource, computed
from agnews_dist.storage import capacity as room


class FeatureCache:
    """Features of the training split, and of those that are scored, kept in the first place where they fit.

    Collective: every rank makes one, and calls `build`, at the same points.
    """

    def __init__(
        self,
        classifier: Classifier,
        tables: Mapping[str, TokenTable],
        engine: Engine,
        *,
        wanted: Wanted,
        num_epochs: int,
        directory: Path,
        limit_bytes: int,
        frozen_weights: str,
        model_name: str,
    ) -> None:
        """Decide, computing nothing yet.

        `directory`: of the feature caches on disk, which together may take `limit_bytes`; `frozen_weights`: their fingerprint.
        """
        self._classifier, self._tables, self._engine, self._world = classifier, tables, engine, engine.world
        self._wanted: Wanted = wanted
        self._num_epochs = num_epochs
        self._directory, self._limit_bytes = directory, limit_bytes
        self._frozen_weights, self._model_name = frozen_weights, model_name
        self._kept: dict[str, CachedFeatures] = {}
        self._files: dict[str, FeatureFile] = {}
        self._failed: set[Place] = set()
        self._splits: dict[tuple[str, bool], SplitFeatures] = {}
        self._keys: dict[str, str] = {}
        self.choice = self._choose()

    @property
    def owner_N(self) -> Ints | None:
        """The rank that holds each training text's features, where each holds a part; `build` may change it."""
        return round_robin(self._tables["train"].lengths_N, self._world.num_ranks) if self._is_divided else None

    @property
    def _is_divided(self) -> bool:
        return self.choice.place == "device" and self._world.num_ranks > 1

    @property
    def num_bytes(self) -> int:
        """What the kept splits take, over all ranks; 0 if none is kept."""
        place = self.choice.place
        return 0 if place == "off" else sum(self._split(name).num_bytes for name in self._names(place))

    def source(self, split: str) -> FeatureSource:
        """Where the features of a split's batches come from."""
        return self._kept.get(split) or computed(self._classifier.prefix)

    def build(self, emit: Emit) -> None:
        """Compute the features, or open and check what is there; where that fails on any rank, all take the next place."""
        if self.choice.refused:
            emit(Warned(message=f"engine.feature_cache {self._wanted}: {self.choice.refused}."))
        while self.choice.place != "off":
            # Space is reserved by one rank per node before the others start; a vote after each part, before anybody reads.
            failure = self._vote(self._reserve) or self._vote(lambda: self._fill(emit))
            if failure is None:
                self._open()
                break
            place = self.choice.place
            self._failed.add(place)
            for file in self._files.values():
                file.close()
            self._kept, self._files = {}, {}
            self.choice = self._choose()
            emit(
                Warned(
                    message=f"features cannot be kept in {place} ({failure}): nothing is lost, the run goes on with "
                    f"features in {self.choice.place} ({self.choice.why}). Free some space, or set another --data.cache_dir or "
                    "--engine.feature_cache."
                )
            )
        if "disk" in self._failed and self._world.local_rank == 0:
            # What is left there half could only stand in the way of the run's own results.
            for file in (self._file(name) for name in self._names("disk")):
                if not file.is_complete:
                    remove(file.directory)

    def _vote(self, part: Callable[[], None]) -> str | None:
        """Do a part on this rank; the first rank's failure if any rank had one."""
        failure: str | None = None
        try:
            part()
        except OSError as error:
            failure = error.strerror or str(error)
        return next((message for message in collectives.all_gather(failure) if message), None)

    def _choose(self) -> Choice:
        """Decide from the least room of all ranks, so that all decide alike."""
        if not self._classifier.prefix.fast_path:
            return Choice("off", "the plain path computes them at every step")
        if not len(self._classifier.prefix.h):
            return Choice("off", "nothing is frozen but the embeddings")
        splits = [self._split(name) for name in self._names("host")]
        num_bytes = sum(split.num_bytes for split in splits)
        is_on_disk = self._wanted in ("auto", "disk") and all(
            self._file(name).is_complete for name in self._names("disk")
        )
        mine = (
            free_device_bytes(self._engine.device, self._world.ranks_per_node),
            room.free_host_bytes(),
            room.free_shared_bytes(),
            room.free_disk_bytes(self._directory),
            int(is_on_disk),
        )
        device, host, shared, disk, whole = (min(values) for values in zip(*collectives.all_gather(mine), strict=True))
        return choose(
            self._wanted,
            num_bytes,
            FreeSpace(device=device, host=host, shared=shared, disk=disk, disk_limit=self._limit_bytes),
            num_ranks=self._world.num_ranks,
            ranks_per_node=self._world.ranks_per_node,
            num_epochs=self._num_epochs,
            has_gpu=self._engine.device.type == "cuda",
            is_on_disk=bool(whole),
            failed=frozenset(self._failed),
        )

    def _names(self, place: Place) -> list[str]:
        """The splits kept there: the test split is scored only once, so only a later run could use its features."""
        return [name for name in self._tables if place == "disk" or name != "test"]

    def _reserve(self) -> None:
        """Take the space of features that are files.

        Raises:
            OSError: there is not enough.
        """
        place = self.choice.place
        if place == "host" and self._world.ranks_per_node > 1:
            job = collectives.all_gather(uuid.uuid4().hex)[0]
            memory = shared_directory(room.SHARED_MEMORY, job, sweep=self._world.local_rank == 0)
            self._files = {name: self._file_below(memory, name) for name in self._names(place)}
        elif place == "disk":
            self._files = {name: self._file(name) for name in self._names(place)}
        else:
            return
        if self._world.local_rank == 0:
            if place == "disk":
                files = self._files.values()
                needed = sum(file.num_bytes for file in files)
                keep = {file.directory.name for file in files}
                make_room(self._directory, needed, self._limit_bytes, keep=keep)
            for file in self._files.values():
                file.allocate()

    def _fill(self, emit: Emit) -> None:
        """Compute this rank's part, or what is missing of it.

        Raises:
            OSError: a file cannot be written.
        """
        place, world = self.choice.place, self._world
        splits = {name: self._split(name, divided=self._is_divided) for name in self._names(place)}
        found = {name: file.found for name, file in self._files.items()}
        meter = Meter(
            emit,
            sum(split.num_tokens for split in splits.values()),
            sum(splits[name].segment_tokens(segment) for name, segments in found.items() for segment in segments),
        )
        pieces: list[Callable[[], None]] = []
        for name, split in splits.items():
            former = None if self._is_divided or place == "disk" else self._file(name)
            rows_of = partial(read_or_compute, split, former)
            done = partial(count, split, found.get(name, frozenset()), meter)
            if name in self._files:
                file = self._files[name]
                file.allocate()
                work = file.worker(rows_of, rank=world.local_rank, num_ranks=world.ranks_per_node, done=done)
                side_by_side([work] * torch.get_num_threads(), self._engine.device)
            else:
                device = self._engine.device if place == "device" else torch.device("cpu")
                rows, filling = split.in_memory(device, rows_of, done)
                self._kept[name] = CachedFeatures(rows, split.layout)
                pieces += filling
        # All splits at once: no thread waits for the last segment of one.
        side_by_side(pieces, self._engine.device)

    def _open(self) -> None:
        """Map what all ranks have filled."""
        for name, file in self._files.items():
            self._kept[name] = CachedFeatures(file.rows(), self._split(name).layout)
        if self.choice.place == "host" and self._files:
            collectives.all_gather(None)
            # Mapped memory lives as long as its processes: with its names gone, no kill can leave it behind.
            if self._world.local_rank == 0:
                for file in self._files.values():
                    shutil.rmtree(file.directory.parent, ignore_errors=True)

    def _split(self, name: str, *, divided: bool = False) -> SplitFeatures:
        """A split laid out; `divided`: this rank's part of it alone."""
        if (name, divided) not in self._splits:
            self._splits[name, divided] = self._lay_out(name, divided=divided)
        return self._splits[name, divided]

    def _lay_out(self, name: str, *, divided: bool) -> SplitFeatures:
        table, prefix, world = self._tables[name], self._classifier.prefix, self._world
        if name == "train":
            order = longest_first(table.lengths_N)
            if divided:
                order = order[round_robin(table.lengths_N, world.num_ranks)[order] == world.rank]
            groups = [order]
        else:
            groups = scoring_batches(table)
            if divided:
                groups = groups[world.rank :: world.num_ranks]
        layout = lay_out(
            table.lengths_N,
            groups,
            call_tokens=prefix.call_tokens,
            row_bytes=prefix.row_bytes,
            one_row_per_text=prefix.one_row_per_text,
        )
        return SplitFeatures(prefix, table, layout)

    def _key(self, name: str) -> str:
        if name not in self._keys:
            split = self._split(name)
            self._keys[name] = features_key(
                frozen_weights=self._frozen_weights,
                config=self._classifier.config,
                num_blocks=len(self._classifier.prefix.h),
                table=self._tables[name],
                layout=split.layout,
                dtype=split.dtype,
            )
        return self._keys[name]

    def _file(self, name: str) -> FeatureFile:
        """Return a split's features on disk."""
        return self._file_below(self._directory, name)

    def _file_below(self, directory: Path, name: str) -> FeatureFile:
        split, key = self._split(name), self._key(name)
        return FeatureFile(
            directory / key,
            key=key,
            bounds_S=split.layout.bounds_S.tolist(),
            width=split.width,
            dtype=split.dtype,
            about={
                "model": self._model_name,
                "split": name,
                "texts": len(self._tables[name]),
                "tokens": split.num_tokens,
            },
        )
