"""Scores of a split from its stored predictions, against scikit-learn and sums by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss

from agnews_dist.errors import UserError
from agnews_dist.report.pages.details import describe_split
from agnews_dist.report.pages.stored_run import StoredRun, find_class_names, read_all_predictions, read_predictions

ROWS = [
    (0, [0.7, 0.2, 0.1]),
    (1, [0.6, 0.3, 0.1]),  # wrong
    (2, [0.1, 0.2, 0.7]),
    (2, [0.9, 0.05, 0.05]),  # wrong, and more confident
    (1, [0.2, 0.5, 0.3]),
]


def write(directory: Path, rows: list[tuple[int | None, list[float]]], split: str) -> None:
    lines = [
        json.dumps({"id": i, "label": label, "prediction": int(np.argmax(values)), "probabilities": values})
        for i, (label, values) in enumerate(rows)
    ]
    (directory / f"predictions-{split}.jsonl").write_text("\n".join(lines) + "\n")


def run_of(directory: Path) -> StoredRun:
    predictions = read_all_predictions(directory)
    return StoredRun(
        directory=directory,
        state="finished",
        reason="",
        status={},
        settings={},
        changed={},
        result=None,
        events=(),
        predictions=predictions,
        class_names=find_class_names(directory, (), predictions),
    )


def test_describe_split_lists_confident_mistakes_first(tmp_path: Path) -> None:
    write(tmp_path, ROWS, "test")
    each = describe_split(run_of(tmp_path), "test")
    assert list(each.mistakes) == [3, 1]
    assert [(pair.label, pair.prediction, pair.num_examples, pair.share, pair.rows) for pair in each.pairs] == [
        (1, 0, 1, 0.5, (1,)),
        (2, 0, 1, 0.5, (3,)),
    ]
    labels, predictions = [0, 1, 2, 2, 1], [0, 0, 2, 0, 1]
    assert each.scores.macro_f1 == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert each.calibration.temperature is None, "without validation"


def test_describe_split_fits_the_temperature_on_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits_NC = 3 * rng.normal(size=(800, 3))
    labels_N = np.array([rng.choice(3, p=p) for p in softmax(logits_NC)])
    # Stored probabilities are too confident: their logits are twice as large.
    write(tmp_path, list(zip(labels_N.tolist(), softmax(2 * logits_NC).tolist(), strict=True)), "validation")
    write(tmp_path, list(zip(labels_N[:400].tolist(), softmax(2 * logits_NC[:400]).tolist(), strict=True)), "test")
    calibration = describe_split(run_of(tmp_path), "test").calibration
    assert calibration.temperature is not None
    losses = {t: log_loss(labels_N, softmax(2 * logits_NC / t)) for t in np.linspace(0.5, 4, 351)}
    assert calibration.temperature == pytest.approx(min(losses, key=losses.__getitem__), abs=0.011)
    assert calibration.error_with_temperature is not None
    assert calibration.error_with_temperature < calibration.error


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    wide = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return wide / wide.sum(axis=1, keepdims=True)


def test_split_without_labels_is_not_the_main_one(tmp_path: Path) -> None:
    write(tmp_path, ROWS, "validation")
    write(tmp_path, [(None, values) for _, values in ROWS], "test")
    run = run_of(tmp_path)
    assert (run.main_split, run.is_labelled("test"), run.class_names) == ("validation", False, ("0", "1", "2"))


def test_read_predictions_of_many_classes_keeps_the_most_probable(tmp_path: Path) -> None:
    path = tmp_path / "predictions-test.jsonl"
    path.write_text('{"id": 0, "label": 300, "prediction": 7, "top": [[7, 0.6], [300, 0.25], [1, null]]}\n')
    stored = read_predictions(path)
    assert stored.confidence_N.tolist() == [0.6]
    assert [stored.probability_of(0, label) for label in (7, 300, 2)] == [0.6, 0.25, None]
    assert not stored.has_all_probabilities
    assert len(find_class_names(tmp_path, (), {"test": stored})) == 301


@pytest.mark.parametrize("text", ["", "{", '{"id": 1}', '{"id": 0, "label": 0, "prediction": 0}', "[]"])
def test_read_predictions_refuses_damage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "predictions-test.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="it cannot be read"):
        read_predictions(path)
