"""Strict csv and JSON: the fault, its line and the remedy; recognised dialects are read and said."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agnews_dist.data.corpus import Source, load_corpus
from agnews_dist.data.formats.registry import open_table
from agnews_dist.errors import DataError

HEAD = "text,label\n"
REFUSED = {
    "unclosed": (HEAD + '"Oil rose,0\nA goal,1\n', "line 2: the quote that begins field 1 is not closed"),
    "swallowed": (
        HEAD + '"Oil rose,0\nA goal,1\n20" screen,0\n',
        "line 2: the quoted field 1, closed in line 4, is followed by",
    ),
    "followed": (HEAD + 'a,0\n"Oil" rose,0\n', r"line 3: the quoted field 1 is followed by ' rose,0', not by a separator"),
    "more fields": (HEAD + "a,0\n\nOil, rose,0\n", "line 4 has 3 fields, and the first line 2"),
    "fewer fields": (HEAD + "a,0\nOil rose\n", "line 3 has 1 field, and the first line 2"),
    "carriage return": (HEAD + "Oil\rrose,0\n", "line 2 has a carriage return outside of quotes"),
    "only carriage returns": ("text,label\rOil,0\rA goal,1\r", "line 1 has a carriage return outside of quotes"),
    "space before quote": (HEAD + '0, "Oil"\n', r"line 2: a quote does not begin field 2, ' \"Oil\"'"),
    "single quotes": (HEAD + "'it''s',0\n", "line 2: its fields are in single quotes"),
    "quoted header": ("'text','label'\n'a','0'\n", "line 1: its fields are in single quotes"),
    "doubled backslash": (HEAD + "a\\\\b,0\n", "line 2 has a backslash that may protect the next one"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_csv_that_could_lose_rows_is_refused(tmp_path, fault):
    content, message = REFUSED[fault]
    (tmp_path / "news.csv").write_text(content, newline="")
    advice = (
        "Put texts with line breaks"
        if "return" in message
        else "Name every column"
        if ", and the first" in message
        else "Put texts with"
    )
    with pytest.raises(DataError, match=f"news.csv {message}.*: rows could be lost or changed. {advice}"):
        list(open_table(tmp_path / "news.csv", "news.csv").chunks(("text",)))


READ = {
    "semicolons": ("news.csv", 'text;label\n"a; b";x\n', "a; b", "fields are separated by semicolons"),
    "tabs in csv": ("news.csv", "text\tlabel\na, b\tx\n", "a, b", "fields are separated by tabs"),
    "backslashes": ("news.csv", HEAD + '"He said \\"hi\\", ok",x\n', 'He said "hi", ok', "a backslash protects quotes"),
    "lone backslashes": ("news.csv", HEAD + '"C:\\dir \\"x\\"",x\n', 'C:\\dir "x"', "a backslash protects quotes"),
    "plain backslashes": ("news.csv", HEAD + "C:\\dir \\\\ x,x\n", "C:\\dir \\\\ x", ""),
    "quotes of tsv": ("news.tsv", 'text\tlabel\n"a" movie\tx\n', '"a" movie', "quotes are ordinary characters"),
    "quoted tsv": ("news.tsv", 'text\tlabel\n"a\tb"\tx\n', "a\tb", ""),
    "inner quote": ("news.csv", HEAD + '20" screen,x\n', '20" screen', ""),
    "line break": ("news.csv", HEAD + '"one\r\ntwo",x\r\n', "one\r\ntwo", ""),
    "no last line end": ("news.csv", HEAD + "a,x", "a", ""),
}


@pytest.mark.parametrize("kind", READ)
def test_dialects_are_recognised_and_said(tmp_path, kind):
    name, content, text, note = READ[kind]
    (tmp_path / name).write_text(content, newline="")
    table = open_table(tmp_path / name, name)
    (chunk,) = table.chunks(("text", "label"))
    assert chunk.columns == {"text": [text], "label": ["x"]}
    assert note in table.note
    assert bool(note) == bool(table.note)


def test_rows_inside_a_text_are_an_error(tmp_path):
    path = tmp_path / "news.csv"
    path.write_text(HEAD + 'A vote,0\n"Pipe burst,0\nShares fell,1\nThe team won",1\n')
    source = Source(str(path))
    with pytest.raises(
        DataError, match=r"a field holds whole rows with labels in 1 row \(news.csv row 2\): .* write the file as jsonl"
    ):
        load_corpus(source, validation_fraction=0.1, limits={}, seed=0, hold_out=False)
    path.write_text(HEAD + 'A vote,0\n"Pipe burst, sadly\nShares fell, again",1\n')
    corpus = load_corpus(source, validation_fraction=0.1, limits={}, seed=0, hold_out=False)
    assert list(corpus.splits["train"].texts) == ["A vote", "Pipe burst, sadly\nShares fell, again"]


@pytest.mark.parametrize("layout", ["compact", "indented", "one per line"])
@pytest.mark.parametrize("num_rows", [1, 3, 2_000])
def test_json_arrays_are_read_element_by_element(tmp_path, layout, num_rows):
    rows = [{"text": f'text {i} ] [ " , {{', "label": i, "more": {"deep": [1, 2]}} for i in range(num_rows)]
    content = {
        "compact": json.dumps(rows, separators=(",", ":")),
        "indented": json.dumps(rows, indent=2),
        "one per line": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n\n",
    }[layout]
    (tmp_path / "a.json").write_text(content)
    table = open_table(tmp_path / "a.json", "a.json")
    assert table.columns == ("text", "label", "more")
    assert [label for chunk in table.chunks(("label",)) for label in chunk.columns["label"]] == list(range(num_rows))


@pytest.mark.parametrize("between", ["\n", "", " \n\n"])
@pytest.mark.parametrize("num_rows", [1, 3, 2_000])
def test_objects_over_several_lines_are_read(tmp_path, between, num_rows):
    rows = [{"text": f"text {i} }} {{", "label": i} for i in range(num_rows)]
    (tmp_path / "a.jsonl").write_text(between.join(json.dumps(row, indent=2) for row in rows))
    (chunk,) = open_table(tmp_path / "a.jsonl", "a.jsonl").chunks(("text", "label"))
    assert list(zip(*chunk.columns.values(), strict=True)) == [(row["text"], row["label"]) for row in rows]
    assert chunk.row_N.tolist() == list(range(1, num_rows + 1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"}', "row 3 is not valid JSON: the array is not closed"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "row 2 is not valid JSON"),
        ("a.json", '[{"text": "a"}] [1]', "row 2 is not valid JSON: the array is followed by"),
        ("a.json", '[{"text": "a"}, 5]', "row 2 is '5', not an object"),
        ("a.json", '[{"text": "a"}, {"text": ]', "row 2 is not valid JSON: Expecting value"),
        (
            "a.json",
            '{"text": ["a", "b"], "label": {"0": 1}}',
            "is one object with the fields 'text', 'label', which hold the rows",
        ),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "row 1 is not valid JSON: a key is there twice"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "row 2 is not valid JSON: Expecting ',' delimiter at column 13"),
        ("a.json", '[{"text": "a"},\n {"text": "b" 1}]', "row 2 is not valid JSON: Expecting ',' delimiter at column 14"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"} {"text": "c"}\n', "row 2 is not valid JSON: Extra data"),
        ("a.jsonl", '{\n"text": "a"}\n{"text": "b"\n', "row 2 is not valid JSON"),
        ("a.jsonl", '{\n"text": "a"\n},\n{"text": "b"}\n', "row 2 is not valid JSON: Expecting value"),
        ("a.jsonl", '{"text": "a\tb"}\n', "row 1 is not valid JSON: Invalid control character at column 12"),
    ],
)
def test_json_faults_name_the_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} ({message})"):
        list(open_table(tmp_path / name, name).chunks(("text",)))


def test_a_parquet_file_is_not_held_whole_while_it_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [os.urandom(50).hex() for _ in range(100_000)], "label": ["b", "s"] * 50_000})
    pq.write_table(table, path, row_group_size=10_000, use_dictionary=False, compression="none")
    del table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_table(path, path.name).chunks(("text", "label"))]
    assert len(held) == 10
    assert max(held) < path.stat().st_size / 3
