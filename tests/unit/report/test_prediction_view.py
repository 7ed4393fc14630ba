"""Output of predict: strict JSON, whatever the numbers and the ids of the input."""

import json
import math

import numpy as np
import pytest

from agnews_dist.evaluation.predictor import InputText
from agnews_dist.report.prediction_view import print_lines


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(math.nan, [math.nan, 0.5]), ({"key": [math.inf, 1.5, None]}, [0.25, 0.75]), ("\u2028", [0.1, 0.9])]
    texts = [(InputText(i, "a text", "line 1"), np.array(probabilities_C)) for i, probabilities_C in rows]
    print_lines(texts, ["bad", "good"])
    output = capsys.readouterr().out
    assert output.isascii()
    found = [json.loads(line, parse_constant=pytest.fail) for line in output.split("\n")[:-1]]
    assert [row["id"] for row in found] == [None, {"key": [None, 1.5, None]}, "\u2028"]
    assert [row["probabilities"] for row in found] == [
        {"bad": None, "good": 0.5},
        {"bad": 0.25, "good": 0.75},
        {"bad": 0.1, "good": 0.9},
    ]
