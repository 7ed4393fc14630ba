"""Progress of long tasks and phases, on rich's own progress classes: bars, rates, time left."""

import math
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from agnews_dist.errors import shorten
from agnews_dist.events import Progress
from agnews_dist.report.formatting import escape_text, format_duration

SILENT_SECONDS = 4.0
"""Time without output after which a task is shown. The console looks once a second, so nothing is silent for more than 5 s."""
BURST_SECONDS = 0.1
"""Time after the first report of a task in which work counts as done before."""


class RunningTasks(rich.progress.Progress):
    """The tasks that run now, by name; rich computes rate and time left, and draws a bar for each.

    Work that was already done at the first report, or is reported in a burst right after it, does not count for the rate.
    """

    def __init__(self, out: rich.console.Console, clock: Callable[[], float]) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(None),
            TaskProgressColumn(),
            # Only the bar gets narrower with the terminal.
            CountColumn(Column(no_wrap=True)),
            RateColumn(Column(no_wrap=True)),
            EtaColumn(compact=True, table_column=Column(no_wrap=True)),
            console=out,
            auto_refresh=False,
            expand=True,
            get_time=clock,
            # Some tasks report every few minutes.
            speed_estimate_period=math.inf,
        )
        self._ids: dict[str, TaskID] = {}

    def report(self, event: Progress) -> Task:
        """Note an event of a task, and end every phase of another name. The task is no longer kept if it is complete."""
        for name, number in list(self._ids.items()):
            if name != event.task and is_phase(self._tasks[number]):
                self.end(name)
        if event.task not in self._ids:
            text = escape_text(shorten(event.task, 40), self.console.encoding)
            fields: dict[str, Any] = {"name": event.task, "unit": event.unit, "begun": self.get_time()}
            self._ids[event.task] = number = self.add_task(text, total=event.total or None, **fields)
            self._restart(number, event)
        number = self._ids[event.task]
        task = self._tasks[number]
        if self.get_time() - task.fields["begun"] < BURST_SECONDS:
            self._restart(number, event)
        else:
            self.update(number, completed=event.done)
        if is_complete(task):
            self.end(event.task)
        return task

    def _restart(self, number: TaskID, event: Progress) -> None:
        """Count rate and time of a task from here."""
        self.reset(number, total=event.total or None, completed=event.done)
        # A sample of no work: rich computes the rate from the time of the first one.
        self.advance(number, 0)

    def end(self, name: str) -> None:
        """Remove a task, if it is known."""
        if name in self._ids:
            self.remove_task(self._ids.pop(name))

    def end_all(self, *, but: str = "") -> None:
        """Remove all tasks but one: those of unknown total never report their end."""
        for name in [name for name in self._ids if name != but]:
            self.end(name)


class CountColumn(ProgressColumn):
    """The work done, `1,000/6,000`, or the seconds of a phase."""

    def render(self, task: Task) -> Text:
        return Text(format_duration(task.elapsed or 0.0) if is_phase(task) else format_count(task))


class RateColumn(ProgressColumn):
    """The rate, `12,345 tokens/s`, or only the unit while the rate is unknown."""

    def render(self, task: Task) -> Text:
        return Text(format_rate(task) or task.fields["unit"])


class EtaColumn(TimeRemainingColumn):
    """The time left, if it is known."""

    def render(self, task: Task) -> Text:
        return (
            Text.assemble("ETA ", super().render(task)) if task.time_remaining is not None and not is_complete(task) else Text()
        )


def is_phase(task: Task) -> bool:
    """Return whether a task has no count: it ends when another one begins."""
    return task.total is None and not task.completed


def is_complete(task: Task) -> bool:
    """Return whether all work is done; always False if the total is unknown."""
    return task.total is not None and task.completed >= task.total


def format_count(task: Task) -> str:
    """Format `1,000/6,000`."""
    return f"{int(task.completed):,}" + ("" if task.total is None else f"/{int(task.total):,}")


def format_rate(task: Task) -> str | None:
    """Format `12,345 tokens/s`; None if it is unknown or the task has no unit."""
    rate, unit = task.speed, task.fields["unit"]
    return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s" if rate and unit else None


def format_task(task: Task) -> str:
    """Format `tokenize: 1,000/6,000 (17%) after 10.0 s`, or at the end `tokenize: 6,000 done in 1:00`."""
    name, unit, elapsed = task.fields["name"], task.fields["unit"], format_duration(task.elapsed or 0.0)
    if is_phase(task):
        return f"{name}: {elapsed} so far"
    if is_complete(task):
        state, eta = f"{f'{int(task.completed):,} {unit}'.rstrip()} done in {elapsed}", None
    else:
        percent = "" if task.total is None else f" ({task.percentage:.0f}%)"
        state = f"{f'{format_count(task)} {unit}'.rstrip()}{percent} after {elapsed}"
        eta = f"ETA {format_duration(task.time_remaining)}" if unit and task.time_remaining is not None else None
    return ", ".join(filter(None, [f"{name}: {state}", format_rate(task), eta]))
