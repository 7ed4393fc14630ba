"""Console on a terminal: panels and tables, and below them a live display that is erased at the end."""

import sys
from collections.abc import Callable, Mapping

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agnews_dist import events
from agnews_dist.errors import shorten
from agnews_dist.report.evaluation_table import LatestEvaluations
from agnews_dist.report.formatting import (
    describe_event,
    describe_selection,
    escape_text,
    format_age,
    format_duration,
    format_ratio,
    lay_out_facts,
    name_evaluation,
    select_facts,
    sum_parameters,
)
from agnews_dist.report.progress import LossHistory, StepProgress
from agnews_dist.report.running_tasks import SILENT_SECONDS, RunningTasks, format_task, is_complete
from agnews_dist.report.sweep_table import build_sweep_table
from agnews_dist.storage.capacity import gigabytes, resident_bytes

SECONDS_BETWEEN_REFRESHES = 0.1
IDLE_SECONDS = 1.0
"""Time without an event after which the live display is drawn again, for the times in it."""
MIN_TABLE_WIDTH = 80
"""Columns of a terminal below which the findings about the data are a list."""
MIN_TWO_COLUMNS = 120
"""Columns of a terminal from which on the facts of a header are in two columns."""
MIN_LINE_SECONDS = 2.0
"""Shorter tasks and checkpoints print no line."""
STEPS = "train"
"""Name of the bar of the training steps."""


