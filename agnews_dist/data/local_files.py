"""Splits of a single local file, or of a directory in the layout of hub data sets."""

import re
from collections.abc import Sequence
from pathlib import Path

from agnews_dist.data.formats import SUFFIXES, read_file
from agnews_dist.data.rows import Origin, RawRows, list_first
from agnews_dist.errors import DataError, did_you_mean

SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}
"""Names of a split in files, folders and on the hub: `train-00000-of-00001.parquet`, `dev.csv`, `train/0000.parquet`."""


def is_local_path(source: str) -> bool:
    """Return whether `source` can only be a path: a hub id is `name` or `owner/name`, without a data suffix."""
    suffixes = (*SUFFIXES, ".tsv", ".txt", ".gz", ".zip", ".arrow", ".xlsx")
    return source.startswith((".", "/", "~")) or source.endswith(("/", *suffixes)) or "\\" in source or source.count("/") > 1


def read_local(path: Path) -> dict[str, RawRows]:
    """Read the splits of a directory in the hub's layout, or a single file as the split 'train'.

    Raises:
        DataError: no data file exists, a file cannot be read, or files of a split do not fit together.
    """
    if path.is_dir():
        files = find_files_by_split(path)
        return {name: _join([read_file(file, str(file.relative_to(path))) for file in files[name]]) for name in files}
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path} has the unsupported suffix {path.suffix!r}: no reader knows it."
            f"{did_you_mean(path.suffix, SUFFIXES)} Convert it to one of {', '.join(SUFFIXES)}."
        )
    return {"train": read_file(path, path.name)}


def find_files_by_split(directory: Path) -> dict[str, list[Path]]:
    """Find the data files of `directory`, or else of its `data/`, by split, in order of their names."""
    found: list[Path] = []
    for parent in (directory, directory / "data"):
        folders = [parent, *(parent / word for words in SPLIT_WORDS.values() for word in words)]
        found = [
            file
            for folder in folders
            if folder.is_dir()
            for file in sorted(folder.iterdir())
            if file.is_file() and file.suffix.lower() in SUFFIXES
        ]
        if found:
            break
    by_split = {name: [file for file in found if _split_of(file, directory) == name] for name in SPLIT_WORDS}
    splits = {name: files for name, files in by_split.items() if files}
    if not splits:
        found_names = [file.name for file in sorted(directory.iterdir())]
        raise DataError(
            f"{directory} has no data file of a split (found: {list_first(found_names, str) or 'nothing'}): one is needed. "
            f"Name files train, validation and test with one of {', '.join(SUFFIXES)}, or name a single file."
        )
    for name, files in splits.items():
        suffixes = sorted({file.suffix.lower() for file in files})
        if len(suffixes) > 1:
            raise DataError(
                f"split {name!r} of {directory} has files of several formats ({list_first(files, lambda file: file.name)}): "
                "probably the same rows twice. Leave only one format there."
            )
    return splits


def _split_of(file: Path, directory: Path) -> str | None:
    for part in reversed(file.relative_to(directory).parts):
        words = re.split(r"[^a-z]+", Path(part).stem.lower())
        for split, names in SPLIT_WORDS.items():
            if any(name in words for name in names):
                return split
    return None


def _join(parts: Sequence[RawRows]) -> RawRows:
    """Join the rows of a split's files."""
    first = parts[0]
    for part in parts[1:]:
        if (part.class_names, part.first_label) != (first.class_names, first.first_label):
            raise DataError(
                f"{part.origin.files[0]} and {first.origin.files[0]} name or number their classes differently: labels of the "
                "same split would mean different things. Write both files in the same way."
            )
    return RawRows(
        [text for part in parts for text in part.texts],
        [label for part in parts for label in part.labels],
        Origin.concatenate([part.origin for part in parts]),
        first.class_names,
        first.first_label,
    )
