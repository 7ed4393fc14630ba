"""Rows that are left out of train: by file and row, with everything else as it was."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from agnews_dist.config.schema import DataConfig
from agnews_dist.data.columns import ColumnSettings
from agnews_dist.data.corpus import IN_MEMORY, Source, load_corpus
from agnews_dist.data.given_rows import read_given
from agnews_dist.data.quality import find_faults
from agnews_dist.data.rows import Corpus, RawRows
from agnews_dist.errors import DataError
from agnews_dist.evaluation.label_errors import LabelIssue
from agnews_dist.report.pages.analysis import format_label_issues
from agnews_dist.run.setup import load_text

LABELS = ("a", "b", "c")


def write_source(directory: Path) -> Path:
    """Write train and test as csv; validation is held out of train."""
    directory.mkdir(exist_ok=True)
    for name, num_rows in (("train", 60), ("test", 6)):
        rows = [f"{name} text {row},{LABELS[row % 3]}" for row in range(1, num_rows + 1)]
        (directory / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return directory


def load(source: Path, exclude: Path | None = None, **limits: int) -> Corpus:
    return load_corpus(Source(str(source), exclude=exclude), validation_fraction=0.2, limits=limits, seed=1)


def names_of(corpus: Corpus, split: str = "train") -> list[str]:
    return [corpus.splits[split].origin.name(row) for row in range(len(corpus.splits[split]))]


def write_names(path: Path, names: list[str]) -> Path:
    """Write the names in the format of the suffix."""
    if path.suffix == ".txt":
        path.write_text("\n".join(["", *names, "  "]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"origin": name, "rank": 1}) + "\n" for name in names), encoding="utf-8")
    else:
        pd.DataFrame({"origin": names, "note": ["x, y"] * len(names)}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
@pytest.mark.parametrize("limits", [{}, {"train": 20}])
def test_named_rows_leave_train_and_nothing_else_changes(tmp_path, suffix, limits):
    source = write_source(tmp_path / "data")
    before = load(source, **limits)
    named = names_of(before)[3:9]
    after = load(source, write_names(tmp_path / f"out{suffix}", named), **limits)
    assert names_of(after) == [name for name in names_of(before) if name not in named]
    numbers = [int(name.removeprefix("train.csv row ")) for name in names_of(after)]
    assert list(after.splits["train"].texts) == [f"train text {number}" for number in numbers]
    assert after.splits["train"].labels.tolist() == [number % 3 for number in numbers]
    for split in ("validation", "test"):
        assert list(after.splits[split].texts) == list(before.splits[split].texts)
    assert after.class_names == before.class_names
    assert after.fingerprint != before.fingerprint, "a run cannot resume with other rows"
    assert after.facts["left out"] == f"6 of {len(before.splits['train'])} rows of train"
    assert after.notes == ()


def test_file_without_names_leaves_nothing_out(tmp_path):
    source = write_source(tmp_path / "data")
    assert load(source, write_names(tmp_path / "out.txt", [])).fingerprint == load(source).fingerprint


def test_label_errors_of_a_report_are_taken_and_scored_rows_stay(tmp_path):
    """Pass all of label_errors.csv: it lists rows of every split."""
    source = write_source(tmp_path / "data")
    before = load(source)
    issues = {name: [LabelIssue(row, 0, 1, 0.1, 0.1, 0.9) for row in (0, 2)] for name in ("validation", "test", "train")}
    path = tmp_path / "label_errors.csv"
    path.write_text(format_label_issues(before, issues), encoding="utf-8")
    after = load(source, path)
    assert names_of(after) == [name for row, name in enumerate(names_of(before)) if row not in (0, 2)]
    assert len(after.splits["validation"]) == len(before.splits["validation"])
    (note,) = after.notes
    assert "it also names rows outside of train (validation 2, test 2). These stay" in note


def test_rows_beyond_a_limit_are_known(tmp_path):
    source = write_source(tmp_path / "data")
    unused = next(name for name in names_of(load(source)) if name not in names_of(load(source, train=20)))
    after = load(source, write_names(tmp_path / "out.txt", [unused]), train=20)
    assert names_of(after) == names_of(load(source, train=20))


def test_rows_in_memory_are_named_by_position(tmp_path):
    frame = pd.DataFrame({"text": [f"text {row}" for row in range(12)], "label": list("abc") * 4}, index=list("abcdefghijkl"))

    def read() -> dict[str, RawRows]:
        return read_given({"train": frame}, ColumnSettings())

    before = load_corpus(Source(IN_MEMORY, read_given=read), validation_fraction=0.2, limits={}, seed=1)
    named = names_of(before)[:2]
    assert "(index " in named[0]
    source = Source(IN_MEMORY, read_given=read, exclude=write_names(tmp_path / "out.txt", named))
    after = load_corpus(source, validation_fraction=0.2, limits={}, seed=1)
    assert names_of(after) == names_of(before)[2:]


def test_class_without_rows_is_a_finding(tmp_path):
    source = write_source(tmp_path / "data")
    before = load(source)
    rows = np.flatnonzero(before.splits["train"].labels == 1)
    named = [names_of(before)[row] for row in rows]
    after = load(source, write_names(tmp_path / "out.txt", named))
    assert any(str(each).startswith("1 of 3 classes without a training row (b)") for each in find_faults(after))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train.csv row 61", "train.csv row 5", "other.csv row 1"],
            r"does not have 2 rows that it names \(train.csv row 61, other",
        ),
        (["train.csv row 5", "17"], "line 3 holds '17', which does not name a row"),
        ([f"train.csv row {row}" for row in range(1, 61)], "names all 48 rows of train: nothing is left"),
    ],
)
def test_names_that_cannot_be_left_out_are_errors(tmp_path, names, message):
    with pytest.raises(DataError, match=message) as refused:
        load(write_source(tmp_path / "data"), write_names(tmp_path / "out.txt", names))
    assert "data.exclude" in str(refused.value)
    assert "out.txt" in str(refused.value)


def test_file_that_is_missing_or_has_no_names_is_an_error(tmp_path):
    source, path = write_source(tmp_path / "data"), tmp_path / "out.csv"
    with pytest.raises(DataError, match="no such file"):
        load(source, path)
    path.write_text("split,origins\ntrain,train.csv row 3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"has no column 'origin', only 'split', 'origins'\. Did you mean 'origins'"):
        load(source, path)


def test_only_a_training_leaves_rows_out(tmp_path):
    source = write_source(tmp_path / "data")
    data = DataConfig(source=str(source), exclude=str(write_names(tmp_path / "out.txt", ["train.csv row 1"])))
    assert "train text 1" not in list(load_text(data).splits["train"].texts)
    for hold_out in (True, False):
        scored = load_text(data, hold_out=hold_out, model_classes=LABELS)
        assert "train text 1" in [text for split in scored.splits.values() for text in split.texts]