class TerminalDisplay:
    """Sink that draws on a terminal through rich.

    All output is `Text`, because rich interprets markup such as `[red]` in strings.
    """

    def __init__(
        self, out: rich.console.Console, *, is_verbose: bool = False, every_step: bool = False, clock: Callable[[], float]
    ) -> None:
        self._out, self._is_verbose, self._every_step, self._clock = out, is_verbose, every_step, clock
        self.measure_memory = resident_bytes
        self._steps, self._losses = StepProgress(0, clock), LossHistory()
        self._is_training = False
        self._saved: float | None = None
        """Time of the last checkpoint."""
        self._evaluations = LatestEvaluations()
        self._sweep: events.SweepUpdated | None = None
        self._tasks = RunningTasks(out, clock)
        self._live: Live | None = None
        self._refreshed = clock()

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Loading():
                self._print(self._escape(f"{event.program}: loading {event.what} ...", "bold"))
                self._tasks.report(events.begin_phase(f"load {event.what}"))
                self._refreshed = self._clock()
            case events.StepDone():
                self._show_step(event)
            case events.Progress():
                self._show_progress(event)
            case events.RunStarted():
                self.close()
                self._steps, self._losses = StepProgress(event.num_steps, self._clock), LossHistory()
                self._print(self._build_header(event))
            case events.EvalDone() | events.Predicted():
                self._show_evaluation(event)
            case events.Warned() | events.NonFinite():
                self._print(self._escape(describe_event(event), "yellow"))
            case events.DataChecked():
                self._print(self._build_findings(event))
            case events.Resumed() | events.StoppedEarly():
                self._print(self._escape(describe_event(event)))
            case events.CheckpointSaved():
                self._saved = self._clock()
                if self._is_verbose or self._every_step or event.seconds >= MIN_LINE_SECONDS:
                    self._print(self._escape(describe_event(event), "dim"))
            case events.Profiled():
                self._print(self._escape(f"profile written to {event.path}", "bold"))
                # Lines of a table that is too wide are cut, not folded.
                self._print(self._escape(event.top_operators.strip("\n")), no_wrap=True)
            case events.SweepUpdated():
                self._sweep = event
                self._refresh(now=True)
            case events.OverfitChecked():
                self._print(self._escape(describe_event(event), "green" if event.accuracy == 1 else "yellow"))
            case events.RunDone():
                self.close()
                self._print_summary(event)

    def tick(self) -> None:
        """Draw the live display again for the times in it, or begin one for a phase that takes long."""
        has_display = self._live is not None
        idle = self._clock() - self._refreshed
        if idle >= (IDLE_SECONDS if has_display else SILENT_SECONDS) and (has_display or self._tasks.tasks):
            self._refresh()

    def close(self) -> None:
        """Replace the live display by the evaluations and losses that it showed. Further calls do nothing."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._tasks.end_all()
        if self._is_training:
            self._is_training = False
            self._print(self._build_training(is_last=True))
            self._evaluations = LatestEvaluations()
        if self._sweep is not None and self._sweep.num_done == self._sweep.num_members:
            self._print(build_sweep_table(self._sweep, self._out.encoding))
            self._sweep = None

    def _escape(self, text: str, style: str = "") -> Text:
        return Text(escape_text(text, self._out.encoding), style=style, overflow="fold")

    def _print(self, renderable: RenderableType, *, no_wrap: bool = False) -> None:
        self._out.print(renderable, highlight=False, no_wrap=no_wrap, crop=no_wrap)

    def _build_header(self, event: events.RunStarted) -> Panel:
        facts = event.facts if self._is_verbose else select_facts(event.facts)
        parts: list[RenderableType] = [self._lay_out_header(facts)]
        if event.parameters and self._is_verbose:
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

    def _lay_out_header(self, facts: Mapping[str, str]) -> Table:
        """Lay out the facts of a header in two columns of labels and values, or in one on a narrow terminal."""
        items = list(facts.items())
        if self._out.width < MIN_TWO_COLUMNS:
            return lay_out_facts(facts, self._out.encoding)
        half = (len(items) + 1) // 2
        columns = Table.grid(padding=(0, 3), expand=True)
        columns.add_column(ratio=1)
        columns.add_column(ratio=1)
        columns.add_row(*(lay_out_facts(dict(part), self._out.encoding) for part in (items[:half], items[half:])))
        return columns

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
        self._losses.add(event.loss)
        self._is_training = True
        self._tasks.end_all(but=STEPS)
        self._tasks.report(events.Progress(task=STEPS, done=event.step, total=self._steps.num_steps, unit="steps"))
        if self._every_step:
            self._print(Text("  ".join([self._steps.format_step(), *self._steps.format_figures(exact=True)]), overflow="fold"))
        self._refresh(now=self._steps.is_complete)

    def _show_progress(self, event: events.Progress) -> None:
        task = self._tasks.report(event)
        if not is_complete(task):
            self._refresh()
            return
        if not self._tasks.tasks and not self._is_training:
            self.close()
        else:
            self._refresh(now=True)
        if (task.elapsed or 0.0) >= MIN_LINE_SECONDS:
            self._print(self._escape(format_task(task), "dim"))

    def _show_evaluation(self, event: events.EvalDone | events.Predicted) -> None:
        # The task of an evaluation never reports its end.
        self._tasks.end_all(but=STEPS)
        if isinstance(event, events.Predicted):
            self._print(self._escape(describe_event(event), "bold"))
        elif not event.epoch:
            self.close()
            self._print(self._build_evaluation(event))
        else:
            self._is_training = True
            self._evaluations.add(event)
            if self._is_verbose:
                self._print(self._build_evaluation(event))
            self._refresh(now=True)

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
        if self._sweep is not None:
            return Group(build_sweep_table(self._sweep, self._out.encoding), self._tasks)
        return Group(self._tasks, self._build_training()) if self._is_training else self._tasks

    def _build_training(self, *, is_last: bool = False) -> RenderableType:
        """Build the evaluations and the figures of the last steps. `is_last`: those that stay on the screen."""
        parts: list[RenderableType] = [self._evaluations.build_table()] if len(self._evaluations) else []
        # A start that resumes at an evaluation has no step yet.
        if self._steps.has_steps:
            parts.append(self._build_figures(is_last=is_last))
        return Group(*parts)

    def _build_figures(self, *, is_last: bool) -> Text:
        loss = Text.assemble("loss ", (self._losses.draw(), "cyan"), f" {self._steps.mean_loss:.4f}")
        rates = "  ".join(self._steps.format_rates())
        if not is_last:
            age = "no checkpoint yet" if self._saved is None else f"checkpoint {format_age(self._clock() - self._saved)} ago"
            state = "  ".join([*self._steps.format_state(), f"memory {gigabytes(self.measure_memory())}", age])
            rates = f"{rates}  {state}" if len(loss) + len(rates) + len(state) + 4 <= self._out.width else f"{rates}\n{state}"
        return Text.assemble(loss, "  ", (rates, "dim"), overflow="fold")
