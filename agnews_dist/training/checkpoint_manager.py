"""Checkpoints of a run: copied to host memory between two steps, written by a thread while training continues.

Only rank 0 writes. A failed write is reported and tried again when the next checkpoint is due; it never stops training. The
other ranks wait for a slow one without a time limit.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agnews_dist.distributed import collectives
from agnews_dist.engine.strategy import Strategy
from agnews_dist.events import CheckpointSaved, Emit, Warned, begin_phase
from agnews_dist.report.event_log import EventLog
from agnews_dist.training.best_weights import BestWeights
from agnews_dist.training.checkpoint import STATE, Groups, best_name, list_checkpoints, prune, sweep, write_checkpoint

SLOW_SECONDS = 10.0
"""Writing time after which a warning is due, if the next checkpoint already waits."""
REPEAT_SECONDS = 30.0
"""Interval between two warnings while training waits for a write."""
MIN_SECONDS = 1.0
"""Shortest interval between checkpoints by `max_overhead`, and the time before the first one of a start."""
RETRY_SECONDS = 60.0
"""Shortest interval after a failed write."""
MAX_WRITING = 0.1
"""Largest share of the time in which checkpoints by `max_overhead` keep the disk busy."""
WEIGHT, AVERAGE = "weight.", "average."
"""Prefixes of weights and of their averages among the names of `Strategy.gather_state`; the others are moments."""


class Cost(NamedTuple):
    """The cost of writing a checkpoint in the thread."""

    num_bytes: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Intervals between checkpoints, and the number of checkpoints to keep."""

    keep: int
    every_steps: int | None
    every_minutes: float | None
    max_overhead: float | None = None
    """Largest share of the time for checkpoints. Either of the intervals replaces it."""

    @property
    def is_adaptive(self) -> bool:
        """True if the cost of checkpoints decides how often they are made."""
        return self.max_overhead is not None and self.every_steps is None and self.every_minutes is None

    def seconds_between(self, stall: float, cost: Cost) -> float:
        """Return the seconds between two checkpoints, from the `stall` and the `cost` of the last one; infinity: steps count.

        A checkpoint takes its stall from the training, and at most the CPU time of the thread that writes it. Once in
        (stall + CPU time) / `max_overhead` seconds it costs at most that share. A kill then loses half of this time on average.
        The interval of Young and Daly would lose least, but a run does not know its mean time between failures. The disk is
        busy for MAX_WRITING of the time at most.
        """
        if self.every_minutes is not None:
            return 60 * self.every_minutes
        if self.max_overhead is None or not self.is_adaptive:
            return math.inf
        return max(MIN_SECONDS, (stall + cost.cpu_seconds) / self.max_overhead, cost.seconds / MAX_WRITING)


@dataclass(frozen=True)
class OnDisk:
    """The verified checkpoint that a run resumes from, if it is one of its own."""

    name: str
    step: int
    best: str | None
    """Directory of the best weights that the checkpoint refers to."""


@dataclass(frozen=True)
class _Write:
    """A checkpoint that the thread is writing."""

    name: str
    step: int
    stall: float
    """Seconds for which training stopped."""
    started: float
    cost: futures.Future[Cost]


