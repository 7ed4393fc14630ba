"""One start of a run: claim its directory, find the checkpoint to resume from, keep its log, record how it ended.

A run that is preempted or killed takes several attempts; each resumes from the last checkpoint of the one before. Rank 0 does
the work, the other ranks get the results.
"""

import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

from agnews_dist.config.schema import Config
from agnews_dist.config.yaml_file import dump
from agnews_dist.distributed import collectives
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.slurm import identify_job, is_restarted
from agnews_dist.engine.device import used_bytes
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import AlreadyFinished, Stopped, UserError
from agnews_dist.events import Emit, Event, Resumed, Warned, begin_phase
from agnews_dist.features.placement import RequestedPlace
from agnews_dist.report import trainer_status
from agnews_dist.report.console import Console, Observer, Sinks, create_console
from agnews_dist.report.event_log import LOG_FILE, EventLog
from agnews_dist.report.result_files import versions
from agnews_dist.report.trackers.tracker_sink import Trackers, check_installed
from agnews_dist.run.directory import LOCK_SECONDS, RunDirectory, is_in_use, new_names
from agnews_dist.run.fingerprints import setting_values, weight_settings
from agnews_dist.run.resume import FOLDER, ResumePoint, check_fingerprints, find_resume_point, settings_after_restart
from agnews_dist.run.status import State, StatusFile, runs_of_job
from agnews_dist.storage.atomic import discard
from agnews_dist.training.checkpoint import UnreadableError, list_checkpoints
from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings, OnDisk
from agnews_dist.training.loop import Monitors, Trainer
from agnews_dist.training.timing import StageTimer


