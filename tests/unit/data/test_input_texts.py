"""Texts to classify: every source and format gives the same texts, and bad input is refused by file and row."""

import gzip
import io
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather
from pyarrow import parquet as pq

from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.input_texts import Format, InputTexts, open_texts
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.errors import ConfigError, DataError

TEXTS = ["Oil rose, said the bank", 'He said "no"', "caf\u00e9 \N{BASEBALL} \u2028 line", "[PAD] <|endoftext|>", "two  spaces "]
WRITERS: dict[str, Callable[[Path, pd.DataFrame], object]] = {
    "a.csv": lambda path, frame: frame.to_csv(path, index=False),
    "a.CSV.gz": lambda path, frame: path.write_bytes(gzip.compress(frame.to_csv(index=False).encode())),
    "bom.csv": lambda path, frame: frame.to_csv(path, index=False, encoding="utf-8-sig"),
    "utf16.csv": lambda path, frame: frame.to_csv(path, index=False, encoding="utf-16"),
    "crlf.csv": lambda path, frame: frame.to_csv(path, index=False, lineterminator="\r\n"),
    "semicolons.csv": lambda path, frame: frame.to_csv(path, index=False, sep=";"),
    "a.tsv": lambda path, frame: frame.to_csv(path, index=False, sep="\t"),
    "a.jsonl": lambda path, frame: frame.to_json(path, orient="records", lines=True),
    "a.NDJSON": lambda path, frame: path.write_text(frame.to_json(orient="records", lines=True, force_ascii=False)),
    "a.json": lambda path, frame: frame.to_json(path, orient="records"),
    "indented.json": lambda path, frame: frame.to_json(path, orient="records", indent=2),
    "a.parquet": lambda path, frame: frame.to_parquet(path, index=False, row_group_size=2),
    "a.feather": lambda path, frame: feather.write_feather(frame, str(path)),
    "a.txt": lambda path, frame: path.write_text("".join(f"{text}\n" for text in frame["text"])),
    "crlf.txt": lambda path, frame: path.write_bytes("\r\n".join(frame["text"]).encode()),
    "a.txt.gz": lambda path, frame: path.write_bytes(gzip.compress("\n".join(frame["text"]).encode())),
}


def open_input(
    file: Path | str | None = None,
    *arguments: str,
    stdin: bytes = b"",
    input_format: Format | None = None,
    text: tuple[str, ...] | None = None,
    keeps_columns: bool = False,
) -> InputTexts:
    return open_texts(
        arguments,
        None if file is None else str(file),
        io.BytesIO(stdin),
        input_format=input_format,
        columns=ColumnSettings(text),
        splits=SplitSettings(),
        keeps_columns=keeps_columns,
    )


def read(texts: InputTexts, max_texts: int = 2) -> tuple[list[object], list[str]]:
    """Check and read the texts in small chunks; returns ids and texts."""
    texts.check()
    chunks = list(texts.chunks(max_texts))
    assert all(0 < len(chunk) <= max_texts for chunk in chunks)
    return [key for chunk in chunks for key in chunk.ids], [text for chunk in chunks for text in chunk.texts]


