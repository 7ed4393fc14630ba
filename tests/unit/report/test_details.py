"""Scores of a split from its stored predictions, against scikit-learn and sums by hand."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss

from agnews_dist.errors import UserError
from agnews_dist.report.pages.details import describe_split
from agnews_dist.report.pages.page import build_page, render
from agnews_dist.report.pages.parts import Section
from agnews_dist.report.pages.stored_run import (
    Fields,
    StoredPredictions,
    StoredRun,
    find_class_names,
    read_all_predictions,
    read_predictions,
)

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
    assert each.calibration is not None
    assert (each.calibration.temperature, each.calibration.no_temperature) == (None, "the run has no labelled validation split")


def test_describe_split_fits_the_temperature_on_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits_NC = 3 * rng.normal(size=(800, 3))
    labels_N = np.array([rng.choice(3, p=p) for p in softmax(logits_NC)])
    # Stored probabilities are too confident: their logits are twice as large.
    write(tmp_path, list(zip(labels_N.tolist(), softmax(2 * logits_NC).tolist(), strict=True)), "validation")
    write(tmp_path, list(zip(labels_N[:400].tolist(), softmax(2 * logits_NC[:400]).tolist(), strict=True)), "test")
    calibration, others = (describe_split(run_of(tmp_path), split).calibration for split in ("test", "validation"))
    assert calibration is not None
    assert others is not None
    assert others.temperature is None, "one fit is enough for a run"
    assert calibration.temperature is not None
    losses = {t: log_loss(labels_N, softmax(2 * logits_NC / t)) for t in np.linspace(0.5, 4, 351)}
    assert calibration.temperature == pytest.approx(min(losses, key=losses.__getitem__), abs=0.011)
    assert calibration.error_with_temperature is not None
    assert calibration.error_with_temperature < calibration.error


def section_of(run: StoredRun, key: str, analysis: Fields | None = None) -> Section | None:
    details = {split: describe_split(run, split) for split in run.predictions if run.is_labelled(split)}
    return next((each for each in build_page(run, details, analysis or {}).sections if each.key == key), None)


def test_validation_as_the_main_split_is_called_optimistic(tmp_path: Path) -> None:
    write(tmp_path, 3 * ROWS, "validation")
    run = run_of(tmp_path)
    calibration = describe_split(run, "validation").calibration
    assert calibration is not None
    assert calibration.temperature is not None
    assert calibration.error_with_temperature is None, "these rows have fitted it"
    scores, shown = section_of(run, "scores"), section_of(run, "calibration")
    assert scores is not None
    assert shown is not None
    assert "The weights were chosen on validation, so its scores are optimistic." in scores.lead
    assert "Dividing the logits" not in shown.lead
    assert f"fits validation best is {calibration.temperature:.3f}. What it changes" in shown.lead


def test_temperature_at_its_bound_is_not_used(tmp_path: Path) -> None:
    right = [(label, values) for label, values in ROWS if label == int(np.argmax(values))]
    write(tmp_path, right, "validation")
    write(tmp_path, ROWS, "test")
    shown = section_of(run_of(tmp_path), "calibration")
    assert shown is not None
    assert "is 0.050, which is at its bound" in shown.lead
    assert "Dividing" not in shown.lead


def test_predictions_without_finite_probabilities_have_no_calibration(tmp_path: Path) -> None:
    values = '"prediction": 0, "probabilities": [null, null]'
    lines = [f'{{"id": {i}, "label": {i % 2}, {values}}}' for i in range(4)]
    (tmp_path / "predictions-test.jsonl").write_text("\n".join(lines) + "\n")
    run = run_of(tmp_path)
    details = {"test": describe_split(run, "test")}
    page = build_page(run, details, {})
    assert details["test"].calibration is None
    assert "calibration" not in [section.key for section in page.sections]
    assert [each.label for each in page.headlines] == ["test accuracy", "test macro F1"]
    assert page.headlines[1].detail == "no interval"
    assert not [word for word in render(page, "report.md.j2").split() if word.strip("(),") == "nan"]
    mistakes = section_of(run, "mistakes")
    assert mistakes is not None
    assert [[cell.text for cell in row][3:5] for row in mistakes.tables[1].rows] == [["-", "-"]] * 2


def test_single_rows_without_finite_probabilities_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, ROWS, "test")
    with (tmp_path / "predictions-test.jsonl").open("a") as file:
        file.write('{"id": 5, "label": 0, "prediction": 0, "probabilities": [null, null, null]}\n')
    calibration = describe_split(run_of(tmp_path), "test").calibration
    assert calibration is not None
    assert (calibration.num_left_out, sum(each.num_examples for each in calibration.bins)) == (1, 5)


def test_confused_pairs_have_three_texts_with_probabilities(tmp_path: Path) -> None:
    write(tmp_path, [(1, [0.5 + i / 10, 0.4 - i / 10, 0.1]) for i in range(4)], "test")
    texts = {"texts": {"test": {str(i): {"text": f"text {i}"} for i in range(4)}}}
    section = section_of(run_of(tmp_path), "mistakes", texts)
    assert section is not None
    assert [[cell.text for cell in row] for row in section.tables[0].rows] == [
        ["1", "0", "4", "100.0 %", "0.800", "0.100", "text 3"],
        ["", "", "", "", "0.700", "0.200", "text 2"],
        ["", "", "", "", "0.600", "0.300", "text 1"],
    ]


def test_describe_split_of_10_000_classes_builds_no_matrix(tmp_path: Path) -> None:
    labels_N = np.arange(10_000).repeat(6)
    predictions_N = np.where(labels_N % 3 == 0, labels_N, (labels_N + 1) % 10_000)
    classes_NK, probabilities_NK = predictions_N[:, None], np.full((60_000, 1), 0.7)
    stored = StoredPredictions(labels_N, predictions_N, probabilities_NK, classes_NK, "")
    run = replace(run_of(tmp_path), predictions={"test": stored, "validation": stored}, class_names=("c",) * 10_000)
    tracemalloc.start()
    details = describe_split(run, "test")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert details.macro_f1_interval is not None
    assert details.calibration is not None
    assert details.calibration.no_temperature == "of more than 256 classes only the most probable ones are kept"


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
