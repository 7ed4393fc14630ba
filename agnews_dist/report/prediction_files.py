"""Answers of the predict command as a file: the input's columns, then the prediction and its probability.

csv, tsv, jsonl and json are written by hand, as `datasets` and pandas would change values. The file appears whole when the last
answer is written, or not at all.
"""

import gzip
import io
import json
import re
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from agnews_dist.data.formats.streams import split_suffix
from agnews_dist.data.input_texts import InputChunk, InputTexts
from agnews_dist.errors import DataError, UserError, did_you_mean
from agnews_dist.evaluation.predictor import Answers
from agnews_dist.report.prediction_values import to_digits, to_json, to_probabilities, to_text
from agnews_dist.report.prediction_view import Write
from agnews_dist.storage import atomic

TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
"""Suffixes that .gz may follow."""
FORMATS = (*TEXT_FORMATS, ".parquet")
TopK = int | Literal["all"] | None
"""Classes whose probabilities are written: the K most probable, all, or only the prediction's."""


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that answers can be written to `path`, before anything is read.

    Raises:
        UserError: its format is unknown, it exists and `overwrite` is not set, or its directory cannot be written.
    """
    suffix, compression = split_suffix(path)
    if suffix not in FORMATS or compression not in ("", ".gz") or (suffix == ".parquet" and compression):
        raise UserError(
            f"--output {str(path)!r}: the suffix says the format, which is {', '.join(FORMATS)}, or a text format with .gz."
            f"{did_you_mean(suffix, FORMATS)} Rename it."
        )
    if path.exists() and not (path.is_file() and overwrite):
        fix = "Choose another name, or set --run.overwrite." if path.is_file() else "Choose another name."
        raise UserError(f"--output {str(path)!r}: it exists. {fix}")
    try:
        atomic.sweep(path.parent, re.escape(path.name))
        # Only a write shows that writing works.
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"0")
    except OSError as error:
        raise _refuse(path, error) from error


def _refuse(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"--output {str(path)!r}: it cannot be written ({reason}). Set it to a writable place with free space.")


@contextmanager
def open_answers(path: Path, texts: InputTexts, class_names: Sequence[str], top: TopK) -> Generator[Write]:
    """Yield a function that writes the answers for a chunk; publish the file when the block ends.

    Raises:
        UserError: the file cannot be written, or the input has a column with the name of an answer.
    """
    suffix, compression = split_suffix(path)
    is_json = suffix in (".jsonl", ".ndjson", ".json")
    layout = _Layout(tuple(class_names), top)
    twice = [name for name in (layout.json_names if is_json else layout.names) if name in texts.columns]
    if twice:
        raise DataError(
            f"{texts.name} has a column {twice[0]!r} already: the answers would replace it. Rename that column, or print the "
            "answers without --output."
        )
    stack = ExitStack()
    try:
        with _translating(path):
            temporary = stack.enter_context(atomic.new_file(path))
            if suffix == ".parquet":
                write = stack.enter_context(_open_parquet(temporary, texts, layout))
            else:
                file = stack.enter_context(_open_binary(temporary, compression))
                write = stack.enter_context(_open_text(file, suffix, texts.columns, layout))
        yield partial(_write, path, write)
    except BaseException as error:
        # Closing writes what is buffered: on a full disk it fails again.
        with suppress(OSError):
            stack.__exit__(type(error), error, error.__traceback__)
        raise
    with _translating(path):
        stack.close()


@contextmanager
def _translating(path: Path) -> Generator[None]:
    """Turn the disk's errors inside the block into errors of the user."""
    try:
        yield
    except OSError as error:
        raise _refuse(path, error) from error


def _write(path: Path, write: Callable[[InputChunk, Answers], None], chunk: InputChunk, answers: Answers) -> bool:
    """Write answers, with errors of the disk and of characters as errors of the user."""
    try:
        with _translating(path):
            write(chunk, answers)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{chunk.locate(0)} or a later row has half of a surrogate pair in a column: {path.name} cannot hold it. "
            "Write --output as jsonl."
        ) from error
    return True


class _Layout:
    """Columns that are added to the input's."""

    def __init__(self, class_names: tuple[str, ...], top: TopK) -> None:
        self.class_names, self.top = class_names, top
        self.json_names = ("prediction", "probability", *(["probabilities"] if top is not None else []))
        more: list[str] = []
        if top == "all":
            more = [f"probability_{name}" for name in class_names]
        elif isinstance(top, int):
            more = [f"{name}_{k + 1}" for k in range(1, top) for name in ("prediction", "probability")]
        self.names = ("prediction", "probability", *more)
        """Names in tables."""

    def values(self, answers: Answers) -> list[Sequence[object]]:
        """Return the values of the columns `names`."""
        names = self.class_names
        columns: list[Sequence[object]] = [[names[k] for k in answers.predictions_N.tolist()], to_digits(answers.best_N)]
        if self.top == "all":
            columns += [to_digits(column_N) for column_N in answers.probabilities_NK.T]
        elif isinstance(self.top, int) and answers.classes_NK is not None:
            for k in range(1, self.top):
                columns.append([names[each] for each in answers.classes_NK[:, k].tolist()])
                columns.append(to_digits(answers.probabilities_NK[:, k]))
        return columns

    def objects(self, answers: Answers) -> Iterator[dict[str, object]]:
        """Yield the answers as JSON objects."""
        probabilities = to_probabilities(answers, self.class_names)
        for k, best in zip(answers.predictions_N.tolist(), to_digits(answers.best_N), strict=True):
            more = {"probabilities": next(probabilities)} if self.top is not None else {}
            yield {"prediction": self.class_names[k], "probability": best, **more}


