"""Files that were cut off, joined, left out or misnamed: every row is read, or one message names the cause."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from agnews_dist.data.corpus import Source, check_source, load_corpus
from agnews_dist.data.formats.registry import open_table
from agnews_dist.data.local_files import SplitSettings, open_local
from agnews_dist.errors import DataError

CSV = "text,label\nOil rose,b\nA goal,s\n"
TABLE = pa.table({"text": ["Oil rose", "A goal"], "label": ["b", "s"]})
ROWS = [("Oil rose", "b"), ("A goal", "s")]


def rows_of(path: Path, settings: SplitSettings | None = None) -> list[tuple[object, object]]:
    chunks = [
        chunk for table in open_local(path, settings or SplitSettings())["train"] for chunk in table.chunks(("text", "label"))
    ]
    return [pair for chunk in chunks for pair in zip(*chunk.columns.values(), strict=True)]


def load(path: Path, **names: str):
    source = Source(str(path), splits=SplitSettings(names=names))
    return load_corpus(source, validation_fraction=0.5, limits={}, seed=0, hold_out=False)


def stream() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=1)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def protected() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.csv", CSV)
    content = bytearray(sink.getvalue())
    content[6] |= 1
    content[content.find(b"PK\1\2") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", CSV + CSV, r"a.csv line 4 repeats the header: files were probably joined"),
        ("a.csv", CSV + "\ufefftext, label\nx,b\n", "line 4 repeats the header"),
        ("a.csv.bz2", bz2.compress(CSV.encode()) + b"rest", "a.csv.bz2 cannot be decompressed"),
        ("a.csv.xz", lzma.compress(CSV.encode()) + b"rest", "a.csv.xz cannot be decompressed"),
        ("a.csv.bz2", bz2.compress(CSV.encode())[:-3], "ended before the end-of-stream marker"),
        ("a.csv.gz", gzip.compress(CSV.encode()) + b"rest", "a.csv.gz cannot be decompressed"),
        ("a.csv.zip", protected(), "a.csv.zip is protected by a password: .* Unpack it"),
        ("a.zip", protected(), r"a.zip has no suffix of a format before .\.zip.: .* Rename it as in data.csv.zip"),
        ("a.arrow", stream()[:-8], "a.arrow has no mark at the end of its arrow stream: it was cut off"),
        ("a.arrow", stream() * 2, r"a.arrow has [\d,]+ bytes behind its end: files were probably joined"),
        ("a.parquet", parquet()[:-20], "a.parquet cannot be read"),
        ("a.csv", parquet(), "a.csv holds parquet data: .* end in .parquet"),
        ("a.jsonl", gzip.compress(CSV.encode()), "a.jsonl holds gzip data: .* Add .gz"),
        ("a.csv", b"PK\3\4rest", "a.csv is a zip archive or an Excel sheet: .* save the sheet as csv"),
        ("a.csv.gz", gzip.compress(gzip.compress(CSV.encode())), "a.csv.gz holds gzip data"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "a.parquet is a pointer of Git LFS: .* 'git lfs pull'"),
        ("a.csv", "<!DOCTYPE html>\n<html>", "a.csv is a web page"),
        ("a.feather", b"FEA1" + bytes(40), "a.feather has version 1 of Feather"),
        (
            "a.json",
            json.dumps({"version": 1, "data": [{"text": "a"}]}),
            "a.json is one object with the fields 'version', 'data'",
        ),
        ("a.json", '{"text": {"0": "a"}, "label": {"0": "b"}}', r"is one object .* \(pandas: orient='records'\)"),
        ("a.json", '[{"text": "a", "label": 1}][]', "the array is followed by"),
        ("a.json", '[{"text": "a", "label": 1}, {"text"', "row 2 is not valid JSON"),
    ],
    ids=itertools.count(),
)
def test_rows_are_never_lost_in_silence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name)


def parquet_of(num_rows: int, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(num_rows)], "label": ["b"] * num_rows}), sink, **options)
    return sink.getvalue()


def feather_of(num_rows: int, **options: object) -> bytes:
    sink = io.BytesIO()
    labels = pa.array(["b"] * num_rows).dictionary_encode()
    pyarrow.feather.write_feather(pa.table({"text": [f"text {i}" for i in range(num_rows)], "label": labels}), sink, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("suffix", "make", "options"),
    [
        (".parquet", parquet_of, {}),
        (".parquet", parquet_of, {"write_page_index": True, "row_group_size": 7}),
        (".parquet", parquet_of, {"compression": "none", "use_dictionary": False}),
        (".feather", feather_of, {"chunksize": 10}),
        (".arrow", feather_of, {"compression": "uncompressed"}),
    ],
)
def test_joined_files_with_a_footer_are_an_error(tmp_path, suffix, make, options):
    files = {num_rows: make(num_rows, **options) for num_rows in (1, 30, 2_000)}
    path = tmp_path / f"a{suffix}"
    for num_rows, content in files.items():
        path.write_bytes(content)
        assert len(rows_of(path)) == num_rows
    for joined in (*itertools.permutations(files, 2), *itertools.permutations(files, 3), (30, 30)):
        path.write_bytes(b"".join(files[num_rows] for num_rows in joined))
        with pytest.raises(DataError, match=r"bytes behind its end: files were probably joined, and rows would be lost"):
            rows_of(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (np.array([0, 8, 14], np.int32).tobytes(), np.array([0, 8, 1 << 30], np.int32).tobytes(), "ArrowInvalid"),
        (b"Oil rose", b"Oil \xffose", "ArrowInvalid"),
        (b"text\0", b"te\xfft\0", "UnicodeDecodeError"),
    ],
)
def test_damage_inside_an_arrow_file_is_an_error(tmp_path, old, new, message):
    sink = io.BytesIO()
    pyarrow.feather.write_feather(TABLE, sink, compression="uncompressed")
    assert old in sink.getvalue()
    (tmp_path / "a.arrow").write_bytes(sink.getvalue().replace(old, new))
    with pytest.raises(DataError, match=f"a.arrow cannot be read: {message}"):
        rows_of(tmp_path / "a.arrow")


@pytest.mark.parametrize(
    "content", ['text,label,note\na,x,"oops\nb,y,ok\nc,x,bad"\ne,y,ok\n', 'id,text,label\n"1,a,x\n2,b,y\n3",c,x\n4,d,y\n']
)
def test_rows_that_a_quote_swallows_in_another_column_are_an_error(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=r"a field holds whole rows with labels in 1 row \(a.csv row 1\)"):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize("separator", [",", ";"])
def test_the_line_in_which_excel_names_the_separator_is_left_out(tmp_path, separator):
    content = f"sep={separator}\r\ntext{separator}label\r\nOil rose{separator}b\r\nA goal{separator}s\r\n"
    (tmp_path / "a.csv").write_bytes(content.encode("utf-8-sig"))
    assert rows_of(tmp_path / "a.csv") == ROWS


def test_a_header_of_numbers_is_not_ag_news(tmp_path):
    for header in ("0,1,2", "0,text,label", "0, Label ,headline", "0,utterance,intent"):
        (tmp_path / "a.csv").write_text(f"{header}\n1,Oil rose,b\n")
        assert open_table(tmp_path / "a.csv", "a.csv").columns == tuple(header.split(","))


def test_only_columns_that_are_read_need_a_name_of_their_own(tmp_path):
    (tmp_path / "a.csv").write_text("text,x,label,x\nOil rose,1,b,2\nA goal,1,s,2\n")
    assert rows_of(tmp_path / "a.csv") == ROWS
    table = open_table(tmp_path / "a.csv", "a.csv")
    with pytest.raises(DataError, match="two columns of the same name"):
        list(table.chunks(("x",)))


def test_an_array_in_one_line_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("agnews_dist.data.formats.streams.MAX_LINE", 1 << 20)  # shorter than the array
    rows = [{"text": f"text {i} " * 5, "label": i % 2} for i in range(20_000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert rows_of(tmp_path / "a.json") == [(row["text"], row["label"]) for row in rows]


def test_a_text_of_many_lines_with_quotes_is_read(tmp_path):
    # One pass per line took minutes here.
    text = 'x "y" z,\n' * 100_000
    quoted = text.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'text,label\n"{quoted}",b\n')
    assert rows_of(tmp_path / "a.csv") == [(text, "b")]


def write(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(CSV.encode()))
        elif name.endswith(".parquet"):
            pq.write_table(TABLE, path)
        else:
            path.write_text(CSV)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "has 2 of 3 files .*: number 1 is missing"),
        (["data/train-00001-of-00002.csv"], "has 1 of 2 files .*: number 0 is missing"),
        (["train.csv", "train.csv.gz"], "has train.csv and train.csv.gz: probably the same rows twice"),
        (["train.csv", "train-00000-of-00001.csv"], "has train.csv and its parts: probably the same rows twice"),
    ],
)
def test_missing_and_repeated_files_are_an_error(tmp_path, files, message):
    write(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_files_that_cannot_be_read_are_not_left_out(tmp_path):
    write(tmp_path, "train-0.csv")
    link = tmp_path / "train-1.csv"
    link.symlink_to("nowhere.csv")
    with pytest.raises(DataError, match=r"train-1.csv is a link to a file that does not exist"):
        load(tmp_path)
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(DataError, match=r"train-1.csv is not a regular file"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"train-1.csv is not a regular file"):
        load(link)
    link.unlink()
    link.touch()
    with pytest.raises(DataError, match=r"train-1.csv is empty"):
        load(tmp_path)


def test_compressed_parts_without_rows_are_left_out(tmp_path):
    write(tmp_path, "part-00000.csv.gz")
    (tmp_path / "part-00001.csv.gz").write_bytes(gzip.compress(b""))
    assert rows_of(tmp_path) == ROWS


def test_a_shard_of_save_to_disk_that_was_cut_off_is_an_error(tmp_path):
    Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}).save_to_disk(str(tmp_path / "saved"))
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    assert rows_of(tmp_path / "saved") == [("a", "x"), ("b", "y")]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match="has no mark at the end of its arrow stream"):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("configs:\n- data_files: [train.csv, other.txt]", "names other.txt for train: no such data file"),
        ("configs:\n- data_files:\n  - split: train\n    path: /etc/*.csv", "only patterns of files below its directory"),
        ("configs:\n- data_files:\n  - split: train\n    path: ''", "it needs split and path"),
        ("configs:\n- data_files:\n  - path: train.csv", "it needs split and path"),
        ("configs:\n- data_files: 5", "it needs split and path"),
        ("configs: [\n  - {", r"README.md begins with YAML that cannot be read"),
        ("configs:\n- data_files:\n  - split: rest\n    path: train.csv", "has the splits rest: none is train"),
    ],
)
def test_a_card_that_names_the_files_wrongly_is_an_error(tmp_path, front, message):
    write(tmp_path, "train.csv")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Data\n")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("card", ["---\ndate: 2024-99-99\n---\n", "# Data\n\n---\nconfigs:\n- data_files: other.csv\n---\n"])
def test_a_card_without_configs_does_not_matter(tmp_path, card):
    write(tmp_path, "train.csv", "other.csv")
    (tmp_path / "README.md").write_text(card)
    assert rows_of(tmp_path) == ROWS


def test_a_card_may_name_directories(tmp_path):
    write(tmp_path, "one/train.csv", "two/part.csv")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_dir: one\n- config_name: b\n  data_files:\n"
        "  - split: train\n    path: two\n---\n"
    )
    for subset in ("a", "b"):
        assert rows_of(tmp_path, SplitSettings(subset=subset)) == ROWS


def test_settings_of_splits_that_mean_nothing_are_refused(tmp_path):
    write(tmp_path, "train.csv", "test.csv")
    with pytest.raises(DataError, match=r"data.splits.test 'test': data.splits.validation has the same name"):
        load(tmp_path, validation="test", test="test")
    with pytest.raises(DataError, match=r"data.splits.test 'x': .*train.csv is one file and one split"):
        load(tmp_path / "train.csv", test="x")
    assert list(load(tmp_path / "test.csv", train="none", test="test.csv").splits) == ["test"]
    with pytest.raises(DataError, match=r"data.subset 'x': .*train.csv is a file, which has none"):
        open_local(tmp_path / "train.csv", SplitSettings(subset="x"))


@pytest.mark.parametrize("source", ["x" * 300 + ".csv", "./" + "x" * 5000, "a\0b.csv", " "])
def test_impossible_paths_are_wrong_sources(source):
    with pytest.raises(DataError, match=r"data.source .*(does not exist|is empty)"):
        check_source(source)
