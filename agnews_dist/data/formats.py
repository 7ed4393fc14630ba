"""Rows of one local file (parquet, csv, jsonl, json) with the origin of each row."""

import glob
import json
import re
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from agnews_dist.data.hugging_face import silence_datasets, translate_errors
from agnews_dist.data.rows import Origin, RawRows, check_columns
from agnews_dist.errors import DataError

_BATCH_ROWS = 10_000
_ORIGINAL_COLUMNS = ("class", "title", "description")
_INTEGER = re.compile(r"[+-]?[0-9]+")


def read_file(path: Path, name: str) -> RawRows:
    """Read the rows of one file; `name`: the file's name in messages.

    Raises:
        DataError: the file cannot be read, is empty, not UTF-8 or malformed, or lacks the column 'text' or 'label'.
    """
    try:
        return _READERS[path.suffix.lower()](path, name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions.") from error


def _read_text(path: Path, name: str) -> str:
    """Read the file's text without a byte order mark."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `start` counts from the end of the byte order mark.
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{name} line {line} has the byte 0x{content[offset]:02x}, which is not valid UTF-8: text must be UTF-8. "
            "Save the file as UTF-8, for example with 'iconv -f WINDOWS-1252 -t UTF-8'."
        ) from error
    if not text.strip():
        raise DataError(f"{name} is empty: at least one row is needed. Check how it was written, or remove it.")
    return text


@contextmanager
def _reading(name: str, advice: str) -> Generator[None]:
    """Read with `datasets` or pandas inside the block; an exception of theirs becomes a DataError that ends in `advice`."""

    def make_error(reason: str) -> DataError:
        return DataError(f"{name} cannot be read: {reason}. {advice}")

    with silence_datasets(), translate_errors(make_error), warnings.catch_warnings():
        # pandas only warns when it drops fields.
        warnings.filterwarnings("error", message="Length of header or names does not match")
        yield


def _read_columns(kind: str, path: Path, wanted: Sequence[str], **options: Any) -> dict[str, list[object]]:
    """Read the columns `wanted` with `datasets`, without a copy in its cache."""
    import datasets

    # data_files are glob patterns, and a path may contain brackets.
    data_files = {"train": [glob.escape(str(path.resolve()))]}
    rows = datasets.load_dataset(kind, data_files=data_files, split="train", streaming=True, **options)
    values: dict[str, list[object]] = {column: [] for column in wanted}
    for batch in rows.iter(_BATCH_ROWS):
        for column in wanted:
            values[column].extend(batch[column])
    return values


def _read_parquet(path: Path, name: str) -> RawRows:
    with _reading(name, "Copy or download the file again."):
        from datasets import Features
        from pyarrow.parquet import read_schema

        features = Features.from_arrow_schema(read_schema(path))
        check_columns(name, list(features))
        # The default batch size is that of the first row group, which may be empty.
        values = _read_columns("parquet", path, ("text", "label"), columns=["text", "label"], batch_size=_BATCH_ROWS)
    texts = values["text"]
    return RawRows(texts, values["label"], Origin.of_file(name, len(texts)), read_class_names(features))


def read_class_names(features: Mapping[str, object]) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel column 'label'; None if the column has another type."""
    names = getattr(features.get("label"), "names", None)
    return tuple(names) if names else None


def _read_csv(path: Path, name: str) -> RawRows:
    """Read a csv whose header names 'text' and 'label', or AG News' original columns with or without a header."""
    _read_text(path, name)
    advice = "Put texts with commas or line breaks in double quotes, and double every quote inside."
    with _reading(name, advice):
        # `datasets` uses this reader too, so both agree on quotes, blank lines and NUL.
        import pandas as pd

        first = pd.read_csv(path, header=None, nrows=1, dtype=str, na_filter=False, encoding="utf-8-sig")
        header = [str(field) for field in first.iloc[0]]
    original = _original_columns(header)
    columns = original or header
    if original is None:
        check_columns(name, header)
    if len(set(columns)) < len(columns):
        raise DataError(
            f"{name} has two columns of the same name ({', '.join(map(repr, header))}): names must be unique. Rename or "
            "remove one."
        )
    with _reading(name, advice):
        from datasets import Features, Value

        values = _read_columns(
            "csv",
            path,
            columns,
            # All fields as unchanged strings: 'NA' stays a text, and 007 keeps its zeros.
            features=Features({column: Value("string") for column in columns}),
            na_filter=False,
            column_names=list(columns),
            # A number in the first line is a label: the file has no header.
            header=None if original and _INTEGER.fullmatch(header[0]) else 0,
            # Otherwise a row with an extra field would shift the columns.
            index_col=False,
            encoding="utf-8-sig",
        )
    if original is None:
        return RawRows(values["text"], values["label"], Origin.of_file(name, len(values["text"])))
    labels, titles, descriptions = (values[column] for column in original)
    texts = [f"{title} {description}" for title, description in zip(titles, descriptions, strict=True)]
    return RawRows(texts, labels, Origin.of_file(name, len(texts)), first_label=1)


def _original_columns(header: Sequence[str]) -> tuple[str, ...] | None:
    """Return names for AG News' original columns if `header` is their header or first row, else None."""
    plain = [name.strip().lower().removesuffix(" index") for name in header]
    is_row = len(header) == len(_ORIGINAL_COLUMNS) and _INTEGER.fullmatch(header[0])
    return _ORIGINAL_COLUMNS if is_row or plain == list(_ORIGINAL_COLUMNS) else None


def _read_jsonl(path: Path, name: str) -> RawRows:
    """Read one object per line.

    `datasets` is not used. It infers a type per block: one wrong label changes others, and text that looks like dates becomes
    dates. Its errors do not name the line.
    """
    lines = enumerate(_read_text(path, name).split("\n"), start=1)
    objects = {number: _parse(line, f"{name} row {number}") for number, line in lines if line.strip()}
    origin = Origin((name,), np.zeros(len(objects), np.int64), np.array(list(objects), dtype=np.int64))
    return _from_objects(list(objects.values()), origin)


def _read_json(path: Path, name: str) -> RawRows:
    """Read a list of objects, or one object per line, which the hub uses too."""
    content = _read_text(path, name)
    if not content.lstrip().startswith("["):
        return _read_jsonl(path, name)
    objects = cast(list[object], _parse(content, name))
    return _from_objects(objects, Origin.of_file(name, len(objects)))


def _parse(content: str, name: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        # The parser sees one line at a time, so its line number means nothing.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{name} is not valid JSON: {reason}. Write one object with 'text' and 'label' per line.") from error


def _from_objects(objects: Sequence[object], origin: Origin) -> RawRows:
    texts: list[object] = []
    labels: list[object] = []
    for i, row in enumerate(objects):
        if not isinstance(row, dict):
            raise DataError(
                f"{origin.name(i)} is {str(row)[:40]!r}, not an object: a row needs a text and a label. Write it as "
                '{"text": ..., "label": ...}.'
            )
        fields = cast(dict[str, object], row)
        check_columns(origin.name(i), list(fields))
        texts.append(fields["text"])
        labels.append(fields["label"])
    return RawRows(texts, labels, origin)


_READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
SUFFIXES = tuple(_READERS)
