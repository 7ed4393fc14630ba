"""The reader of a file by its suffix."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from agnews_dist.data.formats.arrow_file import ArrowTable, ParquetTable
from agnews_dist.data.formats.csv_file import CsvTable
from agnews_dist.data.formats.line_file import JsonTable
from agnews_dist.data.formats.streams import COMPRESSIONS, read_lines, split_suffix
from agnews_dist.data.formats.table import Table
from agnews_dist.errors import DataError, did_you_mean

READERS: dict[str, Callable[[Path, str], Table]] = {
    ".csv": CsvTable,
    ".tsv": partial(CsvTable, separator="\t"),
    ".jsonl": JsonTable,
    ".ndjson": JsonTable,
    ".json": JsonTable,
    ".parquet": ParquetTable,
    ".arrow": ArrowTable,
    ".feather": ArrowTable,
}
"""Suffix of a format -> its reader. Each may be followed by one of `COMPRESSIONS`."""
SUFFIXES = tuple(READERS)
PART_SUFFIX = ".part"
"""Suffix of Dask's text parts, whose format only their content or the name of their folder tells."""


def is_data_file(path: Path) -> bool:
    """Return whether the suffix is that of a format."""
    return split_suffix(path)[0] in (*SUFFIXES, PART_SUFFIX)


def format_of(path: Path, name: str = "") -> str:
    """Return the suffix of the file's format; of one of Dask's parts that of its folder, or what its first line looks like."""
    suffix = split_suffix(path)[0]
    if suffix != PART_SUFFIX:
        return suffix
    folder = path.parent.suffix.lower()
    if folder in READERS:
        return folder
    first = next((line for line in read_lines(path, name or path.name) if line.strip()), "")
    return ".jsonl" if first.lstrip().startswith("{") else ".csv"


def open_table(path: Path, name: str, suffix: str | None = None) -> Table:
    """Open a file by its suffix, or as the format of another one; `name`: the file's name in messages.

    Raises:
        DataError: no reader knows the suffix, or the file cannot be read, is empty or malformed.
    """
    suffix, compression = suffix or format_of(path, name), split_suffix(path)[1]
    if compression and not suffix:
        raise DataError(
            f"{path} has no suffix of a format before {compression!r}: no reader is known. Rename it as in "
            f"data.csv{compression}, or unpack it and give the directory or file."
        )
    if suffix not in READERS:
        convert = f"Convert it to one of {', '.join(SUFFIXES)}, also with {', '.join(COMPRESSIONS)}."
        if suffix in (".xlsx", ".xls", ".ods"):
            convert = "Save the sheet as csv."
        raise DataError(
            f"{path} has the unsupported suffix {suffix!r}: no reader knows it.{did_you_mean(suffix, SUFFIXES)} {convert}"
        )
    try:
        return READERS[suffix](path, name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions.") from error
