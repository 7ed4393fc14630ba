"""Console for files and pipes: lines with the time of day, no colours, few enough to read in a job's log."""

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TextIO

from agnews_dist import events
from agnews_dist.errors import shorten
from agnews_dist.report.formatting import describe_event, describe_selection, escape_text, format_ratio, sum_parameters
from agnews_dist.report.progress import StepProgress, TaskProgress


class PlainLines:
    """Sink that writes lines with the time of day to `file`.

    Steps and checkpoints: the first, the last, and one every `seconds_between_lines`; with `every_step` all of them.
    Long tasks: a line after that many seconds, after twice, four times ... as many, and one at the end. So an hour of work
    takes ten lines.
    """

    def __init__(
        self, file: TextIO, *, every_step: bool = False, seconds_between_lines: float = 10.0, clock: Callable[[], float]
    ) -> None:
        self._file, self._every_step, self._interval, self._clock = file, every_step, seconds_between_lines, clock
        self._steps = StepProgress(0, clock)
        self._last_line: float | None = None
        self._last_saved = -math.inf
        self._tasks: dict[str, TaskProgress] = {}
        self._next_lines: dict[str, float] = {}
        """Task -> seconds after its start when the next line is due."""

    def __call__(self, event: events.Event) -> None:
        """Write the event's lines if they are due."""
        match event:
            case events.StepDone():
                self._print_step(event)
            case events.Progress():
                self._print_progress(event)
            case events.RunStarted():
                self._steps = StepProgress(event.num_steps, self._clock)
                self._last_line = None
                self._print_header(event)
            case events.EvalDone():
                self._print_evaluation(event)
            case (
                events.Warned()
                | events.NonFinite()
                | events.Resumed()
                | events.StoppedEarly()
                | events.OverfitChecked()
                | events.Predicted()
            ):
                self._print(describe_event(event))
            case events.DataChecked():
                for finding in event.findings:
                    self._print(f"warning: {finding}")
            case events.CheckpointSaved():
                self._print_checkpoint(event)
            case events.Profiled():
                self._print(f"profile written to {event.path}\n{event.top_operators.strip()}")
            case events.RunDone():
                self._print("done")
                self._print_rows(event.facts)
                self._print_rows(event.paths)

    def close(self) -> None:
        """Do nothing: the file belongs to the caller."""

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
        self._print_rows(event.facts)
        if event.parameters:
            trainable, frozen = sum_parameters(event.parameters)
            self._print(f"parameters: {trainable:,} trainable, {frozen:,} frozen")
            self._print_rows({part: f"{trained:>13,} {fixed:>13,}" for part, (trained, fixed) in event.parameters.items()})

    def _print_step(self, event: events.StepDone) -> None:
        self._steps.add(event)
        now = self._clock()
        due = self._last_line is None or self._steps.is_complete or now - self._last_line >= self._interval
        if due or self._every_step:
            self._last_line = now
            figures = self._steps.format_figures(exact=self._every_step)
            self._print("  ".join(filter(None, [self._steps.format_step(), *figures, self._steps.format_eta()])))

    def _print_checkpoint(self, event: events.CheckpointSaved) -> None:
        now = self._clock()
        if self._every_step or now - self._last_saved >= self._interval:
            self._last_saved = now
            self._print(describe_event(event))

    def _print_progress(self, event: events.Progress) -> None:
        task = self._tasks.setdefault(event.task, TaskProgress(event, self._clock))
        task.add(event)
        if task.is_complete:
            del self._tasks[event.task]
            self._next_lines.pop(event.task, None)
            self._print(task.format_line())
        elif task.elapsed >= self._next_lines.get(event.task, self._interval):
            self._next_lines[event.task] = 2 * task.elapsed
            self._print(task.format_line())

    def _print_evaluation(self, event: events.EvalDone) -> None:
        ratios = [(shorten(each.name, 40), format_ratio(each.precision), format_ratio(each.recall)) for each in event.classes]
        classes = ", ".join(f"{name} {precision}/{recall}" for name, precision, recall in ratios)
        selection = describe_selection(event)
        self._print(f"{describe_event(event)}; precision/recall{f' ({selection})' if selection else ''}: {classes}")
