"""One attempt at a run: its directory claimed, the checkpoint that it goes on from, its log, and how it ended, in status.json.

A run that is preempted or killed takes several attempts; each begins where the last checkpoint of the one before stands. Rank 0
does the work, the others learn of it.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from torch import Tensor

from agnews_dist.config import command_line as cli
from agnews_dist.config.schema import Config
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler, slurm_seconds_left
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy
from agnews_dist.errors import Done, Stopped, UserError
from agnews_dist.events import Resumed, Warned
from agnews_dist.features.placement import RequestedPlace
from agnews_dist.report.console import Sinks
from agnews_dist.report.event_log import EventLog
from agnews_dist.report.result_files import versions
from agnews_dist.run.directory import LOCK_SECONDS, RunDirectory, run_name
from agnews_dist.run.fingerprints import settings
from agnews_dist.run.resume import ACCEPTABLE, FOLDER, ResumePoint, check_prints, look, wanted_later
from agnews_dist.run.status import State, StatusFile, is_later_start, job_of, run_of_job
from agnews_dist.storage.atomic import discard
from agnews_dist.training.checkpoint import checkpoints
from agnews_dist.training.checkpoint_manager import CheckpointManager, load_weights
from agnews_dist.training.loop import Trainer

LOG = "events.jsonl"
SLURM_MARGIN_SECONDS = 60.0
"""Before the end of a Slurm job; Slurm itself may be as late as that."""


def set_deadline(preemption: PreemptionHandler, max_minutes: float | None) -> None:
    """Have the run stop, a checkpoint included, before its own time limit and its job's."""
    limits: list[tuple[float, str]] = []
    if max_minutes is not None:
        margin = min(30.0, 6 * max_minutes)
        age = time.time() - psutil.Process().create_time()
        limits.append((60 * max_minutes - margin - age, f"run.max_minutes {max_minutes:g}"))
    of_job = slurm_seconds_left(os.environ, time.time())
    if of_job is not None:
        limits.append((of_job - SLURM_MARGIN_SECONDS, "the time limit of the Slurm job"))
    if limits:
        preemption.set_deadline(*min(limits))


