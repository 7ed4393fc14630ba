"""Wall-clock seconds per stage of a run, and timed features that do not synchronise a GPU."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch

from agnews_dist.data.batching.batch import Batch
from agnews_dist.model.prefix import Features, FeatureSource

STAGES = ("total", "setup", "tokenize", "prefix", "train", "eval")


class StageTimer:
    """Seconds by stage. `prefix` is part of `train`; every stage is part of `total`."""

    def __init__(self, start: float) -> None:
        """Start at `start`, a value of `time.perf_counter()`: when the process began its work."""
        self._start = start
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        """Seconds of this attempt."""
        self.earlier_seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        """Seconds of the attempts before the checkpoint that this one resumed from."""

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Add the time of the `with` block to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def end_setup(self) -> None:
        """Count everything so far, except tokenising, as `setup`: imports, loading, process group."""
        self.seconds["setup"] = time.perf_counter() - self._start - self.seconds["tokenize"]

    def totals(self) -> dict[str, float]:
        """Return the seconds of every stage so far, earlier attempts included, rounded to milliseconds."""
        self.seconds["total"] = time.perf_counter() - self._start
        return {name: round(value + self.earlier_seconds[name], 3) for name, value in self.seconds.items()}


class TimedFeatures:
    """A feature source that measures its own time.

    On CUDA the time comes from events, read only after a step has synchronised anyway, so measuring costs nothing.
    """

    def __init__(self, source: FeatureSource) -> None:
        self._source = source
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, batch: Batch) -> Features:
        if batch.tokens_BT.is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            features = self._source(batch)
            end.record()
            self._pending.append((begin, end))
        else:
            start = time.perf_counter()
            features = self._source(batch)
            self._seconds += time.perf_counter() - start
        return features

    def seconds(self) -> float:
        """Return the seconds so far. Call it between steps, when the device is idle."""
        for begin, end in self._pending:
            self._seconds += begin.elapsed_time(end) / 1000
        self._pending.clear()
        return self._seconds
