"""Columns of text and label: as set, or by their usual names when there is one candidate."""

import json

import pytest

from agnews_dist.data.columns import Columns, ColumnSettings, find_columns, is_original
from agnews_dist.data.corpus import Source, load_corpus
from agnews_dist.data.formats.table import Table
from agnews_dist.errors import DataError


class NamedColumns(Table):
    def __init__(self, *columns: str) -> None:
        self.name, self.columns = "news.csv", columns

    def chunks(self, wanted):
        raise AssertionError(wanted)


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        (("text", "label"), ("text",), "label"),
        (("idx", "sentence", "labels"), ("sentence",), "labels"),
        (("Content", "CLASS", "date"), ("Content",), "CLASS"),
        (("utterance", "intent"), ("utterance",), "intent"),
        (("category", "description", "title"), ("title", "description"), "category"),
        (("Class Index", "Title", "Description"), ("Title", "Description"), "Class Index"),
        (("text", "target", "title"), ("text",), "target"),
    ],
)
def test_usual_names_are_found(columns, text, label):
    assert find_columns(NamedColumns(*columns), ColumnSettings()) == Columns(text, label)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("text", "content", "label"), "several columns that could be the text: 'text' or 'content'. Set --data.text_column"),
        (
            ("text", "title", "description", "label"),
            r"several columns that could be the text: 'text' or 'title' \+ 'description'",
        ),
        (("text", "label", "class"), r"several columns that could be the label: 'label' or 'class'. Set --data.label_column"),
        (("headline", "label"), r"no column that is usually the text \(found: 'headline', 'label'; usual: text, sentence"),
        (("text", "topic"), r"no column that is usually the label \(found: 'topic', next to the text; usual: label, labels"),
    ],
)
def test_columns_that_are_not_clear_are_refused(columns, message):
    with pytest.raises(DataError, match=f"news.csv has {message}"):
        find_columns(NamedColumns(*columns), ColumnSettings())


def test_settings_come_first():
    table = NamedColumns("text", "headline", "body", "label", "topic")
    assert find_columns(table, ColumnSettings(("headline", "body"), "topic")) == Columns(("headline", "body"), "topic")
    with pytest.raises(DataError, match=r"has no column 'headlin' .*data.text_column names it. Did you mean 'headline'\?"):
        find_columns(table, ColumnSettings(("headlin",)))
    with pytest.raises(DataError, match=r"data.text_column 'body,body': a column is there twice"):
        find_columns(table, ColumnSettings(("body", "body")))
    with pytest.raises(DataError, match=r"data.label_column 'text': it is the text column"):
        find_columns(table, ColumnSettings(label="text"))


@pytest.mark.parametrize(
    ("columns", "has_header", "expected"),
    [
        (("class", "title", "description"), False, True),
        (("Class Index", "Title", "Description"), True, True),
        (("class", "title", "description"), True, False),  # anyone's
        (("class", "title", "description", "date"), False, False),
    ],
)
def test_the_original_columns_have_no_header_or_that_of_the_copies(columns, has_header, expected):
    table = NamedColumns(*columns)
    table.has_header = has_header
    assert is_original(table, find_columns(table, ColumnSettings())) == expected


def test_columns_that_differ_in_case_are_refused():
    table = NamedColumns("Text", "label", "TEXT")
    with pytest.raises(DataError, match=r"columns 'Text' and 'TEXT' could both be 'text'.* --data.text_column"):
        find_columns(table, ColumnSettings())
    assert find_columns(table, ColumnSettings(text=("TEXT",))).text == ("TEXT",)


def test_texts_of_several_columns_are_joined(tmp_path):
    rows = [
        {"title": "A", "description": "b", "label": 0},
        {"title": "A", "description": None, "label": 1},
        {"title": "", "description": "b", "label": 1},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for separator, expected in ((" ", ["A b", "A", "b"]), (" :: ", ["A :: b", "A", "b"])):
        source = Source(str(path), columns=ColumnSettings(separator=separator))
        corpus = load_corpus(source, validation_fraction=0.1, limits={}, seed=0, hold_out=False)
        assert list(corpus.splits["train"].texts) == expected
        assert corpus.facts["columns"] == "text from 'title' + 'description', label from 'label'"
