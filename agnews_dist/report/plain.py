"""Console for files and pipes: lines with the time of day, no colours, few enough to read in a job's log."""

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TextIO

import rich.console
from rich.progress import Task

from agnews_dist import events
from agnews_dist.errors import shorten
from agnews_dist.report.formatting import (
    describe_event,
    describe_selection,
    escape_text,
    format_ratio,
    select_facts,
    sum_parameters,
)
from agnews_dist.report.progress import StepProgress
from agnews_dist.report.running_tasks import SILENT_SECONDS, RunningTasks, format_task, is_complete
from agnews_dist.report.sweep_table import describe_sweep
from agnews_dist.storage.capacity import gigabytes, resident_bytes


class PlainLines:
    """Sink that writes lines with the time of day to `file`.

    Steps and checkpoints: the first, the last, and one every `seconds_between_lines`; with `every_step` all of them.
    Tasks and phases that take longer than 4 s: a line every 4 s, later every tenth of their time, and one at the end of a
    task. So an hour of work takes some sixty lines.
    """

    def __init__(
        self,
        file: TextIO,
        *,
        is_verbose: bool = False,
        every_step: bool = False,
        seconds_between_lines: float = 5.0,
        clock: Callable[[], float],
    ) -> None:
        self._file, self._is_verbose, self._every_step, self._clock = file, is_verbose, every_step, clock
        self._interval = seconds_between_lines
        self.measure_memory = resident_bytes
        self._steps = StepProgress(0, clock)
        self._last_line: float | None = None
        self._last_saved = -math.inf
        # Never drawn: its rates and times are written as lines.
        self._tasks = RunningTasks(rich.console.Console(file=file, force_jupyter=False), clock)

    def __call__(self, event: events.Event) -> None:
        """Write the event's lines if they are due."""
        match event:
            case events.Loading():
                self._print(f"{event.program}: loading {event.what}")
                self._tasks.report(events.begin_phase(f"load {event.what}"))
            case events.StepDone():
                self._print_step(event)
            case events.Progress():
                self._print_progress(event)
            case events.RunStarted():
                self._steps = StepProgress(event.num_steps, self._clock)
                self._last_line = None
                self._tasks.end_all()
                self._print_header(event)
            case events.EvalDone():
                self._tasks.end_all()
                self._print_evaluation(event)
            case (
                events.Warned()
                | events.NonFinite()
                | events.Resumed()
                | events.StoppedEarly()
                | events.OverfitChecked()
                | events.Predicted()
            ):
                if isinstance(event, events.Predicted):
                    self._tasks.end_all()
                self._print(describe_event(event))
            case events.DataChecked():
                for finding in event.findings:
                    self._print(f"warning: {finding}")
            case events.SweepUpdated():
                self._print_sweep(event)
            case events.CheckpointSaved():
                self._print_checkpoint(event)
            case events.Profiled():
                self._print(f"profile written to {event.path}\n{event.top_operators.strip()}")
            case events.RunDone():
                self._tasks.end_all()
                self._print("done")
                self._print_rows(event.facts)
                self._print_rows(event.paths)

    def tick(self) -> None:
        """Write the lines that are due although no event has come."""
        for task in self._tasks.tasks:
            self._print_if_due(task)

    def close(self) -> None:
        """Remove the tasks. The file belongs to the caller."""
        self._tasks.end_all()

    def _print(self, text: str) -> None:
        first, *rest = escape_text(text, self._file.encoding or "utf-8").split("\n")
        lines = [f"{datetime.now():%H:%M:%S} {first}", *(f"         {line}" for line in rest)]
        self._file.write("\n".join(lines) + "\n")
        # A log file is block-buffered: without a flush the last lines before a kill would be lost.
        self._file.flush()

    def _print_rows(self, facts: Mapping[str, str]) -> None:
        width = max(map(len, facts), default=0)
        for label, value in facts.items():
            self._print(f"  {label:<{width}}  {value}")

    def _print_header(self, event: events.RunStarted) -> None:
        self._print(f"run started on {datetime.now():%Y-%m-%d}" + (f", {event.num_steps} steps" if event.num_steps else ""))
        self._print_rows(event.facts if self._is_verbose else select_facts(event.facts))
        if event.parameters and self._is_verbose:
            trainable, frozen = sum_parameters(event.parameters)
            self._print(f"parameters: {trainable:,} trainable, {frozen:,} frozen")
            self._print_rows({part: f"{trained:>13,} {fixed:>13,}" for part, (trained, fixed) in event.parameters.items()})

    def _print_step(self, event: events.StepDone) -> None:
        self._tasks.end_all()
        self._steps.add(event)
        now = self._clock()
        due = self._last_line is None or self._steps.is_complete or now - self._last_line >= self._interval
        if due or self._every_step:
            self._last_line = now
            figures = [*self._steps.format_figures(exact=self._every_step), f"memory {gigabytes(self.measure_memory())}"]
            self._print("  ".join(filter(None, [self._steps.format_step(), *figures, self._steps.format_eta()])))

    def _print_sweep(self, event: events.SweepUpdated) -> None:
        now = self._clock()
        is_last = event.num_done == event.num_members
        if is_last or self._is_verbose or self._last_line is None or now - self._last_line >= self._interval:
            self._last_line = now
            self._print(describe_sweep(event))

    def _print_checkpoint(self, event: events.CheckpointSaved) -> None:
        now = self._clock()
        if self._is_verbose or self._every_step or now - self._last_saved >= self._interval:
            self._last_saved = now
            self._print(describe_event(event))

    def _print_progress(self, event: events.Progress) -> None:
        task = self._tasks.report(event)
        if is_complete(task):
            self._print(format_task(task))
        else:
            self._print_if_due(task)

    def _print_if_due(self, task: Task) -> None:
        """Write a line 4, 8, 16, 32 ... seconds after the start of a task."""
        if (task.elapsed or 0.0) >= task.fields.get("next_line", SILENT_SECONDS):
            elapsed = task.elapsed or 0.0
            task.fields["next_line"] = elapsed + max(SILENT_SECONDS, elapsed / 10)
            self._print(format_task(task))

    def _print_evaluation(self, event: events.EvalDone) -> None:
        if event.epoch and not self._is_verbose:
            self._print(describe_event(event))
            return
        ratios = [(shorten(each.name, 40), format_ratio(each.precision), format_ratio(each.recall)) for each in event.classes]
        classes = ", ".join(f"{name} {precision}/{recall}" for name, precision, recall in ratios)
        selection = describe_selection(event)
        self._print(f"{describe_event(event)}; precision/recall{f' ({selection})' if selection else ''}: {classes}")