def accepted(text: str) -> list[str]:
    """The settings that `--accept` names.

    Raises:
        UserError: one that cannot be accepted.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ACCEPTABLE:
            raise UserError(
                f"--accept {name}: with another value the steps would not be those of this training, so it is no choice. These "
                f"are: {', '.join(ACCEPTABLE)}."
            )
    return names


class Attempt:
    """A context: `claim()` on every rank before loading, `begin()` when all is loaded, `saver()` before the first step."""

    def __init__(
        self, config: Config, engine: Engine, preemption: PreemptionHandler, emit: Sinks, *, accept: str
    ) -> None:
        self._config, self._engine, self._preemption, self._emit = config, engine, preemption, emit
        self._accept = accept
        self._settings = {**settings(config), "engine.precision": engine.precision}
        self._claim: RunDirectory | None = None
        self._found: ResumePoint | None = None
        self._status: StatusFile | None = None
        self._log: EventLog | None = None
        self._saver: CheckpointManager | None = None
        self._has_begun = False
        self._beginning = threading.Lock()
        """Of the main thread that begins the run, and of the watch that ends it; whichever comes later finds it whole."""
        self._is_over = False
        self._state: dict[str, Any] | None = None

    @property
    def directory(self) -> Path:
        """The run's; only rank 0, which alone writes there, knows its name."""
        return self._claim.directory if self._claim is not None else Path(self._config.run.dir)

    def claim(self) -> None:
        """On rank 0: lock the run's name, find what there is to go on from, and make sure that it can be written.

        Raises:
            Done: the run is finished.
            UserError: another process has it; its results would be lost; or it cannot be continued under these settings.
        """
        accept = accepted(self._accept)
        if not self._engine.world.is_main:
            return
        run, job = self._config.run, job_of(os.environ)
        runs, resume, is_later = Path(run.dir), self._config.checkpoint.resume, is_later_start(os.environ)
        if (name := run.name) is None and (is_later or resume == "auto"):
            name = self._unfinished_run(runs, job, accept)
        name = run_name(name, self._config.model.name, datetime.now())
        claim = RunDirectory(runs, name, overwrite=run.overwrite, config_yaml=cli.dump(self._config))
        self._claim = claim
        # The other ranks wait for this one, and not for longer than their timeout.
        claim.lock(min(LOCK_SECONDS, self._config.engine.timeout_seconds / 2))
        if is_later:
            resume, claim.overwrite = wanted_later(claim.directory, job, resume, overwrite=run.overwrite)
        found = look(claim.directory, resume=resume, overwrite=claim.overwrite, settings=self._settings, accept=accept)
        if found is not None and found.is_own:
            claim.go_on()
        else:
            claim.take()
            self._log = EventLog(claim.staging / LOG)
            self._emit.add(self._log)
        self._found = found
        step = found.checkpoint.state["step"] if found and found.checkpoint else 0
        self._status = StatusFile(claim.path, attempt=found.attempt if found else 1, step=step, job=job)
        self._preemption.last_words = self._last_words
        for warning in found.warnings if found else ():
            self._emit(Warned(message=warning))

    def _unfinished_run(self, runs: Path, job: str | None, accept: Sequence[str]) -> str | None:
        """The run without a name of its own that this job has begun before, if it is the same training."""
        name = run_of_job(runs, job)
        try:
            if name is not None:
                look(runs / name, resume="auto", overwrite=False, settings=self._settings, accept=accept)
        except UserError:
            return None  # another training of the same job
        return name

    def begin(self, prints: dict[str, str]) -> None:
        """Everything is loaded, and fits: from here on the run exists under its name. Collective.

        Raises:
            SharedError: the checkpoint belongs to other data or weights, or the directory cannot be written.
        """

        def on_main() -> None:
            with self._beginning:
                if not self._is_over:
                    begin_it()

        def begin_it() -> None:
            claim, status, found = self._claim, self._status, self._found
            assert claim is not None
            assert status is not None
            checkpoint = found.checkpoint if found else None
            if checkpoint is not None:
                check_prints(checkpoint, prints)
            if found is None or not found.is_own:
                # A run that is killed from here on must be found as one that was begun.
                status.write("running", "it began")
                claim.keep()
                status.directory = claim.directory
                if self._log is not None:
                    self._log.path = claim.directory / LOG
            else:
                claim.keep()
                keep_bytes = checkpoint.state["log_bytes"] if checkpoint else 0
                self._log = EventLog(claim.directory / LOG, keep_bytes=keep_bytes)
                self._emit.add(self._log)
                status.write("running", "it goes on")
                self._remove_later(status.step)
            if checkpoint is not None:
                assert found is not None
                self._state = {**checkpoint.state, "name": checkpoint.path.name, "is_own": found.is_own}
                self._emit(Resumed(path=str(checkpoint.path), step=status.step, attempt=status.attempt))

        is_main = self._engine.world.is_main
        collectives.raise_if_any_failed(collectives.catch(on_main) if is_main else None)
        self._has_begun = True
        self._state = collectives.all_gather(self._state)[0]

    def _remove_later(self, step: int) -> None:
        """Checkpoints beyond the one that is continued would be taken for the newest at the next start."""
        assert self._claim is not None
        folder = self._claim.directory / FOLDER
        chosen = self._found.checkpoint.path.name if self._found and self._found.checkpoint else None
        later = list(takewhile(lambda path: path.name != chosen, checkpoints(folder)))
        discard(later)
        for path in later:
            self._emit(Warned(message=f"{path} is removed: the run goes on from step {step}, before it."))

    def features_wanted(self) -> RequestedPlace:
        """Where the features were, if that is left to us: elsewhere the same sums would be added up in another order."""
        wanted = self._config.engine.feature_cache
        if wanted == "auto" and self._state and self._state["num_ranks"] == self._engine.world.num_ranks:
            return self._state["features"]
        return wanted

    def about(self, prints: dict[str, str], features: str, class_names: Sequence[str]) -> dict[str, Any]:
        """What every checkpoint says beside the position."""
        return {
            "settings": self._settings,
            "fingerprints": prints,
            "precision": self._engine.precision,
            "num_ranks": self._engine.world.num_ranks,
            "features": features,
            "class_names": list(class_names),
            "versions": versions(),
        }

    def saver(self, training: Trainer, strategy: Strategy) -> CheckpointManager:
        """The run's checkpoints; `training` and `strategy` take over the one that is continued. Collective.

        Raises:
            SharedError: its position belongs to another plan.
        """
        settings, state = self._config.checkpoint, self._state
        best = state["best"] if state else None
        own = state is not None and state["is_own"]
        self._saver = CheckpointManager(
            self.directory / FOLDER,
            strategy,
            keep=settings.keep,
            every_steps=settings.every_steps,
            every_minutes=settings.every_minutes,
            log=self._log,
            emit=self._emit,
            found=state["name"] if own and state else None,
            last_saved=state["step"] if own and state else 0,
            best=best["name"] if own and best else None,
        )
        if state is not None:
            collectives.raise_if_any_failed(collectives.catch(lambda: training.go_on_from(state)))
            found = self._found
            tensors = found.checkpoint.tensors if found and found.checkpoint else {}
            load_weights(strategy, tensors, state["num_updates"])
            if best is not None:
                kept = found.best.tensors if found and found.best else {}
                scored: dict[str, Tensor] = collectives.all_gather(dict(kept.get("scored", {})))[0]
                training.best.recall(best, scored, dict(kept.get("weights", {})))
            # As large as the model's trained part, three times over.
            self._found = None
        return self._saver

    def finish(self, num_steps: int) -> None:
        """The run has left its results."""
        if self._status is not None:
            self._status.step = num_steps
            self._status.try_to_write("finished", "it has trained all its epochs")

    def _last_words(self, state: str, reason: str) -> None:
        """What is left to say when the process is about to be ended from outside of its main thread."""
        with self._beginning:
            self._is_over = True
            claim, status = self._claim, self._status
            if claim is None or status is None:
                return
            if not self._has_begun:
                claim.keep()
                status.directory = claim.directory
            if state == "preempted":
                print(self._stop(reason), file=sys.stderr, flush=True)
            else:
                self._end("failed", reason)

    def _stop(self, reason: str) -> str:
        """Leave the status of a run that was asked to stop; what the user is told."""
        self._end("preempted", reason)
        step = self._status.step if self._status is not None else 0
        where = f"at step {step}, which is saved" if step else "before anything was to be saved"
        return (
            f"stopped ({reason}) {where}. The same command goes on from there"
            + (f", with --run.name {self.directory.name}" if self._config.run.name is None else "")
            + "."
        )

    def _end(self, state: State, reason: str) -> None:
        if self._status is not None:
            if self._saver is not None:
                self._status.step = self._saver.last_saved
            self._status.try_to_write(state, reason)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            # Raised on all ranks together, so that they can be asked.
            reasons = [reason for reason in collectives.all_gather(self._preemption.asked) if reason is not None]
            error.args = (self._stop(reasons[0] if reasons else "as asked"),)
        elif self._has_begun and error is not None and not isinstance(error, Done):
            self._end("failed", str(error).split("\n")[0] or type(error).__name__)
        if self._claim is not None:
            self._claim.__exit__(kind, error, trace)
