"""A compact table of the latest evaluations of a training, with the best one marked."""

from rich.table import Table
from rich.text import Text

from agnews_dist.events import EvalDone
from agnews_dist.report.formatting import create_table, format_duration

NUM_ROWS = 5
"""Evaluations in the table, at most."""
COLUMNS = ("epoch", "step", "split", "accuracy", "macro F1", "loss", "time", "")


class LatestEvaluations:
    """The latest evaluations, and the best one however old it is."""

    def __init__(self) -> None:
        self._events: list[EvalDone] = []
        self._best: EvalDone | None = None

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: EvalDone) -> None:
        """Add an evaluation; the oldest one leaves, unless it is the best."""
        self._events.append(event)
        if event.is_best:
            self._best = event
        if len(self._events) > NUM_ROWS:
            self._events.remove(next(old for old in self._events if old is not self._best))

    def build_table(self) -> Table:
        """Build the table, oldest first."""
        table = create_table(COLUMNS, right=set(COLUMNS) - {"split", ""})
        for event in self._events:
            scores, is_best = event.scores, event is self._best
            ratios = (scores.accuracy, scores.macro_f1, scores.loss)
            cells = [f"{event.epoch}", f"{event.step:,}", event.split, *(f"{ratio:.4f}" for ratio in ratios)]
            cells += [format_duration(event.seconds), "best" if is_best else ""]
            table.add_row(*map(Text, cells), style="bold green" if is_best else "")
        return table