def refuse(message: str, *arguments: object, kind: type[Exception] = DataError, **options: object) -> None:
    with pytest.raises(kind, match=message):
        read(open_input(*arguments, **options))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_texts_and_ids(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    keys = ["x7", "x6", "x5", "x4", "x3"]
    WRITERS[name](path, pd.DataFrame({"id": keys, "text": TEXTS, "label": [1, 2, 3, 0, 1]}))
    texts = open_input(path)
    ids, found = read(texts)
    assert found == TEXTS
    assert ids == (list(range(5)) if ".txt" in name else keys)
    assert texts.num_texts == 5
    assert texts.notes == (["semicolons.csv: fields are separated by semicolons"] if name.startswith("semi") else [])


def test_arguments_standard_input_and_pipes(tmp_path: Path) -> None:
    assert read(open_input(None, *TEXTS)) == (list(range(5)), TEXTS)
    lines = "\n".join(TEXTS).encode()
    for content in (lines, lines + b"\n", lines.replace(b"\n", b"\r\n"), "\n".join(TEXTS).encode("utf-16")):
        assert read(open_input(stdin=content)) == read(open_input("-", stdin=content)) == (list(range(5)), TEXTS)
    table = pd.DataFrame({"text": TEXTS, "other": 1})
    forms: dict[Format, str] = {
        "csv": table.to_csv(index=False),
        "tsv": table.to_csv(index=False, sep="\t"),
        "jsonl": table.to_json(orient="records", lines=True),
        "json": table.to_json(orient="records"),
    }
    for input_format, content in forms.items():
        assert read(open_input(stdin=content.encode(), input_format=input_format)) == (list(range(5)), TEXTS)
        (tmp_path / "data.dat").write_text(content, encoding="utf-8")
        assert read(open_input(tmp_path / "data.dat", input_format=input_format))[1] == TEXTS
    os.mkfifo(tmp_path / "pipe")
    for input_format in ("txt", "csv"):
        content = lines if input_format == "txt" else forms["csv"].encode()
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        assert read(open_input(tmp_path / "pipe", input_format=input_format))[1] == TEXTS
        writer.join()


def test_text_columns_are_found_or_set(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text("Title,Description,label,category\nOil,rose,1,x\nCup,,2,y\n")
    texts = open_input(path)
    assert read(texts)[1] == ["Oil rose", "Cup"]
    assert texts.notes == ["news.csv: text from 'Title' + 'Description'"]
    assert read(open_input(path, text=("category", "label")))[1] == ["x 1", "y 2"]
    refuse("news.csv has no column 'titel'.*Did you mean 'Title'", path, text=("titel",))
    path.write_text('"3","Wall St.","Bears"\n"4","Space","rocks"\n')
    assert read(open_input(path))[1] == ["Wall St. Bears", "Space rocks"]
    path.write_text("text,sentence\na,b\n")
    refuse("several columns that could be the text.*Set --data.text_column", path)


def test_missing_ids_are_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": "x"}\n{"text": "b"}\n\n{"text": "c", "id": null}\n{"text": "d", "id": 0}\n')
    assert read(open_input(path))[0] == ["x", 1, 2, 0]
    (tmp_path / "a.csv").write_text("id,text\nx,a\n,b\n")
    assert read(open_input(tmp_path / "a.csv"))[0] == ["x", 1]


def test_a_directory_of_parts_is_read_in_order(tmp_path: Path) -> None:
    parts = tmp_path / "out.json"
    parts.mkdir()
    (parts / "_SUCCESS").touch()
    # Spark leaves out keys without a value.
    (parts / "part-00000.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (parts / "part-00001.json").write_text('{"text": "c", "n": 1}\n')
    texts = open_input(parts, keeps_columns=True)
    assert read(texts) == ([0, 1, 2], ["a", "b", "c"])
    assert texts.columns == ("text", "n")
    assert [chunk.column("n") for chunk in texts.chunks(5)] == [[None, None], [1]]
    for name in ("train", "test"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{name}.csv").write_text(f"text,{name}\na,b\n")
    refuse("it holds the splits train, test, and one input is needed.*--data.splits.test none", tmp_path / "two")
    (tmp_path / "types").mkdir()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "types" / "part-0.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": ["1"]}), tmp_path / "types" / "part-1.parquet")
    assert read(open_input(tmp_path / "types"))[1] == ["a", "a"]
    with pytest.raises(DataError, match=r"part-1.parquet has other columns or types than part-0.parquet"):
        open_input(tmp_path / "types", keeps_columns=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,text\n1,a\n2,\n3, \n", r"text is empty or only white space in 2 rows \(a.csv row 2, a.csv row 3\)"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "text is not a string in 1 row .a.jsonl row 2: 3.: .*Fill in"),
        ("a.jsonl", '{"text": "a"}\n{"x": 3}\n', "text is not a string in 1 row .a.jsonl row 2: null.: .*Fill in"),
        ("a.jsonl", '{"text": ["a"]}\n', "text is not a string in 1 row .a.jsonl row 1: "),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl row 1 holds '.*', half of a surrogate pair"),
        ("a.jsonl", '{"text": "a"}\nplain words\n', "a.jsonl row 2 is not valid JSON"),
        ("a.jsonl", '["text"]\n', "a.jsonl row 1 is .*not an object"),
        ("a.csv", "text\na\n\u200b\ufeff \n\\N\n", r"text is empty or only white space in 2 rows \(a.csv row 2, a.csv row 3\)"),
        ("a.txt", "a\n\nb\n", r"text is empty or only white space in 1 row \(a.txt line 2\): .*Remove"),
        ("a.txt", b"a\ntwo \xff\n", "a.txt line 2 has the byte 0xff, which is not valid UTF-8"),
        ("a.csv", 'text,label\n"a,1\nb,2\nc",1\nd,2\n', "a field holds whole rows with labels in 1 row .a.csv row 1.: a quote"),
        ("a.csv", 'text,label\n"a"x,1\n', "a.csv line 2: the quoted field 1 is followed by"),
        ("a.csv", "text,label\na,1\nb\n", "a.csv line 3 has 1 field,"),
        ("a.csv", "text,label\n", "a.csv is empty: there is nothing to classify"),
        ("a.txt", "", "a.txt is empty: there is nothing to classify"),
        ("a.jsonl", "", "a.jsonl is empty: at least one row"),
        ("a.json", "[]", "a.json has no rows: at least one is needed"),
        ("a.parquet", b"PAR1 damaged", "a.parquet cannot be read"),
        ("a.xlsx", b"PK", "no reader knows the suffix '.xlsx' .*Rename it, or set --input_format"),
        ("a.jsonl.lz4", "x", "no reader knows the suffix '.lz4'"),
        ("texts", "a\n", "'.*texts': no reader knows the suffix '' .*set --input_format"),
        ("a.cvs", "text\na\n", r"no reader knows the suffix '.cvs' .*Did you mean '.csv'\?"),
        ("a.txt", "text,label\na,1\n", "a.txt line 1 looks like a csv header: .*Set --input_format"),
        ("a.txt", '{"text": "a"}\n', "a.txt line 1 looks like a JSON object"),
        ("a.txt", '[{"text": "a"}]\n', "a.txt line 1 looks like a JSON array"),
        ("a.txt", b"PAR1\x15\x04\n", "a.txt holds parquet data: that is not what its suffix says"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(message, tmp_path / name)


def test_a_file_is_checked_to_its_end_before_its_first_text(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "a\n" * 25_000 + '" "\n')
    with pytest.raises(DataError, match=r"long\.csv row 25001"):
        open_input(path).check()


def test_a_text_file_may_look_like_a_table_if_its_format_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text,label\nOil,1\n")
    assert read(open_input(tmp_path / "a.txt", input_format="txt"))[1] == ["text,label", "Oil,1"]
    for line in ("Text, they say, is dead", "text", "content: a; b", "[a] b", "1", '"text"'):
        assert read(open_input(stdin=line.encode()))[1] == [line]


def test_a_stream_is_read_as_its_texts_are_needed() -> None:
    """Check that an endless stream gives texts, and that a bad line is an error when it is reached."""
    consumed = 0

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
            nonlocal consumed
            consumed += len(buffer)
            buffer[:] = (b"some text of a line\n" * (len(buffer) // 20 + 1))[: len(buffer)]
            return len(buffer)

    texts = open_texts(
        (),
        None,
        io.BufferedReader(Endless()),
        input_format=None,
        columns=ColumnSettings(),
        splits=SplitSettings(),
        keeps_columns=True,
    )
    texts.check()
    chunks = texts.chunks(1000)
    assert [len(next(chunks)) for _ in range(30)] == [1000] * 30
    assert 20 * 30_000 <= consumed < 20 * 50_000
    lines = open_input(stdin=b"a\n" * 20_000 + b"\n")
    lines.check()
    found = lines.chunks(5_000)
    assert [next(found).ids[0] for _ in range(4)] == [0, 5_000, 10_000, 15_000]
    with pytest.raises(DataError, match="standard input line 20001"):
        next(found)


def test_keys_of_late_json_rows_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 10_000 + '{"text": "b", "new": 1}\n')
    assert len(read(open_input(path))[1]) == 10_001
    with pytest.raises(DataError, match=r"a\.jsonl row 10001 has the key 'new', which no row near the beginning has"):
        open_input(path, keeps_columns=True).check()


def test_contradicting_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(r"--file 'b.txt' and 1 text argument\(s\): only one", "b.txt", "a", kind=ConfigError)
    refuse("--file 'gone.txt': the file cannot be read .*Check the path", "gone.txt")
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text("text\na\n")
    refuse("'new.csv': it is the name of a file, .*Write --file new.csv", None, "new.csv", kind=ConfigError)
    assert read(open_input(None, "gone.csv", "x" * 5000))[1] == ["gone.csv", "x" * 5000]
    refuse(r"text is empty .*\(text argument 2\)", None, "a", " ")
    refuse("text argument 1 holds '.*', half of a surrogate", None, "\ud800")
    message = re.escape(str(tmp_path / "new.csv"))
    if os.getuid() != 0:
        Path("new.csv").chmod(0)
        refuse(f"{message} cannot be read: Permission denied", tmp_path / "new.csv")


def test_columns_and_places_of_a_chunk(tmp_path: Path) -> None:
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        texts = open_input(tmp_path / name, keeps_columns=True)
        chunks = list(texts.chunks(2))
        assert [list(chunk.column("n")) for chunk in chunks] == [[0, 1], [2, 3], [4]]
        assert [chunk.locate(0) for chunk in chunks] == [f"{name} row {i}" for i in (1, 3, 5)]
        assert [chunk.batch is None for chunk in chunks] == [name == "a.jsonl"] * 3
    assert [chunk.batch.column("n").to_pylist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
