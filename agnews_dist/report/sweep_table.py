"""The table of a sweep: combinations of settings by their validation scores, the best first."""

import math

from rich.table import Table
from rich.text import Text

from agnews_dist.errors import shorten
from agnews_dist.events import SweepRow, SweepUpdated
from agnews_dist.report.formatting import create_table, escape_text

NUM_ROWS = 10
"""Combinations in the table, at most."""
MAX_SETTINGS = 60
"""Characters of a combination."""


def build_sweep_table(event: SweepUpdated, encoding: str) -> Table:
    """Build the table of the best combinations so far."""
    scores = (f"validation {event.metric}", "deviation", "loss")
    table = create_table(("", "settings", *scores, "members"), right=("", *scores))
    for place, row in enumerate(event.rows[:NUM_ROWS], 1):
        settings = escape_text(shorten(row.settings, MAX_SETTINGS), encoding)
        cells = (str(place), settings, *_format_scores(row, event.metric), row.state)
        table.add_row(*map(Text, cells), style="bold green" if place == 1 else "")
    if (hidden := len(event.rows) - NUM_ROWS) > 0:
        table.add_row(Text(), Text(f"and {hidden:,} more"), style="dim")
    return table


def describe_sweep(event: SweepUpdated) -> str:
    """Describe the progress and the best combination in one line."""
    line = f"{event.num_done:,} of {event.num_members:,} members"
    if not event.rows:
        return line
    best = event.rows[0]
    score, deviation, loss = _format_scores(best, event.metric)
    spread = f" (deviation {deviation})" if deviation != "-" else ""
    return f"{line}; best so far {best.settings}: {event.metric} {score}{spread}, loss {loss}, {best.state}"


def _format_scores(row: SweepRow, metric: str) -> tuple[str, str, str]:
    """Format mean, deviation and loss; a score that is a negative loss is shown as the loss."""
    mean = -row.mean if metric == "loss" else row.mean
    return tuple(f"{value:.4f}" if math.isfinite(value) else "-" for value in (mean, row.deviation, row.loss))  # pyright: ignore[reportReturnType]
