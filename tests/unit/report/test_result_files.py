"""result.json and predictions: strict JSON, written whole or not at all, with the documented keys."""

import importlib.util
import json
import math
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from support.scores import scores_of

from agnews_dist.errors import UserError
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.report.result_files import Result, Seconds, versions, write_json, write_predictions


def parse_strictly(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def make_result() -> Result:
    return Result(
        splits={"test": scores_of([[3, 1], [0, 4]], 4.0)},
        num_steps=10,
        num_ranks=2,
        global_batch_size=32,
        global_token_budget=None,
        padding_efficiency=0.97,
        critical_path_efficiency=None,
        rank_balance=1.0,
        seconds=Seconds(total=6.0, setup=1.0, tokenize=1.0, prefix=1.0, train=2.0, eval=1.0),
        tokens_per_second=1234.5,
        peak_memory_bytes=1 << 30,
        feature_cache="host",
        feature_cache_bytes=9_600_000_000,
        versions={"torch": "2.13.0"},
        fingerprints={"config": "abc"},
    )


def test_result_has_the_documented_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", make_result().to_dict())
    found = parse_strictly((tmp_path / "result.json").read_text())
    assert isinstance(found, dict)
    assert list(found) == [
        "splits", "num_steps", "num_ranks", "global_batch_size", "global_token_budget", "padding_efficiency",
        "critical_path_efficiency", "rank_balance", "seconds", "tokens_per_second", "peak_memory_bytes",
        "feature_cache", "feature_cache_bytes", "versions",
        "fingerprints", "note",
    ]  # fmt: skip
    assert found["splits"] == {
        "test": {
            "num_examples": 8,
            "num_correct": 7,
            "accuracy": 0.875,
            "macro_f1": pytest.approx((6 / 7 + 8 / 9) / 2, abs=1e-12),
            "loss": 0.5,
            "confusion": [[3, 1], [0, 4]],
        }
    }
    assert found["seconds"] == {"total": 6, "setup": 1, "tokenize": 1, "prefix": 1, "train": 2, "eval": 1}
    assert found["critical_path_efficiency"] is None


def test_write_json_is_strict_and_accepts_numpy(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": math.nan, "b": (np.float32("inf"), np.int64(3), np.bool_(True)), "c": Path("d"), "é": 0.1})
    assert parse_strictly(path.read_text()) == {"a": None, "b": [None, 3, True], "c": "d", "é": 0.1}
    write_json(path, {"record": scores_of([[1, 0], [0, 0]], math.nan)})
    record = {"num_examples": 1, "num_correct": 1, "accuracy": 1, "macro_f1": 1, "loss": None, "confusion": [[1, 0], [0, 0]]}
    assert parse_strictly(path.read_text()) == {"record": record}
    with pytest.raises(TypeError, match="set has no JSON form"):
        write_json(path, {"a": {1}})


def test_confusion_has_a_line_per_class_and_texts_stay_as_they_are(tmp_path: Path) -> None:
    path, content = (
        tmp_path / "result.json",
        {"confusion": [[1, 0, 12], [0, 3, 0], [0, 0, 4]], "name": "[\n 1,\n 2]", "none": []},
    )
    write_json(path, content)
    text = path.read_text(encoding="utf-8")
    assert "    [1, 0, 12],\n    [0, 3, 0],\n    [0, 0, 4]\n" in text
    assert json.loads(text) == content


def test_write_json_to_a_bad_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match=r"cannot write .*file/result.json .*choose another with --run.dir"):
        write_json(tmp_path / "file" / "result.json", {})
    with pytest.raises(UserError, match="No such file or directory"):
        write_json(tmp_path / "missing" / "result.json", {})


def test_versions_are_the_installed_ones() -> None:
    found = versions()
    always = {"python", "agnews_dist", "torch", "transformers", "accelerate", "numpy"}
    assert set(found) == always | ({"deepspeed"} if importlib.util.find_spec("deepspeed") else set())
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["torch"] == metadata.version("torch")


def make_split(labels: object, predictions: object, probabilities: object) -> SplitScores:
    scores = scores_of([[1]], 0.0)
    return SplitScores(np.asarray(labels), np.asarray(predictions), np.asarray(probabilities, np.float32), scores, seconds=0.0)


def test_predictions_are_exact_in_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 4)) * 20
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels, predictions = rng.integers(0, 4, 50), probabilities.argmax(1)
    path = write_predictions(tmp_path, "test", make_split(labels, predictions, probabilities))
    assert path == tmp_path / "predictions-test.jsonl"
    rows = [parse_strictly(line) for line in path.read_text().splitlines()]
    assert all(isinstance(row, dict) and list(row) == ["id", "label", "prediction", "probabilities"] for row in rows)
    assert [row["id"] for row in rows] == list(range(50))
    assert [row["label"] for row in rows] == labels.tolist()
    assert [row["prediction"] for row in rows] == predictions.tolist()
    np.testing.assert_array_equal(
        np.array([row["probabilities"] for row in rows], np.float32), probabilities.astype(np.float32)
    )


