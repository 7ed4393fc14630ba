"""Parts of a page: sections of tables, figures and texts, which both templates print in the same order."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from agnews_dist.evaluation.intervals import Interval
from agnews_dist.report.pages.figures import FigureFiles


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    shade: float | None = None
    """Depth of its background from 0 to 1."""


@dataclass(frozen=True)
class Table:
    """A table with a header. Columns of numbers are on the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: str = ""
    is_wide_text: bool = False
    """A column holds long text, which is wrapped."""

    def is_number(self, column: int) -> bool:
        """Return whether a column holds numbers only."""
        texts = [row[column].text for row in self.rows]
        return any(map(looks_like_number, texts)) and all(text in ("", "-") or looks_like_number(text) for text in texts)


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    key: str
    """Target of links to it."""
    title: str
    lead: str = ""
    """Content of the section, and advice on reading it."""
    tables: tuple[Table, ...] = ()
    figures: tuple[FigureFiles, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    """A command to copy."""


@dataclass(frozen=True)
class Headline:
    """One figure in large print."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    badge: str
    """State of the run."""
    headlines: tuple[Headline, ...] = ()
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...] = field(default_factory=tuple[Section, ...])

    @property
    def figures(self) -> list[FigureFiles]:
        """All figures, in order."""
        return [figure for section in self.sections for figure in section.figures]


def make_table(
    header: Sequence[str], rows: Iterable[Sequence[str | Cell]], *, title: str = "", note: str = "", is_wide_text: bool = False
) -> Table:
    """Build a table from rows of texts or cells."""
    cells = tuple(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in row) for row in rows)
    return Table(tuple(header), cells, title, note, is_wide_text=is_wide_text)


def looks_like_number(text: str) -> bool:
    """Return whether a cell's text begins like a number.

    >>> looks_like_number("1,024"), looks_like_number("-0.3 to 0.1"), looks_like_number("12 %"), looks_like_number("v2")
    (True, True, True, False)
    """
    return text.lstrip("+-")[:1].isdigit() and not text[-1:].isalpha()


def format_score(value: float) -> str:
    """Format a score with four decimals; NaN as `-`."""
    return "-" if value != value else f"{value:.4f}"


def format_interval(interval: Interval | None) -> str:
    """Format an interval of scores: `0.853 to 0.871`; None as `-`."""
    return "-" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


def format_percent(value: float | None) -> str:
    """Format a share between 0 and 1 with one decimal; None and NaN as `-`."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def escape_markdown(text: str) -> str:
    """Escape what would end a cell of a Markdown table, or be read as HTML, emphasis, a formula, a link or a mention.

    A mention (`@name`, `#1`) is found in the text that Markdown has produced, so a backslash does not prevent it. An invisible
    space does.
    """
    escaped = re.sub(r"([\\|<&`*_~$\[\]])", r"\\\1", " ".join(text.split()))
    escaped = re.sub(r"(?i)(:(?=//)|(?<=www)\.)", r"\\\1", escaped)
    return re.sub(r"([@#])(?=\w)", r"\1&#8203;", escaped)
