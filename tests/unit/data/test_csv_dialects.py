"""csv of any writer and dialect: the same rows, or an error; never other rows."""

import csv
import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
from datasets import Dataset
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from agnews_dist.data.formats.registry import open_table
from agnews_dist.errors import DataError

Rows = list[tuple[str, str]]
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
texts = st.text(st.sampled_from("ab ,;\t|\"'\\\n\ré0"), max_size=8) | st.text(max_size=4)
writable = texts.filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text))
rows = st.lists(st.tuples(writable, st.sampled_from(["0", "1", "World", "so so"])), min_size=1, max_size=5)


def read(path: Path) -> Rows | None:
    """Return the rows, or None where the file is refused."""
    try:
        table = open_table(path, path.name)
        if "text" not in table.columns or "label" not in table.columns:
            return None  # an error of the next step, which looks for these columns
        chunks = list(table.chunks(("text", "label")))
        return [pair for chunk in chunks for pair in zip(chunk.columns["text"], chunk.columns["label"], strict=True)]
    except DataError:
        return None


def is_plain(text: str) -> bool:
    """Return whether every program reads the text alike, once its writer has put it in quotes where needed."""
    return not any(part in text for part in ("\\", "\r", "''"))


@settings(SLOW, max_examples=1200)
@given(
    rows,
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]),
    st.sampled_from('""\''),
    st.booleans(),
    st.sampled_from([None, None, "\\"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@example([("a\\", "0")], ",", csv.QUOTE_MINIMAL, '"', False, "\\", "\n", "utf-8")
@example([("it's", "0")], ",", csv.QUOTE_MINIMAL, "'", True, None, "\n", "utf-8")
def test_rows_of_pythons_writer_are_read_or_refused(
    tmp_path, content, delimiter, quoting, quotechar, doublequote, escapechar, lineterminator, encoding
):
    # To the default dialect the same bytes are other rows: `""` is empty, and a line break inside single quotes ends a row.
    assume(quotechar == '"' or not any('"' in text or "\n" in text for text, _ in content))
    file = io.StringIO()
    try:
        csv.writer(
            file,
            delimiter=delimiter,
            quoting=quoting,
            quotechar=quotechar,
            doublequote=doublequote,
            escapechar=escapechar,
            lineterminator=lineterminator,
        ).writerows([("text", "label"), *content])
    except csv.Error:
        return  # this dialect cannot hold these rows
    path = tmp_path / ("rows.tsv" if delimiter == "\t" and len(content) % 2 else "rows.csv")
    path.write_bytes(file.getvalue().encode(encoding))
    found = read(path)
    assert found in (None, content)
    is_usual = quotechar == '"' and escapechar is None and doublequote and lineterminator != "\r" and quoting != csv.QUOTE_NONE
    if is_usual and all(is_plain(text) for text, _ in content):
        assert found == content


@settings(SLOW, max_examples=500)
@given(
    rows,
    st.sampled_from(",;\t|"),
    st.sampled_from([0, 1]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", ".gz", ".zip"]),
)
def test_rows_of_pandas_are_read_or_refused(tmp_path, content, separator, quoting, lineterminator, compression):
    path = tmp_path / f"rows.csv{compression}"
    frame = pd.DataFrame(content, columns=["text", "label"])
    frame.to_csv(path, index=False, sep=separator, quoting=quoting, lineterminator=lineterminator)
    found = read(path)
    assert found in (None, content)
    assert found is not None or not all(is_plain(text) for text, _ in content)


@settings(SLOW, max_examples=300)
@given(rows, st.sampled_from(",;\t|"), st.sampled_from(["needed", "all_valid"]))
def test_rows_of_pyarrow_are_read_or_refused(tmp_path, content, delimiter, quoting):
    path = tmp_path / "rows.csv"
    table = pa.table({"text": [text for text, _ in content], "label": [label for _, label in content]})
    pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter=delimiter, quoting_style=quoting))
    found = read(path)
    assert found in (None, content)
    assert found is not None or not all(is_plain(text) for text, _ in content)


@settings(SLOW, max_examples=100)
@given(rows)
def test_rows_of_datasets_are_read_or_refused(tmp_path, content):
    path = tmp_path / "rows.csv"
    Dataset.from_list([{"text": text, "label": label} for text, label in content]).to_csv(str(path))
    found = read(path)
    assert found in (None, content)
    assert found is not None or not all(is_plain(text) for text, _ in content)
