"""Where the time goes: seconds per stage of a run, and the features timed without stopping a GPU."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch

from agnews_dist.data.batching.batch import Batch
from agnews_dist.model.prefix import Features, FeatureSource

STAGES = ("total", "setup", "tokenize", "prefix", "train", "eval")


class StageTimer:
    """Wall seconds by stage; `prefix` is a part of `train`, everything is a part of `total`."""

    def __init__(self, start: float) -> None:
        """`start`: `time.perf_counter()` at the beginning of the process's work."""
        self._start = start
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.before: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        """Those of the attempts that this one goes on from."""

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Add the time inside to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def end_of_setup(self) -> None:
        """Everything so far that was not tokenising was setup: imports, loading, the process group."""
        self.seconds["setup"] = time.perf_counter() - self._start - self.seconds["tokenize"]

    def stop(self) -> dict[str, float]:
        """The seconds of every stage so far, `total` and former attempts included, rounded to milliseconds."""
        self.seconds["total"] = time.perf_counter() - self._start
        return {name: round(value + self.before[name], 3) for name, value in self.seconds.items()}


class TimedFeatures:
    """Where features come from, as a function that knows how long it ran: the frozen part, or a copy of what it made before.

    On CUDA the time is read from events after the step has synchronised anyway, so measuring does not slow the run.
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
        """Total so far; call between steps, when the device has caught up (training does after every epoch)."""
        for begin, end in self._pending:
            self._seconds += begin.elapsed_time(end) / 1000
        self._pending.clear()
        return self._seconds