@contextmanager
def _open_binary(path: Path, compression: str) -> Generator[BinaryIO]:
    with path.open("wb") as file:
        if not compression:
            yield file
            return
        # Without the time and the name, equal answers are equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed, io.BufferedWriter(packed) as buffered:
            yield cast(BinaryIO, buffered)


@contextmanager
def _open_text(
    file: BinaryIO, suffix: str, columns: Sequence[str], layout: _Layout
) -> Generator[Callable[[InputChunk, Answers], None]]:
    """Yield a function that writes rows of csv or objects of JSON."""
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix)
    if separator is not None:
        file.write(_format_row((*columns, *layout.names), separator))

        def write_rows(chunk: InputChunk, answers: Answers) -> None:
            values = [*map(chunk.column, columns), *layout.values(answers)]
            file.writelines(_format_row(map(to_text, row), separator) for row in zip(*values, strict=True))

        yield write_rows
        return
    before, between, after = (b"[\n", b",\n", b"\n]\n") if suffix == ".json" else (b"", b"\n", b"\n")
    parts = iter([before])

    def write_objects(chunk: InputChunk, answers: Answers) -> None:
        kept = zip(*map(chunk.column, columns), strict=True)
        for row, added in zip(kept, layout.objects(answers), strict=True):
            file.write(next(parts, between))
            # ASCII: a lone surrogate stays what it is.
            file.write(json.dumps({**dict(zip(columns, map(to_json, row), strict=True)), **added}, allow_nan=False).encode())

    yield write_objects
    file.write(after)


def _format_row(fields: Iterator[str] | Sequence[str], separator: str) -> bytes:
    """Return a record of csv; a field is quoted if it needs to be."""
    quoted = ['"' + field.replace('"', '""') + '"' if re.search(f'["\r\n{separator}]', field) else field for field in fields]
    return (separator.join(quoted) + "\n").encode()


@contextmanager
def _open_parquet(path: Path, texts: InputTexts, layout: _Layout) -> Generator[Callable[[InputChunk, Answers], None]]:
    """Yield a function that writes row groups; columns of typed files keep their types."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kept = texts.schema if texts.schema is not None else pa.schema([(name, pa.string()) for name in texts.columns])
    as_json: set[str] = set()
    if texts.schema is None:
        types = {column: _choose_type(found) for column, found in texts.types_of_columns().items()}
        as_json = {column for column, name in types.items() if name is None}
        kept = pa.schema([(column, pa.type_for_alias(name or "string")) for column, name in types.items()])
    added = [(name, pa.string() if name.startswith("prediction") else pa.float32()) for name in layout.names]
    schema = pa.schema([*kept, *(pa.field(name, kind) for name, kind in added)], _extend_features(kept.metadata, layout.names))

    def to_array(chunk: InputChunk, field: Any) -> Any:
        values = chunk.column(field.name)
        if field.name in as_json:
            values = [None if value is None else json.dumps(to_json(value), allow_nan=False) for value in values]
        try:
            return pa.array(values, field.type)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(
                f"column {field.name!r} of {chunk.table.name} cannot be written as parquet ({error}): its values have no "
                "common type. Write --output as jsonl."
            ) from error

    with ParquetWriter(path, schema) as writer:

        def write(chunk: InputChunk, answers: Answers) -> None:
            batch = chunk.batch
            arrays = [to_array(chunk, field) if batch is None else batch.column(field.name) for field in kept]
            arrays += [pa.array(values, kind) for values, (_, kind) in zip(layout.values(answers), added, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))

        yield write


def _choose_type(types: set[type]) -> str | None:
    """Return pyarrow's name for the type of a column; None: the values are written as JSON texts."""
    if types <= {str}:
        return "string"
    if types <= {bool}:
        return "bool"
    if types <= {int}:
        return "int64"
    return "float64" if types <= {int, float} else None


def _extend_features(metadata: Mapping[bytes, bytes] | None, names: Sequence[str]) -> dict[bytes, bytes]:
    """Add the answers to the features that the `datasets` library has written into a file; it refuses other columns."""
    found = dict(metadata or {})
    try:
        info = json.loads(found[b"huggingface"])
        for name in names:
            kind = "string" if name.startswith("prediction") else "float32"
            info["info"]["features"][name] = {"dtype": kind, "_type": "Value"}
    except (KeyError, ValueError, TypeError):
        found.pop(b"huggingface", None)
        return found
    return {**found, b"huggingface": json.dumps(info, allow_nan=False).encode()}
