"""The report of real runs: in a browser, its numbers computed again by scikit-learn, incomplete runs, comparisons, the list."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from playwright.sync_api import Browser
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from support import fork_server, processes, small_run
from support.processes import wait_until
from support.report_page import open_browser, show
from support.timeline import Timeline

from agnews_dist import events

PREEMPTED = 75
FIGURES = {"baselines", "loss", "accuracy", "learning_rate", "throughput", "calibration", "length", "lengths", "time"}
SECTIONS = ["scores", "curves", "classes", "calibration", "length", "mistakes", "labels", "data", "time", "batches", "settings"]


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, with its report."""
    return small_run.finish(tmp_path_factory.mktemp("news"), "--report.write", "true")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


def agnews(*words: str, check: bool = True):
    return fork_server.run_python("-m", "agnews_dist", *words, check=check)


def read_predictions(run: Path, split: str = "test") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [json.loads(line) for line in (run / f"predictions-{split}.jsonl").read_text().splitlines()]
    return (*(np.array([row[key] for row in rows]) for key in ("label", "prediction", "probabilities")),)


def shorten(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]} ..."


def copy_run(run: Path, directory: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(run, directory / name, ignore=shutil.ignore_patterns("checkpoints")))


def test_page_has_every_part_without_network(news: Path, browser: Browser) -> None:
    shown = show(browser, news / "report.html", width=1280)
    assert shown.messages == []
    assert shown.requests == [(news / "report.html").as_uri(), "data:,"][: len(shown.requests)]
    assert shown.measure("[...document.querySelectorAll('section')].map(s => s.id)") == SECTIONS
    assert {path.stem for path in (news / "figures").iterdir()} == FIGURES
    boxes = shown.measure("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert len(boxes) == len(FIGURES)
    assert min(boxes) > 100
    # Text stays text, so that it can be searched, read aloud and scaled.
    assert shown.measure("[...document.querySelectorAll('svg')].every(s => s.querySelectorAll('text').length > 4)")
    ids = shown.measure("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    links = shown.measure("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert links == SECTIONS


@pytest.mark.parametrize(("width", "media"), [(360, "screen"), (1280, "screen"), (720, "print")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_legible(news: Path, browser: Browser, width: int, media: str, scheme: str) -> None:
    shown = show(browser, news / "report.html", width=width, scheme=scheme, media=media)
    assert shown.messages == []
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert shown.measure(overflow) == 0
    # A phone must not need to zoom into a figure.
    script = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
    assert min(shown.measure(script)) > 7
    colour = "e => getComputedStyle(e).color"
    ink = shown.page.locator("h1").evaluate(colour)
    paper = shown.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    is_dark = scheme == "dark" and media == "screen"
    assert (luminance(paper) < 0.1) == is_dark
    assert contrast(ink, paper) > 7
    for label in shown.page.locator("svg text").all()[:3]:
        assert contrast(label.evaluate("e => getComputedStyle(e).fill"), paper) > 4.5


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2)."""
    parts = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_numbers_are_those_of_scikit_learn(news: Path, browser: Browser) -> None:
    shown = show(browser, news / "report.html", width=1280)
    for row, split in zip(shown.table("scores"), ("validation", "test"), strict=True):
        labels, predictions, _ = read_predictions(news, split)
        right = int((labels == predictions).sum())
        interval = binomtest(right, len(labels)).proportion_ci(0.95, method="wilson")
        macro = f1_score(labels, predictions, average="macro")
        assert row[:5] == [
            split,
            str(len(labels)),
            f"{right / len(labels):.4f}",
            f"{interval.low:.3f} to {interval.high:.3f}",
            f"{macro:.4f}",
        ]
        low, high = map(float, row[5].split(" to "))
        assert low < macro < high
        assert high - low < 0.25
    labels, predictions, probabilities = read_predictions(news)
    table = precision_recall_fscore_support(labels, predictions, labels=range(4), zero_division=np.nan)
    expected = [[f"{n}", *("-" if np.isnan(v) else f"{v:.4f}" for v in (p, r, f))] for p, r, f, n in zip(*table, strict=True)]
    assert [row[1:] for row in shown.table("classes")] == expected
    matrix = confusion_matrix(labels, predictions, labels=range(4))
    assert [row[1:] for row in shown.table("classes", 1)] == matrix.astype(str).tolist()
    # Expected calibration error, computed row by row.
    confidence, is_right = probabilities.max(axis=1), labels == predictions
    number = np.minimum((confidence * 15).astype(int), 14)
    error = sum(abs(is_right[number == b].mean() - confidence[number == b].mean()) * (number == b).mean() for b in set(number))
    assert f"test: {100 * error:.1f} %" in shown.page.locator("#calibration p").first.inner_text()
    wrong = np.flatnonzero(~is_right)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:50]
    mistakes = shown.table("mistakes", 1)
    assert [int(row[0]) for row in mistakes] == worst.tolist()
    texts = [json.loads(line)["text"] for line in (small_run.write_inputs() / "rows" / "test.jsonl").read_text().splitlines()]
    assert [row[5] for row in mistakes] == [shorten(texts[row]) for row in worst]


def test_probable_label_errors_are_listed_with_their_origin(news: Path, browser: Browser) -> None:
    with (news / "label_errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == {"validation", "test", "train"}
    lines = (small_run.write_inputs() / "rows" / "train.jsonl").read_text().splitlines()
    train = [row for row in rows if row["split"] == "train"]
    assert len(train) > 10
    assert [int(row["rank"]) for row in train] == list(range(1, len(train) + 1))
    for row in train:
        source = json.loads(lines[int(row["row"])])
        assert (row["text"], row["label"]) == (source["text"], f"LABEL_{source['label']}")
        assert row["suggested"] != row["label"]
        assert row["origin"] == f"train.jsonl row {int(row['row']) + 1}"
    shown = show(browser, news / "report.html", width=1280)
    assert [int(line[0]) for line in shown.table("labels", 2)] == [int(row["row"]) for row in train]


def test_page_shows_baselines_times_and_settings(news: Path, browser: Browser) -> None:
    shown = show(browser, news / "report.html", width=1280)
    names = [row[0] for row in shown.table("scores", 1)]
    assert names[0] == "this run"
    assert len(names) == 4
    majority = next(row for row in shown.table("scores", 1) if "majority" in row[0])
    labels, _, _ = read_predictions(news)
    train = [json.loads(line)["label"] for line in (small_run.write_inputs() / "rows" / "train.jsonl").read_text().splitlines()]
    classes = sorted(set(train))
    most = max(classes, key=lambda name: (train.count(name), -classes.index(name)))
    assert float(majority[1]) == pytest.approx((labels == classes.index(most)).mean(), abs=1e-4)
    seconds = json.loads((news / "result.json").read_text())["seconds"]
    times = {row[0]: row[1] for row in shown.table("time")}
    assert times["total"] == f"{seconds['total']:,.1f}"
    assert times["frozen part"] == f"{seconds['prefix']:,.1f}"
    settings = dict(row[:2] for row in shown.table("settings"))
    assert settings["optim.lr"] == "0.002"
    assert settings["batch.global_batch_size"] == "16"
    assert "run.name" not in settings
    command = shown.page.locator("#settings code").inner_text()
    assert command == f"torchrun --nproc_per_node=2 -m agnews_dist.train --config {news}/config.yaml --run.name small-again"


def test_markdown_has_the_same_tables_and_figures(news: Path) -> None:
    text = (news / "report.md").read_text()
    assert {Path(name).stem for name in re.findall(r"!\[.*?\]\((figures/[^)]*)\)", text)} == FIGURES
    assert all((news / name).stat().st_size > 5000 for name in re.findall(r"\((figures/[^)]*)\)", text))
    scores = json.loads((news / "result.json").read_text())["splits"]["test"]
    assert f"| test | {scores['num_examples']} | {scores['accuracy']:.4f} |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_report_is_built_again_from_what_the_run_left(news: Path, tmp_path: Path) -> None:
    moved = copy_run(news, tmp_path)
    before = (moved / "report.html").read_text()
    (moved / "report.html").unlink()
    shutil.rmtree(moved / "figures")
    done = agnews("report", str(moved), "--data.source", str(tmp_path / "nowhere"))
    assert f"{moved}/report.html written" in done.stdout
    assert without_name((moved / "report.html").read_text(), moved).replace(f"<td>{news}</td>", "") == without_name(
        before, news
    )


def without_name(page: str, run: Path) -> str:
    """Remove the name of a run from its page: it is the title, and part of the command."""
    for around in ("{}-again", "<title>{}<", "<h1>{} "):
        page = page.replace(around.format(run.name), around)
    return page.replace(str(run), "RUN").replace("<td>RUN</td>", "")


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        (["events.jsonl"], "events.jsonl cannot be read"),
        (["result.json"], "result.json cannot be read"),
        (["predictions-test.jsonl", "predictions-validation.jsonl"], "no files of predictions"),
        (
            ["status.json", "analysis.json"],
            "the rows of its data are not those it was trained and scored on. Set --data.source to the same rows.",
        ),
        (["analysis.json"], "Texts, baselines and label errors are left out"),
    ],
)
def test_report_says_what_is_missing(news: Path, tmp_path: Path, lost: list[str], expected: str) -> None:
    copy = copy_run(news, tmp_path)
    for name in lost:
        (copy / name).unlink()
    source = tmp_path / "nowhere"
    if "status.json" in lost:
        source = tmp_path / "rows"
        shutil.copytree(small_run.write_inputs() / "rows", source)
        lines = (source / "test.jsonl").read_text().splitlines()
        (source / "test.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    agnews("report", str(copy), "--data.source", str(source))
    text = (copy / "report.md").read_text()
    assert expected in text.replace("\\", "")
    assert "## Settings and machine" in text


def test_report_of_an_older_version_ignores_settings_that_went(news: Path, tmp_path: Path) -> None:
    copy = copy_run(news, tmp_path)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("\noptim:\n", "\noptim:\n  momentum: 0.9\n", 1))
    agnews("report", str(copy))
    assert "| optim.lr | 0.002 |" in (copy / "report.md").read_text()


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (
            lambda run: (run / "config.yaml").unlink(),
            "it is not a run's directory, which has a config.yaml. Give the directory of a run",
        ),
        (
            lambda run: (run / "predictions-test.jsonl").write_text('{"id": 1}\n'),
            "predictions-test.jsonl line 1: it cannot be read (id 1). Write it again with the same training.",
        ),
    ],
)
def test_damaged_run_is_an_error(news: Path, tmp_path: Path, prepare: Any, expected: str) -> None:
    copy = copy_run(news, tmp_path)
    prepare(copy)
    done = agnews("report", str(copy), check=False)
    assert done.returncode == 1
    assert expected in done.stderr


def test_directory_that_cannot_be_written_is_an_error(news: Path, tmp_path: Path) -> None:
    copy = copy_run(news, tmp_path)
    # Root may write anywhere, but not below a file.
    shutil.rmtree(copy / "figures")
    (copy / "figures").mkdir()
    (copy / "report.md").unlink()
    (copy / "report.md").mkdir()
    done = agnews("report", str(copy), check=False)
    assert done.returncode == 1
    assert "it cannot be written (Is a directory). Free space there, make it writable, or set --output." in done.stderr
    assert "Traceback" not in done.stderr


def test_stopped_run_has_a_report_of_what_it_has_done(tmp_path: Path) -> None:
    run = small_run.run_directory(tmp_path)
    job = small_run.start(tmp_path, "--report.write", "true", "--optim.epochs", "200")
    assert wait_until(lambda: Timeline(run).steps > 20)
    job.signal("rank 0", signal.SIGTERM)
    small_run.wait_for(job, tmp_path, codes=PREEMPTED)
    text = (run / "report.md").read_text()
    assert "The run is preempted" in text
    assert "## Training" in text
    assert "figures/loss.png" in text


def change_predictions(run: Path, seed: int, share: float, *, to_right: bool) -> None:
    """Replace the prediction of a share of the wrong (or right) test rows."""
    path, rng = run / "predictions-test.jsonl", np.random.default_rng(seed)
    lines = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if (row["label"] != row["prediction"]) == to_right and rng.random() < share:
            wanted = row["label"] if to_right else (row["label"] + 1) % 4
            values = row["probabilities"]
            values[wanted], values[row["prediction"]] = values[row["prediction"]], values[wanted]
            row |= {"prediction": wanted, "probabilities": values}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def test_comparison_finds_a_better_run(news: Path, tmp_path: Path, browser: Browser) -> None:
    better = copy_run(news, tmp_path, "better")
    change_predictions(better, 0, 0.4, to_right=True)
    agnews("report", str(news), str(better), "--output", str(tmp_path / "page"))
    # The analysis of other predictions is not used.
    analysis = json.loads((better / "analysis.json").read_text())
    predictions = (better / "predictions-test.jsonl").read_bytes()
    assert analysis["predictions"]["test"] == hashlib.sha256(predictions).hexdigest()
    shown = show(browser, tmp_path / "page" / "report.html", width=360)
    assert shown.messages == []
    assert shown.measure("document.documentElement.scrollWidth") == 360
    labels, one, _ = read_predictions(news)
    _, other, _ = read_predictions(better)
    only_other, only_one = ((other == labels) & (one != labels)).sum(), ((one == labels) & (other != labels)).sum()
    [row] = shown.table("tests")
    assert row[1] == f"{(other == labels).mean() - (one == labels).mean():+.4f}"
    assert row[5:7] == [str(only_other), str(only_one)]
    assert row[7] == f"{binomtest(int(only_other), int(only_one + only_other)).pvalue:.2g}"
    assert row[8] == "yes"
    changed = shown.table("changed-1")
    assert sorted(int(line[0]) for line in changed) == np.flatnonzero(one != other).tolist()[:100]
    texts = [json.loads(line)["text"] for line in (small_run.write_inputs() / "rows" / "test.jsonl").read_text().splitlines()]
    assert [line[4] for line in changed] == [shorten(texts[int(line[0])]) for line in changed]


def test_rows_with_other_texts_are_not_those_of_the_run(news: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run.write_inputs() / "rows", tmp_path / "rows")
    path = tmp_path / "rows" / "test.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "Other words. '))
    copy = copy_run(news, tmp_path)
    agnews("report", str(copy), "--recompute", "--data.source", str(tmp_path / "rows"))
    text = (copy / "report.md").read_text()
    assert "the rows of its data are not those it was trained and scored on" in text
    assert "Other words" not in text


def test_report_is_written_elsewhere_but_not_over_other_files(news: Path, tmp_path: Path) -> None:
    copy = copy_run(news, tmp_path)
    (copy / "report.html").unlink()
    done = agnews("report", str(copy), "--output", str(tmp_path / "page"))
    assert f"{tmp_path}/page/report.html written" in done.stdout
    assert not (copy / "report.html").exists()
    (tmp_path / "paper" / "figures").mkdir(parents=True)
    (tmp_path / "paper" / "figures" / "mine.pdf").touch()
    for output in (tmp_path / "paper", news):
        refused = agnews("report", str(news), str(copy), "--output", str(output), check=False)
        assert refused.returncode == 1
        assert f"--output {output}: it holds other files than a report" in refused.stderr
    assert (tmp_path / "paper" / "figures" / "mine.pdf").exists()
    agnews("report", str(news), str(copy), "--output", str(tmp_path / "page"))
    assert "small against copy" in (tmp_path / "page" / "report.md").read_text()


def test_damaged_files_count_as_absent(news: Path, tmp_path: Path) -> None:
    copy = copy_run(news, tmp_path)
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps({**result, "splits": None}))
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps({**status, "time": "yesterday"}))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"  precision: .*", "  precision: fp8", config))
    lines = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "CheckpointSaved":
            del line["stall"]
    (copy / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "Unknown"}\n[]\n{"eve')
    [run] = json.loads(agnews("runs", str(tmp_path), "--json").stdout)["runs"]
    assert (run["scores"], run["age_seconds"], run["changed"]["engine.precision"]) == ({}, None, "fp8")
    assert set(run["changed"]) - {"engine.precision"} == set(small_run.settings()) | {
        "optim.epochs",
        "checkpoint.every_steps",
        "engine.timeout_seconds",
        "data.cache_dir",
    }
    agnews("report", str(copy))
    assert "result.json cannot be read" in (copy / "report.md").read_text()


def test_run_is_known_by_its_own_name(news: Path, tmp_path: Path) -> None:
    copy = copy_run(news, tmp_path, "one")
    (tmp_path / "link").symlink_to(copy)
    assert [run["name"] for run in json.loads(agnews("runs", str(tmp_path), "--json").stdout)["runs"]] == ["one"]
    code = "import os, sys; os.chdir(sys.argv.pop(1))\nfrom agnews_dist.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    fork_server.run_python("-c", code, str(tmp_path / "link"), "report", ".")
    assert (copy / "report.md").read_text().startswith("# one\n")


SLOW = """
import sys, time
from agnews_dist.report.pages import analysis

baselines = analysis.majority_baseline

def begin(*arguments):
    print("analysing", flush=True)
    time.sleep(2)
    return baselines(*arguments)

analysis.majority_baseline = begin
from agnews_dist.__main__ import main

sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_stop_during_the_report_leaves_a_finished_run(tmp_path: Path) -> None:
    """The run ends with 0 and its last event: nothing is left to do."""
    words = [*small_run.arguments(tmp_path), "--report.write", "true"]
    log = tmp_path / "log.txt"
    process = fork_server.start(["-c", SLOW, *words], processes.environment(), fork_server.Streams(log, log))
    assert wait_until(lambda: log.exists() and "analysing" in log.read_text())
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    run = small_run.run_directory(tmp_path)
    assert "the run was asked to stop. Run agnews-dist report RUN later." in (run / "report.md").read_text()
    assert small_run.read_status(tmp_path)["state"] == "finished"
    assert Timeline(run).events()[-1]["event"] == "RunDone"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda rows: rows[:-1], "its 149 test rows are not the 150 of those of"),
        (lambda rows: [*rows[1:], rows[0]], "the label of its test row"),
        (None, "it is finished and has no predictions with labels"),
    ],
)
def test_runs_on_other_rows_are_not_compared(news: Path, tmp_path: Path, prepare: Any, expected: str) -> None:
    other = copy_run(news, tmp_path, "other")
    path = other / "predictions-test.jsonl"
    if prepare is None:
        path.unlink()
        (other / "predictions-validation.jsonl").unlink()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(prepare(rows))))
    done = agnews("report", str(news), str(other), "--output", str(tmp_path / "page"), check=False)
    assert done.returncode == 1
    assert expected in done.stderr
    assert not (tmp_path / "page").exists()


