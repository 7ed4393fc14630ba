"""Which runs may be compared, and what a comparison shows of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agnews_dist.errors import UserError
from agnews_dist.report.pages.comparison import build_comparison, check_comparable
from agnews_dist.report.pages.details import describe_split
from agnews_dist.report.pages.parts import Section
from agnews_dist.report.pages.stored_run import StoredPredictions, StoredRun

RNG = np.random.default_rng(0)
LABELS_N = RNG.integers(0, 3, 400)
HASH = {"rows": {"test": "a"}}


def compare(runs: Sequence[StoredRun], analysis: dict[str, Any] = HASH) -> dict[str, Section]:
    details = {run.name: {"test": describe_split(run, "test")} for run in runs}
    page = build_comparison(runs, details, {run.name: analysis for run in runs}, "test")
    return {section.key: section for section in page.sections}


def run_of(name: str, accuracy: float, *, labels_N: np.ndarray = LABELS_N, classes: str = "xyz", seed: int = 1) -> StoredRun:
    rng = np.random.default_rng(seed)
    predictions_N = np.where(rng.random(len(labels_N)) < accuracy, labels_N, (labels_N + 1) % 3)
    probabilities_NC = np.full((len(labels_N), 3), 0.1)
    probabilities_NC[np.arange(len(labels_N)), predictions_N] = 0.8
    stored = StoredPredictions(labels_N, predictions_N, probabilities_NC, None, name)
    return StoredRun(
        directory=Path("runs") / name,
        state="finished",
        reason="",
        status={},
        settings={"optim.lr": accuracy, "run.name": name},
        changed={"optim.lr": accuracy},
        result=None,
        events=(),
        predictions={"test": stored},
        class_names=tuple(classes),
    )


def test_check_comparable_returns_the_common_split() -> None:
    assert check_comparable([run_of("a", 0.9), run_of("b", 0.8)], {"a": HASH, "b": HASH}) == "test"


@pytest.mark.parametrize(
    ("other", "analysis", "fault"),
    [
        (run_of("b", 0.8, classes="xyw"), HASH, "its classes differ from those of runs/a"),
        (run_of("b", 0.8, labels_N=LABELS_N[:-1]), HASH, "its 399 test rows are not the 400 of those of runs/a"),
        (run_of("b", 0.8, labels_N=np.roll(LABELS_N, 1)), HASH, "the label of its test row 0 differs from those of runs/a"),
        (run_of("b", 0.8), {"rows": {"test": "b"}}, "its test texts differ from those of runs/a"),
    ],
)
def test_check_comparable_refuses_other_rows(other: StoredRun, analysis: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match="so a paired test is impossible") as caught:
        check_comparable([run_of("a", 0.9), other], {"a": HASH, "b": analysis})
    assert str(caught.value).startswith(f"runs/b: {fault}")


def test_build_comparison_calls_a_better_run_significant_and_an_equal_one_not() -> None:
    runs = [run_of("a", 0.8, seed=1), run_of("better", 0.92, seed=2), run_of("equal", 0.8, seed=3)]
    details = {run.name: {"test": describe_split(run, "test")} for run in runs}
    page = build_comparison(runs, details, {run.name: HASH for run in runs}, "test")
    tests = next(section for section in page.sections if section.key == "tests").tables[0]
    assert [(row[0].text, row[-1].text) for row in tests.rows] == [("better against a", "yes"), ("equal against a", "no")]
    settings = next(section for section in page.sections if section.key == "settings").tables[0]
    assert [[cell.text for cell in row] for row in settings.rows] == [["optim.lr", "0.8", "0.92", "0.8"]]
    assert page.warnings == ()


def test_build_comparison_says_if_texts_are_not_known() -> None:
    runs = [run_of("a", 0.8), run_of("b", 0.8, seed=2)]
    details = {run.name: {"test": describe_split(run, "test")} for run in runs}
    page = build_comparison(runs, details, {"a": HASH, "b": {}}, "test")
    assert page.warnings == ("Not every run has a hash of its texts: only labels and their order were compared.",)


def predict(name: str, wrong: Sequence[int], num_classes: int = 3) -> StoredRun:
    """Make a run that is wrong on some rows of LABELS_N, or of one row per class of more than three."""
    labels_N = LABELS_N if num_classes == 3 else np.arange(num_classes).repeat(2)
    predictions_N = labels_N.copy()
    predictions_N[list(wrong)] = (labels_N[list(wrong)] + 1) % num_classes
    probabilities_NC = np.full((len(labels_N), num_classes), np.nan)
    stored = StoredPredictions(labels_N, predictions_N, probabilities_NC, None, name)
    names = tuple(map(str, range(num_classes)))
    return replace(run_of(name, 0.8), predictions={"test": stored}, class_names=names)


def test_build_comparison_of_more_runs_asks_for_a_smaller_p() -> None:
    """Six rows that only one run has right are p = 0.031."""
    first, other, equal = predict("first", range(6)), predict("other", []), predict("equal", range(6))
    two, three = (compare(runs)["tests"] for runs in ([first, other], [first, other, equal]))
    assert [[row[-1].text for row in each.tables[0].rows] for each in (two, three)] == [["yes"], ["no", "no"]]
    assert "below 0.025 counts as significant" in three.lead


def test_build_comparison_lists_the_classes_that_differ_most() -> None:
    runs = [predict("first", [], 300), predict("other", [599, 598, 400], 300)]
    table = compare(runs)["classes"].tables[0]
    assert {row[0].text for row in table.rows[:4]} == {"299", "0", "200", "201"}
    assert (len(table.rows), table.note) == (50, "The 50 of 300 classes with the largest differences.")
    assert [cell.text for cell in compare(runs)["tests"].tables[0].rows[0]][4] == "-"


def test_build_comparison_shows_texts_that_begin_with_a_bracket() -> None:
    texts = {"texts": {"test": {"0": {"text": "(AP) Oil rises"}}}}
    rows = compare([predict("first", [0]), predict("other", [])], texts)["changed-1"].tables[0].rows
    assert [cell.text for cell in rows[0]][2:] == [f"{(LABELS_N[0] + 1) % 3} (-)", f"{LABELS_N[0]} (-)", "(AP) Oil rises"]
    missing = compare([predict("first", [1]), predict("other", [])], texts)["changed-1"].tables[0].rows
    assert missing[0][-1].text == "(text not at hand)"