@pytest.mark.parametrize("num_rows", [1, 1000, 2001])
def test_predictions_have_the_documented_bytes(tmp_path: Path, num_rows: int) -> None:
    """Check every byte of `{"id", "label", "prediction", "probabilities"}` against a plain loop, over several blocks."""
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([0.01] * 3, num_rows).astype(np.float32)
    labels, predictions = rng.integers(0, 3, num_rows), probabilities.argmax(axis=1)
    text = write_predictions(tmp_path, "test", make_split(labels, predictions, probabilities)).read_text()
    expected = [
        f'{{"id": {i}, "label": {labels[i]}, "prediction": {predictions[i]}, '
        f'"probabilities": [{probabilities[i][0]!s}, {probabilities[i][1]!s}, {probabilities[i][2]!s}]}}'
        for i in range(num_rows)
    ]
    assert text.splitlines() == expected


def test_predictions_of_many_classes_have_the_most_probable_ones(tmp_path: Path) -> None:
    classes = np.array([[300, 2, 9_999], [0, 1, 2]])
    split = replace(make_split([300, 1], [300, 0], [[0.75, 0.125, 1e-9], [np.nan] * 3]), classes_NK=classes)
    rows = [parse_strictly(line) for line in write_predictions(tmp_path, "test", split).read_text().splitlines()]
    assert rows == [
        {"id": 0, "label": 300, "prediction": 300, "top": [[300, 0.75], [2, 0.125], [9_999, 1e-9]]},
        {"id": 1, "label": 1, "prediction": 0, "top": [[0, None], [1, None], [2, None]]},
    ]


def test_predictions_without_labels_have_null(tmp_path: Path) -> None:
    split = replace(make_split([-1, -1], [1, 0], [[0.25, 0.75], [1, 0]]), scores=None)
    rows = [parse_strictly(line) for line in write_predictions(tmp_path, "test", split).read_text().splitlines()]
    assert [row["label"] for row in rows] == [None, None]
    assert [row["prediction"] for row in rows] == [1, 0]
    assert [row["probabilities"] for row in rows] == [[0.25, 0.75], [1, 0]]


def test_predictions_with_nan_and_uneven_rows(tmp_path: Path) -> None:
    path = write_predictions(tmp_path, "nan", make_split([1], [0], [[np.nan, 1.0]]))
    assert parse_strictly(path.read_text()) == {"id": 0, "label": 1, "prediction": 0, "probabilities": [None, 1.0]}
    with pytest.raises(ValueError, match="zip"):
        write_predictions(tmp_path, "uneven", make_split([1, 0], [0], [[0.5, 0.5]]))
    assert [path.name for path in tmp_path.iterdir()] == ["predictions-nan.jsonl"]
