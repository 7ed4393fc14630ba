"""Files of predict: the input's columns and the answers, as pandas, pyarrow and this package read them back."""

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import os
import resource
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.formats.registry import open_table
from agnews_dist.data.input_texts import InputChunk, InputTexts, open_texts
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.errors import DataError, UserError
from agnews_dist.evaluation.predictor import Answers, reduce_logits
from agnews_dist.report.prediction_files import TopK, check_output, open_answers

NAMES = ("World", "Sports, games", 'a "b"')
FORMATS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "csv.gz", "tsv.gz", "jsonl.gz", "json.gz")


def open_file(path: Path) -> InputTexts:
    return open_texts(
        (), str(path), io.BytesIO(), input_format=None, columns=ColumnSettings(), splits=SplitSettings(), keeps_columns=True
    )


def answer(chunk: InputChunk, top: TopK) -> Answers:
    """Return answers that depend on the texts' lengths alone."""
    logits_NC = np.array([[math.sin(len(text) * k) * 3 for k in (1, 2, 3)] for text in chunk.texts], dtype=np.float32)
    num_best = 1 if top is None else None if top == "all" else top
    return reduce_logits(np.arange(len(chunk)), logits_NC, num_best)


def write(source: Path, output: Path, top: TopK = None, max_texts: int = 2) -> pd.DataFrame:
    """Write the answers for a file; return them as a table, with all probabilities."""
    texts = open_file(source)
    texts.check()
    expected: list[dict[str, Any]] = []
    with open_answers(output, texts, NAMES, top) as write_chunk:
        for chunk in texts.chunks(max_texts):
            assert write_chunk(chunk, answer(chunk, top))
            full = answer(chunk, "all")
            for i, probabilities_C in enumerate(full.probabilities_NK):
                best = int(full.predictions_N[i])
                row = {"prediction": NAMES[best], "probability": probabilities_C[best]}
                expected.append({**row, **dict(zip(NAMES, probabilities_C, strict=True))})
        assert not output.exists(), "published when it is whole"
    return pd.DataFrame(expected)


