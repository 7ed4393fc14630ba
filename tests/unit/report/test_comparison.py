"""Which runs may be compared, and what a comparison shows of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agnews_dist.errors import UserError
from agnews_dist.report.pages.comparison import build_comparison, check_comparable
from agnews_dist.report.pages.details import describe_split
from agnews_dist.report.pages.stored_run import StoredPredictions, StoredRun

RNG = np.random.default_rng(0)
LABELS_N = RNG.integers(0, 3, 400)
HASH = {"rows": {"test": "a"}}


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
        changed={},
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
