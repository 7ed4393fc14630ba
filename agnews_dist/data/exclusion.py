"""Training rows to leave out, by a file that names them as messages, reports and label_errors.csv do: `train.csv row 17`.

A name is the file of the data and the row in it. So it means the same row whatever is held out, limited or left out already.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agnews_dist.data.formats.registry import is_data_file, open_table
from agnews_dist.data.formats.streams import read_lines
from agnews_dist.data.local_files import exists
from agnews_dist.data.rows import Ints, Origin, Split, list_first, quote_value
from agnews_dist.errors import DataError, count_noun, did_you_mean

COLUMN = "origin"
"""Column of the names in a table; label_errors.csv has it."""
_NAME = re.compile(r"(.+) row (\d{1,9})(?: \(index .*\))?", re.DOTALL)


@dataclass(frozen=True)
class Exclusion:
    """The rows that a file names."""

    where: str
    """The setting and its value, for messages."""
    rows: Mapping[str, Ints]
    """File of the data -> row numbers, ascending."""

    def names(self) -> list[str]:
        """Return the names of all rows, as a file has them."""
        return [f"{file} row {row}" for file, rows in self.rows.items() for row in rows.tolist()]

    def find(self, origin: Origin) -> NDArray[np.bool_]:
        """Return which rows are named, shape (N,)."""
        is_named_N = np.zeros(len(origin.row_N), bool)
        for index, file in enumerate(origin.files):
            if file in self.rows:
                is_named_N |= (origin.file_N == index) & np.isin(origin.row_N, self.rows[file])
        return is_named_N

    def check(self, origins: Mapping[str, Origin], source: str) -> None:
        """Check that every named row exists; `origins`: split -> all rows of the source.

        Raises:
            DataError: some do not; names the first.
        """
        missing: list[str] = []
        for file, rows in self.rows.items():
            parts = [of.row_N[of.file_N == of.files.index(file)] for of in origins.values() if file in of.files]
            unknown = np.setdiff1d(rows, np.concatenate(parts) if parts else np.empty(0, np.int64))
            missing += [f"{file} row {row}" for row in unknown.tolist()]
        if missing:
            raise DataError(
                f"{self.where}: {source} does not have {count_noun(len(missing), 'row')} that it names "
                f"({list_first(missing, str)}): they cannot be left out. Correct the names, or use a file of this data."
            )


def read_exclusion(path: Path) -> Exclusion:
    """Read the names of rows: the column `origin` of a table in any format of data, or the lines of a text file.

    Raises:
        DataError: the file cannot be read, has no such column, or a name is not that of a row.
    """
    where = f"data.exclude {str(path)!r}"
    if not exists(path):
        raise DataError(f"{where}: no such file from {Path.cwd()}. Correct the path.")
    found: dict[str, set[int]] = defaultdict(set)
    for place, name in _read_names(path, where):
        match = _NAME.fullmatch(name.strip()) if isinstance(name, str) else None
        if match is None:
            raise DataError(
                f"{where}: {place} holds {quote_value(name)}, which does not name a row. Write file and row as in "
                "label_errors.csv: train.csv row 17."
            )
        found[match[1]].add(int(match[2]))
    return Exclusion(where, {file: np.array(sorted(rows), np.int64) for file, rows in found.items()})


def _read_names(path: Path, where: str) -> Iterator[tuple[str, object]]:
    """Yield (place, name) of every row of a table, or of every line that is not blank."""
    if not is_data_file(path):
        for number, line in enumerate(read_lines(path, where), 1):
            if line.strip():
                yield f"line {number}", line.strip()
        return
    table = open_table(path, where)
    if COLUMN not in table.columns:
        near = did_you_mean(COLUMN, table.columns)
        raise DataError(
            f"{where}: it has no column {COLUMN!r}, only {list_first(table.columns, repr)}.{near} Name file and row there, as "
            "label_errors.csv does."
        )
    for chunk in table.chunks((COLUMN,)):
        for number, name in zip(chunk.row_N.tolist(), chunk.columns[COLUMN], strict=True):
            yield f"row {number}", name


def exclude_rows(
    splits: Mapping[str, Split], origins: Mapping[str, Origin], exclusion: Exclusion, source: str
) -> tuple[dict[str, Split], str, tuple[str, ...]]:
    """Leave the named rows out of train; returns (splits, what was left out, warnings).

    Rows of other splits stay, so that scores with and without the exclusion are of the same texts. `origins`: split -> all
    rows of the source, also those that are not in use.

    Raises:
        DataError: a named row does not exist, or no row of train is left.
    """
    exclusion.check(origins, source)
    is_named = {name: exclusion.find(split.origin) for name, split in splits.items()}
    train, num_excluded = splits["train"], int(is_named["train"].sum())
    if num_excluded == len(train):
        raise DataError(
            f"{exclusion.where}: it names all {count_noun(len(train), 'row')} of train: nothing is left to train on. Name "
            "fewer."
        )
    kept = {name: int(named_N.sum()) for name, named_N in is_named.items() if name != "train" and named_N.any()}
    warnings: tuple[str, ...] = ()
    if kept:
        counts = ", ".join(f"{name} {count:,}" for name, count in kept.items())
        warnings = (
            f"{exclusion.where}: it also names rows outside of train ({counts}). These stay, so that scores are of the same "
            "texts with and without it.",
        )
    left = train.take(np.flatnonzero(~is_named["train"])) if num_excluded else train
    return {**splits, "train": left}, f"{num_excluded:,} of {count_noun(len(train), 'row')} of train", warnings