def read_json(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("ascii")
    if ".json." in f"{path.name}.":
        return json.loads(text, parse_constant=pytest.fail)
    return [json.loads(line, parse_constant=pytest.fail) for line in text.removesuffix("\n").split("\n")]


def read_table(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if ".json" in path.name or ".ndjson" in path.name:
        return pd.DataFrame(read_json(path))
    return pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",", dtype={"id": str}, keep_default_na=False)


ROWS = [
    {"id": "01", "text": "Oil rose, said the bank", "n": 1.5, "note": ""},
    {"id": "02", "text": 'He said "no"\nand left', "n": -2.0, "note": "a\tb"},
    {"id": "03", "text": "caf\u00e9 \N{BASEBALL} \u2028", "n": 0.1, "note": "c;d\r"},
    {"id": "04", "text": "-5 degrees", "n": 1e300, "note": "\\"},
    {"id": "05", "text": "a", "n": 7.0, "note": " x "},
]


@pytest.mark.parametrize("source", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_columns_are_kept_and_answers_added(tmp_path: Path, source: str, suffix: str) -> None:
    frame = pd.DataFrame(ROWS)
    if source == "a.parquet":
        frame.to_parquet(tmp_path / source, index=False)
    else:
        frame.to_json(tmp_path / source, orient="records", lines=True, double_precision=15)
    output = tmp_path / f"out.{suffix}"
    expected = write(tmp_path / source, output)
    found = read_table(output)
    assert list(found.columns) == ["id", "text", "n", "note", "prediction", "probability"]
    assert found["id"].tolist() == frame["id"].tolist()
    assert found["text"].tolist() == frame["text"].tolist()
    assert found["note"].tolist() == frame["note"].tolist()
    assert found["n"].tolist() == frame["n"].tolist()
    assert found["prediction"].tolist() == expected["prediction"].tolist()
    assert found["prediction"].nunique() > 1
    assert found["probability"].astype("f4").tolist() == expected["probability"].tolist()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    chunks = open_table(output, output.name).chunks(["text", "prediction"])
    assert [text for chunk in chunks for text in chunk.columns["text"]] == frame["text"].tolist()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_probabilities_of_the_best_and_of_all_classes(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS))
    best, all_of_them = tmp_path / f"best.{suffix}", tmp_path / f"all.{suffix}"
    expected = write(tmp_path / "a.jsonl", best, 2)
    write(tmp_path / "a.jsonl", all_of_them, "all")
    found, full = read_table(best), read_table(all_of_them)
    for i in range(len(ROWS)):
        order = sorted(NAMES, key=lambda name: -expected[name][i])
        if suffix in ("jsonl", "json"):
            assert list(found["probabilities"][i]) == order[:2]
            assert [np.float32(value) for value in found["probabilities"][i].values()] == [expected[n][i] for n in order[:2]]
            assert list(full["probabilities"][i]) == list(NAMES)
            assert [np.float32(value) for value in full["probabilities"][i].values()] == [expected[n][i] for n in NAMES]
        else:
            assert [found["prediction"][i], found["prediction_2"][i]] == order[:2]
            assert [np.float32(found[column][i]) for column in ("probability", "probability_2")] == [
                expected[name][i] for name in order[:2]
            ]
            assert [np.float32(full[f"probability_{name}"][i]) for name in NAMES] == [expected[name][i] for name in NAMES]
    assert found["prediction"].tolist() == full["prediction"].tolist() == expected["prediction"].tolist()


def test_parquet_keeps_types_and_the_features_of_datasets(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 11, 29, 12, 30, 0, 123456, tzinfo=datetime.timezone.utc)
    table = pa.table(
        {
            "text": pa.array(["a", "bb", "ccc"]).dictionary_encode(),
            "when": pa.array([moment, None, moment], pa.timestamp("ns", "UTC")),
            "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("2.25")], pa.decimal128(5, 2)),
            "small": pa.array([1, None, 3], pa.int8()),
            "vector": pa.array([[0.5], None, []], pa.list_(pa.float32())),
            "raw": pa.array([b"\xff", b"", None]),
            "nan": pa.array([math.nan, math.inf, None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "a.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.field("probability").type == pa.float32()
    assert found.select(table.column_names).to_pylist()[1:] == table.to_pylist()[1:]
    assert [found.schema.field(name).type for name in table.column_names] == [field.type for field in table.schema]
    with pytest.raises(DataError, match=r"column holds bytes: it has no text form\. Write --output as parquet"):
        write(tmp_path / "a.parquet", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    pq.write_table(table.drop_columns("raw"), tmp_path / "b.parquet")
    write(tmp_path / "b.parquet", tmp_path / "out.jsonl")
    first, second, _ = read_json(tmp_path / "out.jsonl")
    assert (first["when"], first["price"], first["nan"], second["nan"]) == (moment.isoformat(), "1.10", None, None)
    write(tmp_path / "b.parquet", tmp_path / "b.csv")
    assert pd.read_csv(tmp_path / "b.csv", keep_default_na=False)["vector"].tolist() == ["[0.5]", "", "[]"]

    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "c.parquet")
    write(tmp_path / "c.parquet", tmp_path / "d.parquet", 2)
    again = Dataset.from_parquet(str(tmp_path / "d.parquet"), cache_dir=str(tmp_path / "cache"))
    assert again.features["label"] == features["label"]
    assert again.column_names == ["text", "label", "prediction", "probability", "prediction_2", "probability_2"]


def test_the_types_of_json_are_those_of_all_its_rows(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "int": 1, "real": 1, "mixed": 1, "bool": True, "list": [1], "none": None},
        {"text": "b", "int": None, "real": 2.5, "mixed": "x", "bool": None, "list": {"k": None}},
        {"text": "c"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write(tmp_path / "a.jsonl", tmp_path / "out.parquet", max_texts=1)
    found = pq.read_table(tmp_path / "out.parquet")
    types = {field.name: str(field.type) for field in found.schema}
    assert types == {
        "text": "string",
        "int": "int64",
        "real": "double",
        "mixed": "string",
        "bool": "bool",
        "list": "string",
        "none": "string",
        "prediction": "string",
        "probability": "float",
    }
    assert found.column("mixed").to_pylist() == ["1", '"x"', None]
    assert found.column("list").to_pylist() == ["[1]", '{"k": null}', None]
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "int": {1 << 70}}}\n')
    with pytest.raises(DataError, match=r"column 'int' of a\.jsonl cannot be written as parquet .*Write --output as jsonl"):
        write(tmp_path / "a.jsonl", tmp_path / "new.parquet")
    assert not (tmp_path / "new.parquet").exists()


@pytest.mark.parametrize(("name", "fails"), [("out.csv", True), ("out.parquet", True), ("out.jsonl", False)])
def test_half_characters_in_other_columns(tmp_path: Path, name: str, fails: bool) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": "\\ud800"}\n')
    if fails:
        with pytest.raises(DataError, match=r"a\.jsonl row 1 .*half of a surrogate pair .*Write --output as jsonl"):
            write(tmp_path / "a.jsonl", tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    else:
        write(tmp_path / "a.jsonl", tmp_path / name)
        assert read_json(tmp_path / name)[0]["x"] == "\ud800"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_with_the_name_of_an_answer_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.csv").write_text("text,prediction_2,probabilities\na,b,c\n")
    write(tmp_path / "a.csv", tmp_path / f"fine.{suffix}")
    with pytest.raises(DataError, match=r"a\.csv has a column 'prediction_2' already: .*Rename that column"):
        write(tmp_path / "a.csv", tmp_path / f"out.{suffix}", 2)
    with pytest.raises(DataError, match=r"a\.csv has a column 'probabilities' already"):
        write(tmp_path / "a.csv", tmp_path / "out.json", 2)
    with pytest.raises(DataError, match=r"fine\.\w+ has a column 'prediction' already"):
        write(tmp_path / f"fine.{suffix}", tmp_path / f"out.{suffix}")


def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for name in ("out.xlsx", "out", "out.csv.zip", "out.parquet.gz", "out.txt"):
        with pytest.raises(UserError, match=r"--output .*the suffix says the format.*Rename it"):
            check_output(tmp_path / name, overwrite=False)
    with pytest.raises(UserError, match=r"cannot be written .*No such file"):
        check_output(tmp_path / "gone" / "out.csv", overwrite=False)
    with pytest.raises(UserError, match=r"cannot be written .*Not a directory|cannot be written .*No such file"):
        check_output(Path("/dev/null/out.csv"), overwrite=False)
    (tmp_path / "old.csv").write_text("precious")
    with pytest.raises(UserError, match=r"old\.csv': it exists\. Choose another name, or set --run\.overwrite"):
        check_output(tmp_path / "old.csv", overwrite=False)
    check_output(tmp_path / "old.csv", overwrite=True)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("folder.csv", "pipe.csv"):
        with pytest.raises(UserError, match=r"it exists\. Choose another name\."):
            check_output(tmp_path / name, overwrite=True)
    assert (tmp_path / "old.csv").read_text() == "precious"
    leftover = tmp_path / f".new.csv.{'0' * 32}"
    leftover.touch()
    check_output(tmp_path / "new.csv", overwrite=False)
    assert not leftover.exists(), "left by a killed process"


def test_an_output_that_cannot_be_published_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    texts = open_file(tmp_path / "a.csv")
    with ExitStack() as stack:
        write_chunk = stack.enter_context(open_answers(tmp_path / "out.csv", texts, NAMES, None))
        for chunk in texts.chunks(2):
            write_chunk(chunk, answer(chunk, None))
        (tmp_path / "out.csv").mkdir()
        with pytest.raises(UserError, match=r"cannot be written .*Is a directory"):
            stack.pop_all().close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_an_error_of_the_user(tmp_path: Path, suffix: str) -> None:
    rows = "".join(f'"{np.random.default_rng(i).bytes(600).hex()}"\n' for i in range(100))
    (tmp_path / "a.csv").write_text("text\n" + rows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*File too large.*\)\. Set it to a writable place"):
            write(tmp_path / "a.csv", tmp_path / f"out.{suffix}", max_texts=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_equal_answers_are_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\nb\n")
    for suffix in ("csv.gz", "jsonl.gz", "parquet"):
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write(tmp_path / "a.csv", tmp_path / folder / f"out.{suffix}")
        assert (tmp_path / "one" / f"out.{suffix}").read_bytes() == (tmp_path / "two" / f"out.{suffix}").read_bytes()


# csv readers of others end a record at a bare carriage return, and drop NUL.
FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


TWO_FIELDS = st.tuples(FIELDS.filter(str.strip), FIELDS)


@settings(max_examples=300)
@given(st.lists(TWO_FIELDS, min_size=1, max_size=4), st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet"]))
def test_random_rows_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[str, str]], suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    source, output = folder / "a.jsonl", folder / f"out.{suffix}"
    source.write_text("".join(f"{json.dumps({'text': text, 'more': more})}\n" for text, more in rows))
    write(source, output, max_texts=3)
    if suffix in ("csv", "tsv"):
        with output.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file, delimiter="\t" if suffix == "tsv" else ","))
    else:
        found = pq.read_table(output).to_pylist() if suffix == "parquet" else read_json(output)
    assert [(row["text"], row["more"]) for row in found] == list(rows)
