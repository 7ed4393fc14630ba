"""Checkpoints of a run: copied into host memory between two steps, written by a thread while training goes on.

Rank 0 alone writes. What cannot be written is warned of and tried again at the next occasion; training never ends for it.
"""

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from agnews_dist.engine.strategy import Strategy
from agnews_dist.events import CheckpointSaved, Emit, Warned
from agnews_dist.report.event_log import EventLog
from agnews_dist.training.best_epoch import BestEpoch
from agnews_dist.training.checkpoint import STATE, best_name, checkpoints, prune, sweep, write_checkpoint

SLOW_SECONDS = 10.0
"""A checkpoint that takes longer is warned of, if the next one waits for it."""
WEIGHT = "weight."
"""Before the names of weights in `Strategy.whole_state`."""


@dataclass(frozen=True)
class _Writing:
    """A checkpoint on its way to the disk."""

    name: str
    step: int
    stall: float
    started: float
    outcome: Future[int]


class CheckpointManager:
    """The checkpoints of one run. Every rank has one and calls `save` at the same points; rank 0's does the work."""

    def __init__(
        self,
        folder: Path,
        strategy: Strategy,
        *,
        keep: int,
        every_steps: int | None,
        every_minutes: float | None,
        log: EventLog | None,
        emit: Emit,
        found: str | None = None,
        last_saved: int = 0,
        best: str | None = None,
    ) -> None:
        """`log`: its length is part of a checkpoint; only rank 0 has one. `found`: the checkpoint that the run goes on from, of
        `last_saved` steps, which refers to the best epoch `best`; both are known to be whole.
        """
        self._folder, self._strategy, self._log, self._emit = folder, strategy, log, emit
        self._keep, self._every_steps = keep, every_steps
        self._every_seconds = 60 * every_minutes if every_minutes is not None else float("inf")
        self._buffers: dict[str, Tensor] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None
        self._asked, self._best_on_disk = found, best
        self._last_try = time.monotonic()
        self._warned_of: int | None = None
        self.last_saved = last_saved
        """Steps of the newest checkpoint that is on disk; on rank 0."""
        if log is not None:
            sweep(folder)

    def due(self, step: int) -> bool:
        """Whether rank 0 asks for a checkpoint after `step` steps; one due while another is being written has to wait."""
        if self._log is None:
            return False
        self.poll()
        now = time.monotonic()
        if now - self._last_try < self._every_seconds and (self._every_steps is None or step % self._every_steps):
            return False
        writing = self._writing
        if writing is None:
            return True
        if now - writing.started > SLOW_SECONDS and self._warned_of != writing.step:
            self._warned_of = writing.step
            message = (
                f"the checkpoint of step {writing.step} has been written for {now - writing.started:.0f} s and is not "
                f"finished: the next one, due after step {step}, waits for it. Set a larger checkpoint.every_minutes (or "
                "every_steps), or a faster disk with --run.dir."
            )
            self._emit(Warned(message=message))
        return False

    def save(
        self, step: int, state: Mapping[str, Any], best: BestEpoch, *, is_scored: bool, wait: bool = False
    ) -> None:
        """Copy what trains and have it written; collective. What was saved already is not saved again.

        `state`: all else that a checkpoint holds; `is_scored`: an epoch has just been evaluated; `wait`: until it is on the
        disk, or has failed to be.
        """
        name = f"step-{step:08d}{'-scored' if is_scored else ''}"
        if name != self._asked:
            self._asked = name
            self._start(name, step, state, best)
        if wait:
            self.settle()

    def _start(self, name: str, step: int, state: Mapping[str, Any], best: BestEpoch) -> None:
        begin = time.monotonic()
        # The buffers are one checkpoint large: the one before must have left them.
        self.settle()
        for key, tensor in self._strategy.whole_state():
            if self._log is not None:
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key].copy_(tensor, non_blocking=True)
        if self._log is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        kept = (best.name, {"weights": best.state, "scored": best.scored.tensors()}) if best.epoch else None
        content = {**state, "step": step, "log_bytes": self._log.num_bytes, "best": best.entry()}
        self._last_try = time.monotonic()
        outcome = self._writer.submit(self._write, name, content, kept, self._log)
        self._writing = _Writing(name, step, self._last_try - begin, self._last_try, outcome)

    def _write(
        self,
        name: str,
        content: Mapping[str, Any],
        best: tuple[str, Mapping[str, Mapping[str, Tensor]]] | None,
        log: EventLog,
    ) -> int:
        """Runs in the thread; the bytes written.

        Raises:
            OSError: something cannot be written.
        """
        # First: a checkpoint must never know of more lines than a crash leaves in the log.
        log.sync(content["log_bytes"])
        num_bytes = 0
        if best is not None and best[0] != self._best_on_disk:
            num_bytes += write_checkpoint(self._folder / best[0], best[1], {"best": None})
            self._best_on_disk = best[0]
        weights = {key.removeprefix(WEIGHT): value for key, value in self._buffers.items() if key.startswith(WEIGHT)}
        moments = {key: value for key, value in self._buffers.items() if not key.startswith(WEIGHT)}
        num_bytes += write_checkpoint(self._folder / name, {"weights": weights, "moments": moments}, content)
        prune(self._folder, self._keep, also={name, *_best_names(self._folder, self._keep)})
        return num_bytes

    def poll(self) -> None:
        """Tell of a checkpoint that was written, or could not be, since the last call."""
        if self._writing is not None and self._writing.outcome.done():
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is being written, and tell of it."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            num_bytes = writing.outcome.result()
        except OSError as error:
            self._asked = None
            message = (
                f"the checkpoint of step {writing.step} could not be written to {self._folder} ({error.strerror or error}): a "
                f"run killed now would go on from step {self.last_saved}. Training goes on, and the next one is tried when "
                "it is due; free space there, or make it writable."
            )
            self._emit(Warned(message=message))
            return
        self.last_saved = writing.step
        self._emit(
            CheckpointSaved(
                path=str(self._folder / writing.name),
                step=writing.step,
                num_bytes=num_bytes,
                stall=writing.stall,
                seconds=time.monotonic() - writing.started,
            )
        )

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is being written is finished, also where training failed."""
        self.settle()
        self._writer.shutdown()


def load_weights(strategy: Strategy, tensors: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
    """Give `strategy` what a checkpoint has of it; collective, `tensors` are read on rank 0 alone."""
    weights = {WEIGHT + name: value for name, value in tensors.get("weights", {}).items()}
    strategy.load_state({**weights, **tensors.get("moments", {})}, num_updates)


def _best_names(folder: Path, keep: int) -> set[str]:
    """The best epochs that the newest checkpoints refer to."""
    names: set[str] = set()
    with suppress(OSError):
        for path in checkpoints(folder)[:keep]:
            # Of a damaged one it does not matter.
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                names.add(best_name(json.loads((path / STATE).read_bytes())) or "")
    return names
