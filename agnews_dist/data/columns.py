"""The text columns and the label column of a table: as set, or found by the names that data sets usually give them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from agnews_dist.data.formats.csv_file import ORIGINAL_COLUMNS
from agnews_dist.data.formats.table import LABEL_NAMES, TEXT_NAMES, Table, check_has, list_columns
from agnews_dist.errors import DataError

ORIGINAL_LABEL = "class index"
"""Label column in the header that some copies of AG News' csv have."""


@dataclass(frozen=True)
class ColumnSettings:
    """Names of columns that the user has set; None: found by the usual names."""

    text: tuple[str, ...] | None = None
    label: str | None = None
    separator: str = " "
    """Between the texts of several columns."""


@dataclass(frozen=True)
class Columns:
    """The columns of one table."""

    text: tuple[str, ...]
    label: str | None
    """None: the table has no labels."""

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """All columns to read."""
        return (*self.text, self.label) if self.label is not None else self.text

    def __str__(self) -> str:
        return (
            f"text from {' + '.join(map(repr, self.text))}, label from {self.label!r}"
            if self.label
            else (f"text from {' + '.join(map(repr, self.text))}, no label")
        )


def find_columns(table: Table, settings: ColumnSettings, *, needs_label: bool = True) -> Columns:
    """Find the columns of a table; `needs_label` False: without a label column, the result has none.

    Raises:
        DataError: a column is missing, or several could be meant; names the columns found.
    """
    text = find_text(table, settings)
    if settings.label is not None and (needs_label or settings.label in table.columns):
        check_has(table.name, table.columns, (settings.label,), "data.label_column")
        label = settings.label
    else:
        label = None if settings.label is not None else _find_label(table, text, needs_label=needs_label)
    if label is not None and label in text:
        raise DataError(
            f"data.label_column {label!r}: it is the text column of {table.name} too. Set --data.text_column or "
            "--data.label_column to another one."
        )
    return Columns(text, label)


def find_text(table: Table, settings: ColumnSettings) -> tuple[str, ...]:
    """Find the text columns of a table.

    Raises:
        DataError: a column is missing, or several could be meant; names the columns found.
    """
    if settings.text is None:
        return _find_usual_text(table)
    check_has(table.name, table.columns, settings.text, "data.text_column")
    if len(set(settings.text)) < len(settings.text):
        raise DataError(
            f"data.text_column {','.join(settings.text)!r}: a column is there twice: its text would be repeated. Remove one."
        )
    return settings.text


def is_original(table: Table, columns: Columns) -> bool:
    """Return whether the columns are those of AG News' original csv, whose classes count from 1; its copies have a header."""
    if len(table.columns) != len(ORIGINAL_COLUMNS) or len(columns.text) != len(ORIGINAL_COLUMNS) - 1:
        return False
    plain = tuple(name.strip().lower() for name in (columns.label or "", *columns.text))
    return plain == (ORIGINAL_LABEL, *ORIGINAL_COLUMNS[1:]) or (
        plain == ORIGINAL_COLUMNS and not getattr(table, "has_header", True)
    )


def _find_usual_text(table: Table) -> tuple[str, ...]:
    found = [names for usual in TEXT_NAMES if (names := _match(table.columns, usual))]
    if len(found) == 1:
        return found[0]
    usual = ", ".join(" + ".join(names) for names in TEXT_NAMES)
    if found:
        candidates = " or ".join(" + ".join(map(repr, names)) for names in found)
        raise DataError(
            f"{table.name} has several columns that could be the text: {candidates}. Set --data.text_column to one of them."
        )
    raise DataError(
        f"{table.name} has no column that is usually the text (found: {list_columns(table.columns)}; usual: {usual}). "
        f"Set --data.text_column{_header_hint(table)}."
    )


def _find_label(table: Table, text: Sequence[str], *, needs_label: bool) -> str | None:
    usual = (*LABEL_NAMES, *((ORIGINAL_LABEL,) if len(text) > 1 else ()))
    found = [names[0] for name in usual if (names := _match(table.columns, (name,))) and names[0] not in text]
    if len(found) == 1:
        return found[0]
    if found:
        candidates = " or ".join(map(repr, found))
        raise DataError(
            f"{table.name} has several columns that could be the label: {candidates}. Set --data.label_column to one of them."
        )
    if not needs_label:
        return None
    raise DataError(
        f"{table.name} has no column that is usually the label (found: "
        f"{list_columns([column for column in table.columns if column not in text])}, next to the text; usual: "
        f"{', '.join(LABEL_NAMES)}). Set --data.label_column{_header_hint(table)}."
    )


def _header_hint(table: Table) -> str:
    return ", or add a first line that names the columns" if getattr(table, "has_header", False) else " to one of these"


def _match(columns: Sequence[str], usual: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns with these names, whatever their case; None if one is missing."""
    found: list[str] = []
    for name in usual:
        alike = [name] if name in columns else [column for column in columns if column.strip().lower() == name]
        if len(alike) > 1:
            raise DataError(
                f"columns {' and '.join(map(repr, alike))} could both be {name!r}: only one is read. Rename one, or set "
                "--data.text_column and --data.label_column."
            )
        found += alike
    return tuple(found) if len(found) == len(usual) else None