def test_runs_on_other_texts_with_the_same_labels_are_not_compared(news: Path, tmp_path: Path) -> None:
    other = copy_run(news, tmp_path, "other")
    analysis = json.loads((other / "analysis.json").read_text())
    analysis["rows"]["test"] = "0" * 64
    (other / "analysis.json").write_text(json.dumps(analysis))
    done = agnews("report", str(news), str(other), "--output", str(tmp_path / "page"), check=False)
    assert done.returncode == 1
    assert f"{other}: its test texts differ from those of {news}" in done.stderr


def test_two_seeds_are_not_significant(tmp_path: Path) -> None:
    """Seven seeds are 21 pairs. At 95 %, one of them would be significant by chance."""
    for seeds in ((0, 1), (2, 3), (4, 5), (6,)):
        jobs = [small_run.start(tmp_path / str(seed), "--run.seed", str(seed), num_ranks=1) for seed in seeds]
        for seed, job in zip(seeds, jobs, strict=True):
            small_run.wait_for(job, tmp_path / str(seed))
    p_values = []
    for one, other in itertools.combinations(range(7), 2):
        labels, first, _ = read_predictions(small_run.run_directory(tmp_path / str(one)))
        _, second, _ = read_predictions(small_run.run_directory(tmp_path / str(other)))
        p_values.append(mcnemar(labels, first, second))
    assert sum(p < 0.05 for p in p_values) <= 2, p_values


