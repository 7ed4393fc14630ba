"""Text forms of durations, ratios and events, and safe output of untrusted text to terminals."""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TextIO

import rich.console
from rich.table import Table
from rich.text import Text

from agnews_dist.errors import count_noun, format_ids
from agnews_dist.events import CheckpointSaved, EvalDone, NonFinite, OverfitChecked, Predicted, Resumed, StoppedEarly, Warned

NUM_MAIN_FACTS = 10
"""Facts of a header without --verbose."""
# Characters that move the cursor, ring the bell or change the reading direction; tab and newline are allowed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def create_output(stream: TextIO) -> rich.console.Console:
    """Create rich's console for a stream. FORCE_COLOR is ignored: it would put cursor movements into log files.

    A notebook is not a terminal: rich's own display there needs ipywidgets. A command after `!` has a terminal all the same, of
    which the notebook shows the codes. Its kernel sets JPY_PARENT_PID.
    """
    is_terminal = stream.isatty() and not os.environ.get("JPY_PARENT_PID")
    return rich.console.Console(file=stream, force_terminal=is_terminal, force_jupyter=False)


def can_draw(out: rich.console.Console) -> bool:
    """Return True for a terminal that can move the cursor and print Unicode."""
    return out.is_terminal and not out.is_dumb_terminal and out.encoding.startswith("utf")


def escape_text(text: str, encoding: str) -> str:
    """Replace control characters, and characters that `encoding` lacks, by backslash escapes.

    >>> escape_text("a \\x1b[31m red \\u2713 tick", "ascii")
    'a \\\\x1b[31m red \\\\u2713 tick'
    """
    escaped = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def format_duration(seconds: float) -> str:
    """Format seconds, minutes and hours.

    >>> format_duration(3.21), format_duration(75), format_duration(7384)
    ('3.2 s', '1:15', '2:03:04')
    """
    if seconds < 60 and round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_age(seconds: float) -> str:
    """Format an age in whole seconds.

    >>> format_age(3.21), format_age(75)
    ('3 s', '1:15')
    """
    return f"{seconds:.0f} s" if seconds < 59.5 else format_duration(seconds)


def format_ratio(value: float | None) -> str:
    """Format a number between 0 and 1 with three decimals; None and NaN as `-`.

    >>> format_ratio(0.5), format_ratio(float("nan"))
    ('0.500', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def select_facts(facts: Mapping[str, str]) -> dict[str, str]:
    """Select the facts of a run that matter most: the first ten."""
    return dict(list(facts.items())[:NUM_MAIN_FACTS])


def lay_out_facts(facts: Mapping[str, str], encoding: str) -> Table:
    """Lay out labels and values in two columns."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", overflow="fold")
    rows.add_column(overflow="fold")
    for pair in facts.items():
        # As Text: rich would interpret [brackets] in a string as markup.
        rows.add_row(*(Text(escape_text(text, encoding)) for text in pair))
    return rows


def create_table(header: Sequence[str], rows: Iterable[Sequence[str]] = (), *, right: Collection[str] = ()) -> Table:
    """Create a table without lines. Columns named in `right` are on the right; a long text is folded."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in header:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def sum_parameters(parameters: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the (trainable, frozen) counts of all parts together."""
    return sum(trainable for trainable, _ in parameters.values()), sum(frozen for _, frozen in parameters.values())


def describe_event(
    event: Warned | NonFinite | Resumed | CheckpointSaved | EvalDone | Predicted | StoppedEarly | OverfitChecked,
) -> str:
    """Describe an event in one line."""
    match event:
        case Warned():
            return f"warning: {event.message}"
        case NonFinite():
            return f"step {event.step} skipped its update: loss or gradient not finite, {format_ids(event.ids)}"
        case Resumed():
            return f"resumed from step {event.step}, attempt {event.attempt}: {event.path}"
        case CheckpointSaved():
            return (
                f"checkpoint of step {event.step} written: {event.num_bytes / 1e6:,.1f} MB in "
                f"{format_duration(event.seconds)} (stall {1000 * event.stall:.0f} ms)"
            )
        case EvalDone():
            scores = event.scores
            return (
                f"{name_evaluation(event)}: accuracy {scores.accuracy:.4f} ({scores.num_correct:,} of "
                f"{scores.num_examples:,}), macro F1 {scores.macro_f1:.4f}, loss {scores.loss:.4f}, "
                f"{format_duration(event.seconds)}{', the best so far' if event.is_best else ''}"
            )
        case Predicted():
            return (
                f"{event.split}: {event.num_examples:,} rows without labels: predicted, not scored, "
                f"{format_duration(event.seconds)}"
            )
        case StoppedEarly():
            evaluations = count_noun(event.num_worse, "evaluation")
            return (
                f"stopped early after step {event.step}: {evaluations} without a better {event.metric} (optim.patience); the "
                f"best is that of step {event.best_step}"
            )
        case OverfitChecked():
            return (
                f"overfit check: {event.num_examples} examples, {event.num_steps} steps: loss "
                f"{event.first_loss:.4f} -> {event.last_loss:.4f}, accuracy {event.accuracy:.3f}"
            )


def name_evaluation(event: EvalDone) -> str:
    """Name an evaluation: `epoch 2, step 750 validation`, or the split alone outside training (epoch 0)."""
    when = [f"{name} {count}" for name, count in (("epoch", event.epoch), ("step", event.step)) if count]
    return f"{', '.join(when)} {event.split}" if when else event.split


def describe_selection(event: EvalDone) -> str:
    """Describe which classes an evaluation lists: `lowest F1 of 150 classes`; an empty string if it lists all."""
    return "" if len(event.classes) == event.num_classes else f"lowest F1 of {event.num_classes:,} classes"