class CheckpointManager:
    """The checkpoints of one run. Every rank has one and calls `save` at the same points; rank 0 writes."""

    def __init__(
        self,
        folder: Callable[[], Path],
        strategy: Strategy,
        settings: CheckpointSettings,
        *,
        metadata: Mapping[str, Any],
        log: EventLog | None,
        emit: Emit,
        on_disk: OnDisk | None = None,
    ) -> None:
        """Prepare to write to `folder()`, after the checkpoint `on_disk` that the run resumes from.

        `metadata`: what every checkpoint says besides position and weights (settings, fingerprints, versions). `log`: the
        event log, whose length is part of a checkpoint; only rank 0 has one.
        """
        self._find_folder, self._strategy, self._log, self._emit = folder, strategy, log, emit
        self._metadata = metadata
        self._settings = settings
        # Nothing is measured yet. The first checkpoint comes early: before it a kill loses everything.
        self._every_seconds = settings.seconds_between(0.0, Cost(0, 0.0, 0.0))
        self._buffers: dict[str, Tensor] = {}
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write_in_progress: _Write | None = None
        self._newest_name = on_disk.name if on_disk else None
        self._best_on_disk = on_disk.best if on_disk else None
        self._last_save_time = time.monotonic()
        self._warned_step: int | None = None
        self.last_saved = on_disk.step if on_disk else 0
        """Steps of the newest checkpoint on disk; valid on rank 0."""
        if log is not None:
            sweep(self._folder)

    @property
    def _folder(self) -> Path:
        """Folder of the checkpoints, which may have been moved with its run."""
        return self._find_folder()

    def is_due(self, step: int) -> bool:
        """Return whether rank 0 requests a checkpoint after `step` steps. While one is being written, none is due."""
        if self._log is None:
            return False
        if self._write_in_progress is not None and self._write_in_progress.cost.done():
            self._report()
        now, every_steps = time.monotonic(), self._settings.every_steps
        if now - self._last_save_time < self._every_seconds and (every_steps is None or step % every_steps):
            return False
        write = self._write_in_progress
        if write is None:
            return True
        if now - write.started > SLOW_SECONDS and self._warned_step != write.step and not self._settings.is_adaptive:
            self._warned_step = write.step
            message = (
                f"checkpoint of step {write.step}: being written for {now - write.started:.0f} s, so the one due after step "
                f"{step} waits. Set a larger checkpoint.every_steps (or every_minutes), or a faster disk with --run.dir."
            )
            self._emit(Warned(message=message))
        return False

    def save(self, step: int, state: Mapping[str, Any], best: BestWeights, *, is_scored: bool, wait: bool = False) -> None:
        """Copy weights and moments and start writing them, unless this very checkpoint is saved already. Collective.

        `state`: the JSON part. `is_scored`: the evaluation after this step is done and part of the state. `wait`: return only
        when the checkpoint is on disk, or has failed.
        """
        name = f"step-{step:08d}{'-scored' if is_scored else ''}"
        begin = time.monotonic()
        # There is one set of buffers, and the previous write may still read it.
        self.wait()
        # Rank 0 decides: it alone knows whether a write has failed.
        if collectives.all_gather(name != self._newest_name)[0]:
            self._newest_name = name
            self._copy_and_write(name, step, state, best, begin)
        if wait:
            self.wait()

    def _copy_and_write(self, name: str, step: int, state: Mapping[str, Any], best: BestWeights, begin: float) -> None:
        """Copy the state, and let the thread write it. `begin`: when training stopped for it."""
        for key, tensor in self._strategy.gather_state():
            if self._log is not None:
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key].copy_(tensor, non_blocking=True)
        if self._log is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best_files = (best.name, {"weights": best.weights, "scored": best.scores.tensors()}) if best.epoch else None
        content = {**self._metadata, **state, "step": step, "log_bytes": self._log.num_bytes, "best": best.state_dict()}
        self._last_save_time = time.monotonic()
        cost = self._thread.submit(self._write, name, content, best_files, self._log)
        self._write_in_progress = _Write(name, step, self._last_save_time - begin, self._last_save_time, cost)

    def _write(self, name: str, content: Mapping[str, Any], best_files: tuple[str, Groups] | None, log: EventLog) -> Cost:
        """Write one checkpoint and prune the old ones, in the thread."""
        begin, cpu_begin = time.monotonic(), time.thread_time()
        # The log first: a checkpoint must never count more lines than the log holds after a crash.
        log.sync(content["log_bytes"])
        num_bytes = 0
        if best_files is not None and best_files[0] != self._best_on_disk:
            num_bytes += write_checkpoint(self._folder / best_files[0], best_files[1], {"best": None})
            self._best_on_disk = best_files[0]
        num_bytes += write_checkpoint(self._folder / name, _group_tensors(self._buffers), content)
        keep = self._settings.keep
        prune(self._folder, keep, also={name, *_referenced_best(self._folder, keep)})
        return Cost(num_bytes, time.monotonic() - begin, time.thread_time() - cpu_begin)

    def wait(self) -> None:
        """Wait on all ranks for the write in progress, without a time limit while rank 0 lives. Collective."""
        write = self._write_in_progress
        if write is not None and not write.cost.done():
            self._emit(begin_phase(f"write the checkpoint of step {write.step}"))
        while write is not None and not futures.wait([write.cost], REPEAT_SECONDS).done:
            seconds = time.monotonic() - write.started
            message = (
                f"checkpoint of step {write.step}: being written for {seconds:.0f} s, and training waits for it, as long as it "
                f"takes. Check the disk of {self._folder}."
            )
            self._emit(Warned(message=message))
        self._report()
        collectives.wait_for_main(f"waits for its disk, a checkpoint in {self._folder}")

    def _report(self) -> None:
        """Report how the write in progress ended, if there is one."""
        write, self._write_in_progress = self._write_in_progress, None
        if write is None:
            return
        try:
            cost = write.cost.result()
        except OSError as error:
            self._newest_name = None
            self._every_seconds = max(self._every_seconds, RETRY_SECONDS)
            message = (
                f"checkpoint of step {write.step}: cannot be written to {self._folder} ({error.strerror or error}); a restart "
                f"would resume from step {self.last_saved}. Training continues, and the next one is tried when it is due. Free "
                "space there, or make it writable."
            )
            self._emit(Warned(message=message))
            return
        self.last_saved, self._every_seconds = write.step, self._settings.seconds_between(write.stall, cost)
        self._emit(
            CheckpointSaved(
                path=str(self._folder / write.name),
                step=write.step,
                num_bytes=cost.num_bytes,
                stall=write.stall,
                seconds=cost.seconds,
            )
        )

    def close(self) -> None:
        """Wait for the write in progress on rank 0, also where training failed there alone."""
        self._thread.shutdown()
        self._report()


def load_weights(strategy: Strategy, tensors: Groups, num_updates: int, num_averaged: int = 0) -> None:
    """Load a checkpoint's weights, moments and averages into `strategy`. Collective; only rank 0's `tensors` are read."""
    weights = {WEIGHT + name: value for name, value in tensors.get("weights", {}).items()}
    averages = {AVERAGE + name: value for name, value in tensors.get("averages", {}).items()}
    strategy.load_state({**weights, **tensors.get("moments", {}), **averages}, num_updates, num_averaged)


def _group_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of `Strategy.gather_state` into a checkpoint's groups. Averages have one only if they exist."""
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
    for key, tensor in tensors.items():
        if key.startswith(WEIGHT):
            groups["weights"][key.removeprefix(WEIGHT)] = tensor
        elif key.startswith(AVERAGE):
            groups.setdefault("averages", {})[key.removeprefix(AVERAGE)] = tensor
        else:
            groups["moments"][key] = tensor
    return groups


def _referenced_best(folder: Path, keep: int) -> set[str]:
    """Return the names of the best weights that the newest `keep` checkpoints refer to."""
    names: set[str] = set()
    with suppress(OSError):
        for path in list_checkpoints(folder)[:keep]:
            # A damaged checkpoint refers to nothing.
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                names.add(best_name(json.loads((path / STATE).read_bytes())) or "")
    return names