def mcnemar(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    from agnews_dist.evaluation.paired import mcnemar_exact

    return mcnemar_exact(labels, first, second).p_value


def test_list_of_runs_has_states_scores_and_settings(news: Path, tmp_path: Path) -> None:
    copy_run(news, tmp_path, "one")
    killed = copy_run(news, tmp_path, "two")
    status = json.loads((killed / "status.json").read_text())
    (killed / "status.json").write_text(json.dumps({**status, "state": "running", "time": "2026-01-01T00:00:00+00:00"}))
    (killed / "result.json").unlink()
    (tmp_path / "no run").mkdir()
    shown = json.loads(agnews("runs", str(tmp_path), "--json").stdout)
    assert shown["format"] == 1
    assert [(run["name"], run["state"]) for run in shown["runs"]] == [("one", "finished"), ("two", "killed")]
    first = shown["runs"][0]
    scores = json.loads((news / "result.json").read_text())["splits"]
    assert {split: each["accuracy"] for split, each in first["scores"].items()} == {
        s: each["accuracy"] for s, each in scores.items()
    }
    assert first["changed"]["optim.lr"] == 0.002
    assert first["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert shown["runs"][1]["scores"] == {}
    assert shown["runs"][1]["age_seconds"] > 86400
    lines = agnews("runs", str(tmp_path), "--sort", "test").stdout.splitlines()
    assert lines[0].startswith(f"one  finished  76  {scores['validation']['accuracy']:.4f}  {scores['test']['accuracy']:.4f}")
    assert lines[1].startswith("two  killed  76  -  -")


def test_list_of_a_directory_without_runs_is_empty(tmp_path: Path) -> None:
    assert agnews("runs", str(tmp_path)).stdout == f"no run below {tmp_path}\n"
    done = agnews("runs", str(tmp_path / "nowhere"), check=False)
    assert done.returncode == 1
    assert "it cannot be listed (No such file or directory). Give the directory of the runs" in done.stderr


def test_run_without_the_packages_ends_with_a_warning(news: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['cleanlab'] = None\nfrom agnews_dist.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    place = [
        "--run.dir",
        str(tmp_path),
        "--run.name",
        "bare",
        "--data.cache_dir",
        str(tmp_path / "cache"),
        "--optim.epochs",
        "1",
    ]
    words = [word for key, value in small_run.settings().items() for word in (f"--{key}", str(value))]
    done = fork_server.run_python("-c", code, "train", *words, *place)
    assert "warning: no report: cleanlab not installed. Run pip install agnews_dist[report]." in done.stdout
    assert json.loads((tmp_path / "bare" / "status.json").read_text())["state"] == "finished"
    assert not (tmp_path / "bare" / "report.html").exists()
    failed = fork_server.run_python("-c", code, "report", str(news), check=False)
    assert failed.returncode == 1
    assert failed.stderr == "error: report: cleanlab not installed. Run pip install agnews_dist[report].\n"


def test_fields_of_events_are_documented() -> None:
    page = (processes.REPOSITORY / "docs" / "report.md").read_text()
    documented = {}
    for names, fields in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", page.partition("## events.jsonl")[2], re.MULTILINE):
        # Several events in a line have their fields in as many parts.
        for name, part in zip(re.findall(r"`(\w+)`", names), fields.split("; "), strict=True):
            documented[name] = re.findall(r"`(\w+)`", part)
    written = {}
    for event in get_args(events.Event):
        if event not in (events.Progress, events.Loading, events.SweepUpdated):
            names = [[*vars_of(events.Scores)] if name == "scores" else [name] for name in vars_of(event)]
            written[event.__name__] = [name for group in names for name in group]
    assert {name: sorted(fields) for name, fields in documented.items()} == {n: sorted(f) for n, f in written.items()}


def vars_of(event: type) -> list[str]:
    return [field.name for field in dataclasses.fields(event)]


def test_fields_of_the_list_of_runs_are_documented(news: Path) -> None:
    page = (processes.REPOSITORY / "docs" / "report.md").read_text()
    rows = re.findall(r"^\| `runs\[\]\.(.*?) \|", page, re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"\w+", row)]
    [run] = json.loads(agnews("runs", str(news.parent), "--json").stdout)["runs"]
    assert sorted(documented) == sorted(run)
