"""Answers on standard output: strict JSON, whatever the ids of the input."""

import json
import math

import numpy as np
import pytest

from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.formats.line_file import JsonTable
from agnews_dist.data.input_texts import InputTexts
from agnews_dist.evaluation.predictor import reduce_logits
from agnews_dist.report.prediction_view import print_lines, print_table

IDS = [math.nan, {"key": [math.inf, 1.5, None]}, "\u2028", 7]


@pytest.fixture
def chunk(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps({'id': key, 'text': 'a text'})}\n" for key in IDS))
    (chunk,) = InputTexts([JsonTable(path, path.name)], ColumnSettings(), keeps_columns=False).chunks(9)
    return chunk


def test_json_lines_are_strict(chunk, capsys: pytest.CaptureFixture[str]) -> None:
    logits_NC = np.array([[0, 1, 2], [5, 0, 0], [0, 0, 0], [-2, 3, 1]], dtype=np.float32)
    print_lines(chunk, reduce_logits(np.arange(4), logits_NC, None), ["bad", "good", "\u00e9"])
    output = capsys.readouterr().out
    assert output.isascii()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in output.split("\n")[:-1]]
    assert [row["id"] for row in rows] == [None, {"key": [None, 1.5, None]}, "\u2028", 7]
    assert [row["prediction"] for row in rows] == ["\u00e9", "bad", "bad", "good"]
    expected = np.exp(logits_NC.astype(np.float64)) / np.exp(logits_NC.astype(np.float64)).sum(axis=1, keepdims=True)
    assert [list(row["probabilities"].values()) for row in rows] == [pytest.approx(list(row), abs=1e-7) for row in expected]
    assert list(rows[3]["probabilities"]) == ["bad", "good", "\u00e9"]
    print_lines(chunk, reduce_logits(np.arange(4), logits_NC, 2), ["bad", "good", "\u00e9"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(rows[3]["probabilities"]) == ["good", "\u00e9"], "the most probable first"


def test_a_table_shows_the_most_probable_classes(chunk, capsys: pytest.CaptureFixture[str]) -> None:
    logits_NC = np.log(np.array([[0.2, 0.5, 0.3]] * 4, dtype=np.float32))
    print_table(chunk, reduce_logits(np.arange(4), logits_NC, 2), ["first", "second", "third"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("second" in line and "50.0%" in line for line in lines) == 4
    assert sum("third" in line and "30.0%" in line for line in lines) == 4
    assert not any("first" in line for line in lines)
