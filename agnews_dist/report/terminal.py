"""Console on a terminal: panels and tables, and below them a live display that is erased at the end."""

import sys
from collections.abc import Callable

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agnews_dist import events
from agnews_dist.errors import shorten
from agnews_dist.report.formatting import (
    describe_event,
    describe_selection,
    escape_text,
    format_duration,
    format_ratio,
    lay_out_facts,
    name_evaluation,
    sum_parameters,
)
from agnews_dist.report.progress import StepProgress, TaskProgress

SECONDS_BETWEEN_REFRESHES = 0.1
MIN_TABLE_WIDTH = 80
"""Columns of a terminal below which the findings about the data are a list."""
MIN_LINE_SECONDS = 2.0
"""Shorter tasks and checkpoints print no line."""


class TerminalDisplay:
    """Sink that draws on a terminal through rich.

    All output is `Text`, because rich interprets markup such as `[red]` in strings.
    """

    def __init__(self, out: rich.console.Console, *, every_step: bool, clock: Callable[[], float]) -> None:
        self._out, self._every_step, self._clock = out, every_step, clock
        self._steps = StepProgress(0, clock)
        self._is_training = False
        self._tasks: dict[str, TaskProgress] = {}
        self._live: Live | None = None
        self._refreshed = 0.0

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.StepDone():
                self._show_step(event)
            case events.Progress():
                self._show_progress(event)
            case events.RunStarted():
                self.close()
                self._steps = StepProgress(event.num_steps, self._clock)
                self._print(self._build_header(event))
            case events.EvalDone() | events.Predicted():
                # A task of unknown total never reports its end.
                self._tasks.clear()
                if not self._is_training:
                    self.close()
                is_scored = isinstance(event, events.EvalDone)
                self._print(self._build_evaluation(event) if is_scored else self._escape(describe_event(event), "bold"))
            case events.Warned() | events.NonFinite():
                self._print(self._escape(describe_event(event), "yellow"))
            case events.DataChecked():
                self._print(self._build_findings(event))
            case events.Resumed() | events.StoppedEarly():
                self._print(self._escape(describe_event(event)))
            case events.CheckpointSaved():
                if self._every_step or event.seconds >= MIN_LINE_SECONDS:
                    self._print(self._escape(describe_event(event), "dim"))
            case events.Profiled():
                self._print(self._escape(f"profile written to {event.path}", "bold"))
                # Lines of a table that is too wide are cut, not folded.
                self._print(self._escape(event.top_operators.strip("\n")), no_wrap=True)
            case events.OverfitChecked():
                self._print(self._escape(describe_event(event), "green" if event.accuracy == 1 else "yellow"))
            case events.RunDone():
                self.close()
                self._print_summary(event)

    def close(self) -> None:
        """Erase the live display and restore redirected output. Further calls do nothing."""
        live, self._live = self._live, None
        self._is_training = False
        self._tasks.clear()
        if live is not None:
            live.stop()

    def _escape(self, text: str, style: str = "") -> Text:
        return Text(escape_text(text, self._out.encoding), style=style, overflow="fold")

    def _print(self, renderable: RenderableType, *, no_wrap: bool = False) -> None:
        self._out.print(renderable, highlight=False, no_wrap=no_wrap, crop=no_wrap)

    def _build_header(self, event: events.RunStarted) -> Panel:
        parts: list[RenderableType] = [lay_out_facts(event.facts, self._out.encoding)]
        if event.parameters:
            trainable, frozen = sum_parameters(event.parameters)
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_footer=True, header_style="dim")
            table.add_column(Text("parameters"), Text("total"), overflow="fold")
            table.add_column(Text("trainable"), Text(f"{trainable:,}", style="green"), justify="right", overflow="fold")
            table.add_column(Text("frozen"), Text(f"{frozen:,}"), justify="right", overflow="fold")
            for part, (trained, fixed) in event.parameters.items():
                table.add_row(
                    self._escape(part),
                    Text(f"{trained:,}" if trained else "-", style="green" if trained else "dim"),
                    Text(f"{fixed:,}" if fixed else "-", style="" if fixed else "dim"),
                )
            parts += [Text(), table]
        return Panel(Group(*parts), title="agnews_dist", title_align="left", border_style="cyan")

    def _build_findings(self, event: events.DataChecked) -> RenderableType:
        title = self._escape("warnings about the data", "yellow")
        if self._out.width < MIN_TABLE_WIDTH:
            return Group(title, *(self._escape(f"- {finding}") for finding in event.findings), Text())
        table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
        for name, ratio in (("found", 3), ("where", 3), ("why it matters", 2), ("what to do", 2)):
            table.add_column(Text(name), ratio=ratio, overflow="fold")
        for finding in event.findings:
            cells = (finding.what, finding.where, finding.why, finding.fix)
            table.add_row(*map(self._escape, cells))
        return Group(title, table, Text())

    def _build_evaluation(self, event: events.EvalDone) -> RenderableType:
        scores, title = event.scores, Text(overflow="fold")
        title.append(self._escape(name_evaluation(event), "bold"))
        title.append(f"  accuracy {scores.accuracy:.4f}", style="bold green")
        title.append(f"  macro F1 {scores.macro_f1:.4f}  loss {scores.loss:.4f}")
        title.append(f"  {format_duration(event.seconds)}", style="dim")
        if selection := describe_selection(event):
            title.append(f"\n  {selection}", style="dim")
        table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
        table.add_column(Text("class"), overflow="fold")
        for name in ("examples", "precision", "recall", "F1"):
            table.add_column(Text(name), justify="right", overflow="fold")
        for each in event.classes:
            ratios = map(format_ratio, (each.precision, each.recall, each.f1))
            table.add_row(self._escape(shorten(each.name, 40)), Text(f"{each.num_examples:,}"), *map(Text, ratios))
        return Group(title, table, Text())

    def _print_summary(self, event: events.RunDone) -> None:
        parts: list[RenderableType] = [lay_out_facts(event.facts, self._out.encoding)]
        longest = max((len(label) + len(path) for label, path in event.paths.items()), default=0)
        fits_panel = longest + 16 <= self._out.width
        if fits_panel and event.paths:
            parts += [Text(), lay_out_facts(event.paths, self._out.encoding)]
        self._print(Panel(Group(*parts), title="done", title_align="left", border_style="green"))
        if not fits_panel:
            # Outside the frame a long path stays one line that can be copied.
            for label, path in event.paths.items():
                self._out.print(self._escape(f"{label}  {path}"), soft_wrap=True, highlight=False)

    def _show_step(self, event: events.StepDone) -> None:
        self._steps.add(event)
        self._is_training = True
        self._tasks.clear()
        if self._every_step:
            self._print(Text("  ".join([self._steps.format_step(), *self._steps.format_figures(exact=True)]), overflow="fold"))
        self._refresh(now=self._steps.is_complete)

    def _show_progress(self, event: events.Progress) -> None:
        task = self._tasks.setdefault(event.task, TaskProgress(event, self._clock))
        task.add(event)
        if not task.is_complete:
            self._refresh()
            return
        del self._tasks[event.task]
        if not self._tasks and not self._is_training:
            self.close()
        else:
            self._refresh(now=True)
        if task.elapsed >= MIN_LINE_SECONDS:
            self._print(self._escape(task.format_line(), "dim"))

    def _refresh(self, *, now: bool = False) -> None:
        """Redraw the live display. `now`: even if it was redrawn less than 0.1 s ago."""
        if self._live is None:
            self._live = Live(
                get_renderable=self._build_live_lines,
                console=self._out,
                # A refresh thread would compete with the training for the interpreter.
                auto_refresh=False,
                transient=True,
                # Other output is printed above the display. A piped stream is data and stays as it is.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            # rich hides the cursor until stop(), which a process killed by a signal never calls.
            self._out.show_cursor(True)
            now = True
        time_now = self._clock()
        is_read = getattr(self._out.file, "is_read", True)
        if is_read and (now or time_now - self._refreshed >= SECONDS_BETWEEN_REFRESHES):
            self._refreshed = time_now
            self._live.refresh()

    def _build_live_lines(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._is_training:
            steps = self._steps
            lines.append(self._build_bar(steps.format_step(), steps.last.step, steps.num_steps, steps.format_eta()))
            lines.append(Text("  ".join(steps.format_figures()), style="dim", overflow="fold"))
        for name, task in self._tasks.items():
            done, total = task.last.done, task.last.total
            if task.last.unit:
                lines.append(self._build_bar(name, done, total, task.format_eta()))
                lines.append(self._escape("  ".join(filter(None, [task.format_count(), task.format_rate()])), "dim"))
            else:
                eta = f"ETA {format_duration(task.elapsed / done * (total - done))}" if done and total > 0 else None
                lines.append(self._build_bar(f"{name} {task.format_count()}", done, total, eta))
        return Group(*lines)

    def _build_bar(self, label: str, done: int, total: int, eta: str | None) -> Table:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(overflow="fold")
        cells: list[RenderableType] = [self._escape(label)]
        if total > 0:
            line.add_column(ratio=1)
            line.add_column(no_wrap=True)
            cells += [ProgressBar(total=total, completed=done), Text(f"{done / total:4.0%}")]
        if eta:
            line.add_column(no_wrap=True)
            cells.append(Text(eta))
        line.add_row(*cells)
        return line
