"""Cleaning as a command: planted label errors, the training without them, near duplicates, ranks, bad input."""

import csv
import json
import random
from pathlib import Path

import pytest
from support import small_run
from support.processes import python, torchrun

NAMES = ("World", "Sports", "Business", "Sci/Tech")
SHARE = 0.05


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """Rows of the small run with wrong labels in training, and copies of training texts in validation."""
    directory, generator = tmp_path_factory.mktemp("noisy"), random.Random(3)
    found = {
        split: [json.loads(line) for line in (small_run.write_inputs() / f"rows/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    wrong = set(generator.sample(range(len(found["train"])), int(SHARE * len(found["train"]))))
    for row in wrong:
        found["train"][row]["label"] = (found["train"][row]["label"] + generator.randrange(1, 4)) % 4
    found["validation"][5] = {"text": found["train"][17]["text"] + " !", "label": 0}
    # Nearer to each other than to the training row.
    for row in range(6, 10):
        found["validation"][row] = {"text": found["train"][23]["text"] + " quokka", "label": 0}
    for split, each in found.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return directory, wrong


def arguments(rows: Path, directory: Path, *more: str) -> list[str]:
    settings = small_run.settings() | {"data.source": str(rows), "optim.epochs": 4, "data.cache_dir": str(directory / "cache")}
    return [*(word for key, value in settings.items() for word in (f"--{key}", str(value))), *more]


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def cleaned(rows: tuple[Path, set[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clean")
    words = arguments(rows[0], directory, "--output", str(directory / "one"), "--share", str(SHARE))
    done = python("-m", "agnews_dist", "clean", *words)
    assert "train with --data.exclude" in done.stdout
    return directory


def test_planted_errors_are_among_the_first_of_the_list(rows: tuple[Path, set[int]], cleaned: Path) -> None:
    excluded = read(cleaned / "one/exclude.csv")
    assert len(excluded) == len(rows[1])
    found = rows[1] & {int(row["row"]) for row in excluded}
    # At random 5 % of the list would be errors.
    assert len(found) >= 0.4 * len(rows[1])
    issues = read(cleaned / "one/label_issues.csv")
    assert {row["split"] for row in issues} == {"train", "validation", "test"}
    assert [row for row in issues if row["split"] == "train"][: len(excluded)] == excluded


def test_training_without_the_excluded_rows_has_the_scores_that_were_compared(
    rows: tuple[Path, set[int]], cleaned: Path
) -> None:
    report = json.loads((cleaned / "one/clean.json").read_text())
    for name, more in (("before", ()), ("after", ("--data.exclude", str(cleaned / "one/exclude.csv")))):
        words = arguments(rows[0], cleaned, "--run.dir", str(cleaned / "runs"), "--run.name", name, *more)
        python("-m", "agnews_dist", "train", *words)
        splits = json.loads((cleaned / "runs" / name / "result.json").read_text())["splits"]
        for split in ("validation", "test"):
            compared = report["comparison"][split][name]
            assert compared == {key: splits[split][key] for key in compared}
    for each in report["comparison"].values():
        assert 0 <= each["p_value"] <= 1
    assert report["excluded"] == len(rows[1])


def test_near_duplicates_across_splits_are_listed(cleaned: Path) -> None:
    rows = [row for row in read(cleaned / "one/near_duplicates.csv") if row["split"] == "validation"]
    found = {int(row["row"]): row for row in rows if row["train_row"] in ("17", "23")}
    assert {number: found[number]["train_row"] for number in range(5, 10)} == {5: "17"} | dict.fromkeys(range(6, 10), "23")
    assert float(found[5]["similarity"]) > 0.95


def test_second_round_keeps_the_rows_of_the_first(rows: tuple[Path, set[int]], cleaned: Path) -> None:
    first, output = cleaned / "one/exclude.csv", cleaned / "again"
    schedule = ("--model.trainable_blocks", "2", "--model.freeze_schedule", "2,1")
    more = ("--data.exclude", str(first), "--output", str(output), "--share", "0.01", *schedule)
    done = python("-m", "agnews_dist", "clean", *arguments(rows[0], cleaned, *more, "--checkpoint.keep", "5"))
    assert "warning: checkpoint.keep: without effect in a cleaning." in done.stdout + done.stderr
    names = [row["origin"] for row in read(output / "exclude.csv")]
    report = json.loads((output / "clean.json").read_text())
    assert names[report["excluded"] :] == sorted((row["origin"] for row in read(first)), key=lambda name: int(name.split()[-1]))
    assert (report["excluded_before"], len({*names})) == (len(rows[1]), len(rows[1]) + report["excluded"])
    words = ("--run.dir", str(cleaned / "runs"), "--run.name", "again", *schedule)
    words += ("--data.exclude", str(output / "exclude.csv"))
    python("-m", "agnews_dist", "train", *arguments(rows[0], cleaned, *words))
    splits = json.loads((cleaned / "runs/again/result.json").read_text())["splits"]
    compared = report["comparison"]["test"]["after"]
    assert compared == {key: splits["test"][key] for key in compared}


def test_two_ranks_find_the_same(rows: tuple[Path, set[int]], cleaned: Path) -> None:
    words = arguments(rows[0], cleaned, "--output", str(cleaned / "two"), "--share", str(SHARE))
    torchrun(2, "-m", "agnews_dist", "clean", *words)
    for name in ("exclude.csv", "label_issues.csv", "near_duplicates.csv"):
        assert (cleaned / "two" / name).read_bytes() == (cleaned / "one" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--folds", "1"), "--folds '1': it takes a whole number (2 or more, at most 100)"),
        (("--share", "1"), "--share '1': it takes a number"),
        (("--folds", "100", "--data.limit_train", "80"), "--folds 100: every class has fewer texts than folds"),
        (("--output", "{one}"), "holds a clean.json of other scores"),
    ],
)
def test_wrong_cleaning_is_refused(rows: tuple[Path, set[int]], cleaned: Path, more: tuple[str, ...], message: str) -> None:
    words = [word.replace("{one}", str(cleaned / "one")) for word in more]
    done = python("-m", "agnews_dist", "clean", *arguments(rows[0], cleaned), *words, check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr
