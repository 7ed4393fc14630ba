"""The console on a terminal: panels and tables that stay, and below them a live display that leaves nothing behind."""

import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import rich.console
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agnews_dist.evaluation.metrics import per_class
from agnews_dist.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    NonFinite,
    OverfitChecked,
    Profiled,
    Progress,
    Resumed,
    RunDone,
    RunStarted,
    StepDone,
    Warned,
)
from agnews_dist.report.formatting import duration, happened, share, visible, when
from agnews_dist.report.progress import StepProgress, TaskProgress

SECONDS_BETWEEN_REFRESHES = 0.1
SECONDS_WORTH_A_LINE = 2.0
"""Finished work that took less leaves no line."""


class TerminalDisplay:
    """Sink that draws on a terminal through rich.

    Everything shown is a `Text`, never a string that rich would read as markup: `[red]` in a row is printed as it is.
    """

    def __init__(
        self, out: rich.console.Console, *, every_step: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out
        self._every_step = every_step
        self._clock = clock
        self._pace = StepProgress(0, clock)
        self._training = False
        self._tasks: dict[str, TaskProgress] = {}
        self._live: Live | None = None
        self._refreshed = 0.0

    def __call__(self, event: Event) -> None:
        """Show what the event says."""
        match event:
            case StepDone():
                self._step(event)
            case Progress():
                self._progress(event)
            case RunStarted():
                self.close()
                self._pace = StepProgress(event.num_steps, self._clock)
                self._print(self._header(event))
            case EvalDone():
                self._drop_open_tasks()
                self._print(self._evaluation(event))
            case Warned():
                self._print(self._text(f"warning: {event.message}", "yellow"))
            case NonFinite():
                self._print(self._text(happened(event), "yellow"))
            case Resumed():
                self._print(self._text(happened(event)))
            case CheckpointSaved():
                if self._every_step or event.seconds >= SECONDS_WORTH_A_LINE:
                    self._print(self._text(happened(event), "dim"))
            case Profiled():
                self._print(self._text(f"profile written to {event.path}", "bold"))
                # A table wider than the terminal is cut by the terminal, not folded into a puzzle.
                self._print(self._text(event.top_operators.strip("\n")), no_wrap=True)
            case OverfitChecked():
                self._print(
                    self._text(
                        f"overfit check: {event.num_examples} examples, {event.num_steps} steps: loss "
                        f"{event.first_loss:.4f} -> {event.last_loss:.4f}, accuracy {event.accuracy:.3f}",
                        "green" if event.accuracy == 1 else "yellow",
                    )
                )
            case RunDone():
                self.close()
                self._done(event)

    def close(self) -> None:
        """Erase the live display and undo what it changed (redirected output); further calls do nothing."""
        live, self._live = self._live, None
        self._training = False
        self._tasks.clear()
        if live is not None:
            live.stop()

    def _text(self, text: str, style: str = "") -> Text:
        return Text(visible(text, self._out.encoding), style=style, overflow="fold")

    def _print(self, renderable: RenderableType, *, no_wrap: bool = False) -> None:
        self._out.print(renderable, highlight=False, no_wrap=no_wrap, crop=no_wrap)

    def _rows(self, facts: Mapping[str, str]) -> Table:
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", overflow="fold")
        rows.add_column(overflow="fold")
        for label, value in facts.items():
            rows.add_row(self._text(label), self._text(value))
        return rows

    def _header(self, event: RunStarted) -> Panel:
        parts: list[RenderableType] = [self._rows(event.facts)]
        if event.parameters:
            trainable, frozen = (sum(counts) for counts in zip(*event.parameters.values(), strict=True))
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_footer=True, header_style="dim")
            table.add_column(Text("parameters"), Text("total"), overflow="fold")
            table.add_column(Text("trainable"), Text(f"{trainable:,}", style="green"), justify="right", overflow="fold")
            table.add_column(Text("frozen"), Text(f"{frozen:,}"), justify="right", overflow="fold")
            for part, (train, still) in event.parameters.items():
                table.add_row(
                    self._text(part),
                    Text(f"{train:,}" if train else "-", style="green" if train else "dim"),
                    Text(f"{still:,}" if still else "-", style="" if still else "dim"),
                )
            parts += [Text(), table]
        return Panel(Group(*parts), title="agnews_dist", title_align="left", border_style="cyan", box=box.ROUNDED)

    def _evaluation(self, event: EvalDone) -> RenderableType:
        title = Text(overflow="fold")
        title.append(self._text(when(event.split, event.epoch), "bold"))
        title.append(f"  accuracy {event.accuracy:.4f}", style="bold green")
        title.append(f"  macro F1 {event.macro_f1:.4f}  loss {event.loss:.4f}")
        title.append(f"  {duration(event.seconds)}", style="dim")
        table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
        table.add_column(Text("class"), overflow="fold")
        for name in ("examples", "precision", "recall", "F1"):
            table.add_column(Text(name), justify="right", overflow="fold")
        for name, scores in zip(event.class_names, per_class(np.asarray(event.confusion)), strict=True):
            figures = [f"{scores.num_examples:,}", share(scores.precision), share(scores.recall), share(scores.f1)]
            table.add_row(self._text(name), *map(Text, figures))
        return Group(title, table, Text())

    def _done(self, event: RunDone) -> None:
        facts, paths = self._rows(event.facts), self._rows(event.paths)
        longest = max((len(label) + len(path) for label, path in event.paths.items()), default=0)
        boxed = longest + 16 <= self._out.width
        self._print(
            Panel(
                Group(facts, *([Text(), paths] if boxed and event.paths else [])),
                title="done",
                title_align="left",
                border_style="green",
                box=box.ROUNDED,
            )
        )
        if not boxed:
            # A long path stays one line that can be copied, which a frame would break.
            for label, path in event.paths.items():
                self._out.print(self._text(f"{label}  {path}"), soft_wrap=True, highlight=False)

    def _drop_open_tasks(self) -> None:
        """Work of unknown total never says that it ended: what comes after it does."""
        self._tasks.clear()
        if not self._training:
            self.close()

    def _step(self, event: StepDone) -> None:
        self._pace.add(event)
        self._training = True
        self._tasks.clear()
        if self._every_step:
            self._print(Text("  ".join([self._pace.step_words(), *self._pace.words(exact=True)]), overflow="fold"))
        self._refresh(now=self._pace.is_complete)

    def _progress(self, event: Progress) -> None:
        task = self._tasks.setdefault(event.task, TaskProgress(event, self._clock))
        task.add(event)
        if not task.is_complete:
            self._refresh()
            return
        del self._tasks[event.task]
        if not self._tasks and not self._training:
            self.close()
        else:
            self._refresh(now=True)
        if task.elapsed >= SECONDS_WORTH_A_LINE:
            self._print(self._text(task.line(), "dim"))

    def _refresh(self, *, now: bool = False) -> None:
        """Redraw the live display, at most ten times per second unless `now`."""
        if self._live is None:
            self._live = Live(
                get_renderable=self._picture,
                console=self._out,
                # Redrawn by events only: a thread would compete with the training for the interpreter.
                auto_refresh=False,
                transient=True,
                # What others print goes above the display; but a piped stream is data, which must not end up here.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            # rich hides the cursor until stop(); a process ended by a signal would leave the user without one.
            self._out.show_cursor(True)
            now = True
        time_now = self._clock()
        if now or time_now - self._refreshed >= SECONDS_BETWEEN_REFRESHES:
            self._refreshed = time_now
            self._live.refresh()

    def _picture(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._training:
            lines.append(
                self._bar(self._pace.step_words(), self._pace.last.step, self._pace.num_steps, self._pace.eta_words())
            )
            lines.append(Text("  ".join(self._pace.words()), style="dim", overflow="fold"))
        for name, task in self._tasks.items():
            done, total = task.last.done, task.last.total
            if task.last.unit:
                lines.append(self._bar(name, done, total, task.eta_words()))
                figures = "  ".join(filter(None, [task.count_words(), task.rate_words()]))
                lines.append(self._text(figures, "dim"))
            else:
                eta = f"ETA {duration(task.elapsed / done * (total - done))}" if done and total > 0 else None
                lines.append(self._bar(f"{name} {task.count_words()}", done, total, eta))
        return Group(*lines)

    def _bar(self, label: str, done: int, total: int, eta: str | None) -> Table:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(overflow="fold")
        cells: list[RenderableType] = [self._text(label)]
        if total > 0:
            line.add_column(ratio=1)
            line.add_column(no_wrap=True)
            cells += [ProgressBar(total=total, completed=done), Text(f"{done / total:4.0%}")]
        if eta:
            line.add_column(no_wrap=True)
            cells.append(Text(eta))
        line.add_row(*cells)
        return line