class Attempt:
    """The lifecycle of one start, as a context manager.

    `claim()` before anything is loaded, `begin()` when all is loaded, `open_checkpoints()` before the first step,
    `finish()` after the results are written.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        preemption: PreemptionHandler,
        *,
        accept: Collection[str],
        timer: StageTimer,
        console: Console | None = None,
        sinks: Sequence[Emit] = (),
    ) -> None:
        """Prepare a start.

        Args:
            config: the settings.
            engine: of this rank.
            preemption: handler of stops.
            accept: settings that may differ from the checkpoint's.
            timer: of the run.
            console: sink for people; None: a new one.
            sinks: see `Observer`.
        """
        self._console, self._observers = console, sinks
        self._config, self._engine, self._preemption, self._accept = config, engine, preemption, accept
        self._settings = {**weight_settings(config), "engine.precision": engine.precision}
        self._sinks = Sinks()
        self.monitors = Monitors(self._sinks, timer, preemption)
        self._stack = ExitStack()
        self._directory: RunDirectory | None = None
        self._resume_point: ResumePoint | None = None
        self._status: StatusFile | None = None
        self._log: EventLog | None = None
        self._checkpoints: CheckpointManager | None = None
        self._has_begun = False
        self._begin_lock = threading.Lock()
        """Held while the main thread begins the run or records its end, and while the preemption thread ends it."""
        self._is_ended_early = self._is_finished = False
        self._resume_state: dict[str, Any] | None = None
        """JSON part of the checkpoint to resume from, on every rank."""
        self._on_disk: OnDisk | None = None
        """The checkpoint to resume from, as a `CheckpointManager` takes it, on rank 0."""

    @property
    def directory(self) -> Path:
        """The run's directory. Only rank 0, which alone writes there, knows its name."""
        return self._directory.locate() if self._directory is not None else Path(self._config.run.dir)

    def claim(self) -> None:
        """Lock the run's name, find the checkpoint to resume from, and check that the directory can be written. Collective.

        Raises:
            SharedError: the run is finished or in use, its results would be lost, or these settings cannot continue it.
        """
        # First and on its own: no rank may tokenise anything for a run that is refused.
        self._sinks(begin_phase("claim the run and read its checkpoint"))
        outcome = collectives.catch(self._claim)
        collectives.wait_for_main("claims the run's directory and reads its checkpoint")
        collectives.raise_if_any_failed(outcome)

    def _claim(self) -> None:
        if not self._engine.world.is_main:
            return
        check_installed(self._config.report.trackers or ())
        run, job = self._config.run, identify_job(os.environ)
        runs, resume, is_later = Path(run.dir), self._config.checkpoint.resume, is_restarted(os.environ)
        if (name := run.name) is None and (is_later or resume == "auto"):
            name = self._find_unfinished_run(runs, job, is_later=is_later)
        self._directory = directory = self._take_directory(runs, name)
        directory.refuse_sweep()
        if is_later:
            resume, directory.overwrite = settings_after_restart(directory.directory, job, resume, overwrite=run.overwrite)
        point = find_resume_point(
            directory.directory, resume=resume, overwrite=directory.overwrite, settings=self._settings, accept=self._accept
        )
        if point is None or not point.is_own:
            directory.create()
            self._log = EventLog(directory.staging / LOG_FILE)
            self._sinks.add(self._log)
        self._resume_point = point
        self._status = StatusFile(
            directory.locate, attempt=point.attempt if point else 1, step=point.step if point else 0, job=job
        )
        self._preemption.before_exit = self._end_from_other_thread
        for warning in point.warnings if point else ():
            self._warn(warning)

    def _take_directory(self, runs: Path, name: str | None) -> RunDirectory:
        """Return the directory of this name, locked; without a name, one that no other start has."""
        build = partial(RunDirectory, runs, overwrite=self._config.run.overwrite, config_yaml=dump(self._config))
        if name is None:
            names = new_names(self._config.model.name, datetime.now())
            return next(directory for directory in map(build, names) if directory.reserve())
        directory = build(name)
        # The other ranks wait for this one, at most for the engine's timeout.
        directory.lock(min(LOCK_SECONDS, self._config.engine.timeout_seconds / 2), self._warn)
        return directory

    def _warn(self, message: str) -> None:
        self._sinks(Warned(message=message))

    def _find_unfinished_run(self, runs: Path, job: str | None, *, is_later: bool) -> str | None:
        """Return the name of the run that an earlier start of this job began without a `run.name`, if the settings match.

        A first start leaves alone what another one of the same job trains now.
        """
        for name in runs_of_job(runs, job):
            if not is_later and is_in_use(runs, name):
                continue
            try:
                find_resume_point(runs / name, resume="auto", overwrite=False, settings=self._settings, accept=self._accept)
            except UnreadableError:
                raise  # it may be this very training
            except UserError:
                continue  # a different training of the same job
            return name
        return None

    @property
    def has_checked_export(self) -> bool:
        """True on rank 0 if an earlier start of this run, with the same libraries, has checked what the run will export."""
        checkpoint = self._resume_point.checkpoint if self._resume_point is not None and self._resume_point.is_own else None
        return checkpoint is not None and checkpoint.state.get("versions") == versions()

    def begin(self, fingerprints: Mapping[str, str]) -> None:
        """Begin the run: everything is loaded and fits. From here on the run exists under its name. Collective.

        Raises:
            SharedError: ranks differ, the checkpoint belongs to other data or weights, or the directory cannot be written.
        """
        collectives.check_equal(fingerprints)
        is_main = self._engine.world.is_main
        outcome = collectives.catch(partial(self._begin, fingerprints)) if is_main else None
        collectives.wait_for_main("begins the run in its directory")
        collectives.raise_if_any_failed(outcome)
        self._has_begun = True
        self._resume_state = collectives.all_gather(self._resume_state)[0]

    def _begin(self, fingerprints: Mapping[str, str]) -> None:
        with self._begin_lock:
            if self._is_ended_early:
                return
            directory, status, point = self._directory, self._status, self._resume_point
            assert directory is not None
            assert status is not None
            checkpoint = point.checkpoint if point else None
            self._on_disk = point.on_disk if point else None
            if checkpoint is not None:
                check_fingerprints(checkpoint, fingerprints)
            if point is None or not point.is_own:
                # Before the rename: a run killed right after it must be recognised as begun.
                status.write("running", "it began")
                directory.commit()
            else:
                directory.commit()
                keep_bytes = checkpoint.state["log_bytes"] if checkpoint else 0
                self._log = EventLog(directory.directory / LOG_FILE, keep_bytes=keep_bytes)
                self._sinks.add(self._log)
                status.write("running", "it resumed")
                self._remove_later_checkpoints(status.step)
            if self._log is not None:
                self._log.path = directory.directory / LOG_FILE
                self._log.is_in_place = lambda: directory.is_in_place
                self._sinks.add(_MoveWatch(directory, self._log, self._warn))
                if trackers := self._config.report.trackers:
                    settings = setting_values(self._config)
                    self._sinks.add(Trackers(trackers, directory.directory, settings, self._log, self._sinks))
            if checkpoint is not None:
                self._resume_state = checkpoint.state
                self._sinks(Resumed(path=str(checkpoint.path), step=status.step, attempt=status.attempt))

    def _remove_later_checkpoints(self, step: int) -> None:
        """Remove checkpoints newer than the one resumed from: the next start would take them for the newest."""
        assert self._directory is not None
        folder = self._directory.directory / FOLDER
        chosen = self._on_disk.name if self._on_disk else None
        later = list(takewhile(lambda path: path.name != chosen, list_checkpoints(folder)))
        discard(later)
        for path in later:
            self._warn(f"{path} is removed: the run resumes from step {step}, before it.")

    def requested_place(self) -> RequestedPlace:
        """Return where features are to be kept; under `auto`, where the checkpoint's run kept them.

        Another place adds up the same sums in another order, which changes the last bits.
        """
        wanted, state = self._config.engine.feature_cache, self._resume_state
        if wanted == "auto" and state and state["num_ranks"] == self._engine.world.num_ranks:
            return state["features"]
        return wanted

    def open_checkpoints(self, trainer: Trainer, fingerprints: Mapping[str, str], features: str) -> CheckpointManager:
        """Return the run's checkpoint manager, after `trainer` has loaded the checkpoint to resume from. Collective.

        `features`: where they are kept (see `requested_place`).

        Raises:
            SharedError: the checkpoint's position belongs to another plan.
        """
        settings, point = self._config.checkpoint, self._resume_point
        metadata = {
            "settings": self._settings,
            "fingerprints": dict(fingerprints),
            "precision": self._engine.precision,
            "num_ranks": self._engine.world.num_ranks,
            "features": features,
            "class_names": list(trainer.class_names),
            "versions": versions(),
        }
        self._checkpoints = CheckpointManager(
            lambda: self.directory / FOLDER,
            trainer.strategy,
            CheckpointSettings(**settings.model_dump(exclude={"resume"})),
            metadata=metadata,
            log=self._log,
            emit=self._sinks,
            on_disk=self._on_disk,
        )
        if self._resume_state is not None:
            trainer.load_state(self._resume_state, *(point.tensors if point else ({}, {})))
        # Free the checkpoint's tensors: weights, and two moments for each.
        self._resume_point = None
        # From here on a requested stop is worth a checkpoint, and the training loop writes it.
        self._preemption.begin_training()
        return self._checkpoints

    def finish(self, num_steps: int, reason: str) -> None:
        """Record that the run is trained and has left its results. `reason`: why the training ended."""
        with self._begin_lock:
            if self._status is not None:
                self._status.step = num_steps
                self._status.try_to_write("finished", reason)
            self._is_finished = True

    def _end_from_other_thread(self, state: str, reason: str) -> None:
        """Record the final state. The preemption thread calls this before it ends the process."""
        with self._begin_lock:
            self._is_ended_early = True
            directory, status = self._directory, self._status
            if directory is None or status is None or self._is_finished:
                return
            if not self._has_begun:
                directory.commit()
            if state == "preempted":
                print(self._record_stop(reason), file=sys.stderr, flush=True)
            else:
                self._record("failed", reason)

    def _record_stop(self, reason: str) -> str:
        """Record that the run was asked to stop; return the message for the user."""
        self._record("preempted", reason)
        step = self._status.step if self._status is not None else 0
        where = f"at step {step}, which is saved" if step else "before its first checkpoint"
        name = f", with --run.name {self.directory.name}" if self._config.run.name is None else ""
        return f"stopped ({reason}) {where}. The same command resumes from there{name}."

    def _report_stop(self) -> None:
        """Write the report of an unfinished run: curves and settings. Texts are for the end."""
        if self._directory is not None and self._has_begun and self._config.report.write:
            from agnews_dist.run import reporting  # late: the imports of a report take a second

            if not reporting.list_missing_packages():
                reporting.try_to_report(self.directory, None, emit=self._sinks)

    def _record(self, state: State, reason: str) -> None:
        # What ends the ranks of a finished run does not undo it.
        if self._status is not None and not self._is_finished:
            if self._checkpoints is not None:
                self._status.step = self._checkpoints.last_saved
            self._status.try_to_write(state, reason)

    def __enter__(self) -> "Attempt":
        self._stack.enter_context(self._sinks)
        if self._engine.world.is_main:
            console = self._console or create_console(every_step=self._config.run.debug)
            console.show_memory(lambda: used_bytes(self._engine.device))
            self._sinks.add(console)
            for function in self._observers:
                self._sinks.add(Observer(function, self._sinks))
            if os.environ.get(trainer_status.URL):
                self._sinks.add(trainer_status.TrainerStatus(os.environ, self._sinks))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if isinstance(error, Stopped):
                # All ranks raise it together, so a collective is safe here.
                reasons = [reason for reason in collectives.all_gather(self._preemption.stop_reason) if reason is not None]
                error.args = (self._record_stop(reasons[0] if reasons else "as requested"),)
                self._report_stop()
            elif self._has_begun and error is not None and not isinstance(error, AlreadyFinished):
                with self._begin_lock:
                    # Ranks that end because of a stop leave errors in the collectives of the others.
                    if not self._is_ended_early:
                        self._record("failed", str(error).split("\n")[0] or type(error).__name__)
            if self._directory is not None:
                self._directory.close()


class _MoveWatch:
    """Sink that warns once of a run's directory that was moved, and raises UserError if it was removed."""

    def __init__(self, directory: RunDirectory, log: EventLog, warn: Callable[[str], None]) -> None:
        self._directory, self._log, self._warn = directory, log, warn

    def __call__(self, event: Event) -> None:  # noqa: ARG002
        """Look where the directory is, if the event log has noticed that it is not in its place."""
        if self._log.has_moved:
            self._log.path, self._log.has_moved = self._directory.locate() / LOG_FILE, False
        if notice := self._directory.take_notice():
            self._warn(notice)

    def close(self) -> None:
        """Do nothing."""
