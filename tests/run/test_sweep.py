"""Sweeps as commands: members are what `train` makes of their settings, on any number of ranks and after a kill."""

import csv
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import small_run
from support.processes import REPOSITORY, TIMEOUT, environment, python, torchrun, wait_until
from support.report_page import open_browser, show
from transformers import pipeline

from agnews_dist import load
from agnews_dist.experiments.stored_sweeps import list_sweep_facts

VARIED = ("--optim.lr", "1e-3,3e-3,1e-2", "--run.seed", "0..1")
EPOCHS = ("--optim.epochs", "3", "--batch.global_batch_size", "32")


def arguments(directory: Path, *more: str) -> list[str]:
    """Return the settings of a small training of 3 epochs, or of a sweep of them."""
    settings = small_run.settings() | {"data.limit_validation": 100, "data.limit_test": 100}
    places = ("--run.dir", str(directory / "runs"), "--data.cache_dir", str(directory / "cache"), "--report.write", "false")
    return [*(word for key, value in settings.items() for word in (f"--{key}", str(value))), *EPOCHS, *places, *more]


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Read sweep.json and sweep.csv, without times."""
    rows = list(csv.DictReader((path / "sweep.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"]
    return json.loads((path / "sweep.json").read_text()), rows


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep on one rank; its directory is runs/lr below."""
    directory = tmp_path_factory.mktemp("sweep")
    done = python("-m", "agnews_dist", "sweep", *arguments(directory, *VARIED, "--run.name", "lr", "--report.write", "true"))
    assert "6 of 6 members; best so far" in done.stdout
    assert re.search(rf"report +{directory}/runs/lr/sweep.html", done.stdout)
    return directory


def test_member_equals_a_training_with_its_settings(swept: Path) -> None:
    report, rows = read(swept / "runs" / "lr")
    best = report["selected"]["best_member"]
    row = rows[best]
    more = ("--optim.lr", row["optim.lr"], "--run.seed", row["run.seed"], "--run.name", "alone")
    python("-m", "agnews_dist", "train", *arguments(swept, *more))
    alone, exported = swept / "runs" / "alone", swept / "runs" / "lr" / "best"
    assert (alone / "model/model.safetensors").read_bytes() == (exported / "model/model.safetensors").read_bytes()
    for name in ("predictions-validation.jsonl", "predictions-test.jsonl"):
        assert (alone / name).read_bytes() == (exported / name).read_bytes()
    of_run, of_member = (json.loads((path / "result.json").read_text()) for path in (alone, exported))
    splits = of_run["splits"]
    assert splits == of_member["splits"]
    assert of_run["fingerprints"] == of_member["fingerprints"]
    seconds, own = of_member["seconds"], report["members"][best]["seconds"]
    assert (seconds["train"], seconds["total"]) == (own, pytest.approx(own + seconds["eval"]))
    assert 0 < seconds["eval"] < report["members"][best]["seconds"]
    assert [float(row[key]) for key in ("accuracy", "macro_f1", "loss")] == [
        splits["validation"][key] for key in ("accuracy", "macro_f1", "loss")
    ]
    assert pipeline("text-classification", model=str(exported / "model"))("oil prices rose", truncation=True)


RECIPES = {
    "a solved head": ("--optim.weight_decay 0.01,0.1 --optim.solver lbfgs --model.standardize true --model.trainable_blocks 0"),
    "two blocks": (
        "--optim.average none,ema --optim.r_drop 0.5 --model.dropout 0.2 --model.trainable_blocks 2 --optim.layer_decay 0.7"
    ),
    "frozen blocks": (
        "--optim.lr 1e-3,3e-3 --model.trainable_blocks 3 --model.freeze_schedule 3,1 --optim.epochs 3 --model.dropout 0.1"
    ),
    "drawn weights": "--run.seed 0..1 --model.init random --model.pooling mean",
    "all weights": "--optim.lr 1e-3,3e-3 --model.trainable_blocks all --model.train_embeddings true",
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_member_with_a_recipe_equals_a_training(swept: Path, tmp_path: Path, recipe: str) -> None:
    words = arguments(swept, "--optim.epochs", "2", "--data.limit_train", "200", "--run.dir", str(tmp_path))
    done = python("-m", "agnews_dist", "sweep", *words, *recipe.split(), "--run.name", "swept")
    # The command line for copying makes the same model.
    [command] = re.findall(r" command +agnews-dist train (.*)", done.stdout)
    python("-m", "agnews_dist", "train", *shlex.split(command), "--run.dir", str(tmp_path), "--run.name", "alone")
    for name in ("model/model.safetensors", "predictions-validation.jsonl", "predictions-test.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "swept/best" / name).read_bytes()


def test_selection_computes_what_it_scores_alone(swept: Path, tmp_path: Path) -> None:
    """The last member is another group's, whose features are in memory when the first one is selected."""
    more = ("--engine.feature_cache", "host", "--optim.max_steps", "3")
    words = arguments(tmp_path, *more, "--model.trainable_blocks", "1,2", "--run.name", "host")
    python("-m", "agnews_dist", "sweep", *words)
    best = tmp_path / "runs/host/best"
    before = (best / "predictions-test.jsonl").read_bytes()
    (tmp_path / "runs/host/sweep.json").unlink()
    done = python("-m", "agnews_dist", "sweep", *words)
    assert done.stdout.count("features  ") == done.stdout.count("off: computed at their use") == 1
    assert (best / "predictions-test.jsonl").read_bytes() == before
    selected = json.loads((tmp_path / "runs/host/sweep.json").read_text())["selected"]["values"]["model.trainable_blocks"]
    alone = arguments(tmp_path, *more, "--model.trainable_blocks", str(selected), "--run.name", "alone")
    python("-m", "agnews_dist", "train", *alone)
    assert before == (tmp_path / "runs/alone/predictions-test.jsonl").read_bytes()


def test_selection_is_made_on_validation_and_test_is_scored_for_it_alone(swept: Path) -> None:
    report, rows = read(swept / "runs" / "lr")
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["optim.lr"], []).append(float(row["accuracy"]))
    best = max(means, key=lambda lr: sum(means[lr]))
    assert report["selected"]["values"] == {"optim.lr": float(best)}
    assert report["settings"][0]["values"] == {"optim.lr": float(best)}
    assert report["selected"]["seeds"] == [0, 1]
    test = report["selected"]["test"]["accuracy"]
    assert len(test["values"]) == 2
    assert test["mean"] == pytest.approx(sum(test["values"]) / 2)
    assert "test" not in json.dumps(report["members"])
    kept = {int(path.stem) for path in (swept / "runs/lr/members").glob("*.safetensors")}
    assert {index for index, row in enumerate(rows) if row["optim.lr"] == best} <= kept


def test_page_shows_the_settings_and_their_figures(swept: Path) -> None:
    path = swept / "runs" / "lr" / "sweep.html"
    report, _ = read(path.parent)
    with open_browser() as browser:
        for width, scheme in ((1280, "light"), (360, "dark")):
            shown = show(browser, path, width=width, scheme=scheme)
            assert shown.messages == []
            assert shown.requests == [path.as_uri()]
            assert shown.measure("document.documentElement.scrollWidth") == width
            texts = "[...document.querySelectorAll('svg text')]"
            assert min(shown.measure(f"{texts}.map(t => t.getBoundingClientRect().height)")) > 7
            assert shown.measure("[...document.querySelectorAll('section')].map(s => s.id)") == [
                *("selected", "settings", "effects", "seeds")
            ]
            means = [f"{each['validation']['accuracy']['mean']:.4f}" for each in report["settings"]]
            assert [row[2] for row in shown.table("settings")] == means
            assert shown.page.locator("#selected pre").inner_text() == report["command"]
    assert "figures/seeds.png" in path.with_suffix(".md").read_text()


def test_sweep_is_one_line_of_the_runs_and_its_best_member_has_a_report(swept: Path) -> None:
    lines = python("-m", "agnews_dist", "runs", str(swept / "runs"), "--sort", "size").stdout.splitlines()
    report, _ = read(swept / "runs" / "lr")
    [line] = [line for line in lines if line.startswith("lr ")]
    score = report["selected"]["test"]["accuracy"]["mean"]
    assert re.match(rf"lr  finished  \d+  \S+  {score:.4f}  .*optim.lr {{0.001, 0.003, 0.01}}  run.seed {{0, 1}}", line)
    best = swept / "runs" / "lr" / "best"
    python("-m", "agnews_dist", "report", str(best))
    page = (best / "report.html").read_text()
    assert f"step {report['members'][report['selected']['best_member']]['num_steps']}" in page
    assert "events.jsonl cannot be read" not in page
    done = python("-m", "agnews_dist", "report", str(best.parent), check=False)
    assert done.stderr.endswith(f"it is a sweep, whose report is its sweep.html. Give one of its runs, {best}.\n")


def test_two_ranks_give_the_same_table(swept: Path) -> None:
    torchrun(2, "-m", "agnews_dist", "sweep", *arguments(swept, *VARIED, "--run.name", "ranks"))
    assert read(swept / "runs/ranks")[1] == read(swept / "runs/lr")[1]
    left, right = (read(swept / "runs" / name)[0]["selected"] for name in ("lr", "ranks"))
    assert left == right


def test_optuna_computes_the_features_of_each_cut_once(swept: Path) -> None:
    space = ("--model.trainable_blocks", "0,1", "--model.standardize", "true,false", "--optim.lr", "1e-4..1e-2")
    more = (*space, "--samples", "8", "--search", "optuna", "--checkpoint.resume", "never")
    done = python("-m", "agnews_dist", "sweep", *arguments(swept, *more, "--run.name", "cuts", "--optim.epochs", "1"))
    cuts = [row["model.trainable_blocks"] for row in read(swept / "runs/cuts")[1]]
    assert sum(left != right for left, right in itertools.pairwise(cuts)) > 1, "the proposals alternate"
    assert done.stdout.count("per rank: ") == 2
    # Blocks whose inputs of out_head change cannot be standardised: Optuna proposes others.
    assert re.search(r"warning: optuna: \d+ proposals? left out for contradicting settings", done.stdout + done.stderr)
    assert "warning: checkpoint.resume: without effect in a sweep." in done.stdout + done.stderr
    assert done.stdout.count("frozen part: ") == 2, "they are kept although a first round has one member"


def test_halving_drops_settings_and_leaves_the_survivors_as_they_are(swept: Path) -> None:
    torchrun(2, "-m", "agnews_dist", "sweep", *arguments(swept, *VARIED, "--halving", "3", "--run.name", "halved"))
    full, halved = (read(swept / "runs" / name)[1] for name in ("lr", "halved"))
    survivors = [row for row in halved if row["state"] == "finished"]
    assert len(survivors) == 2
    assert all(row == full[int(row["member"])] for row in survivors)
    dropped = [row for row in halved if row["state"] == "halved"]
    assert len(dropped) == 4
    assert {int(row["num_steps"]) for row in dropped} == {int(full[0]["num_steps"]) // 3}


def test_halving_with_a_diverged_setting_continues_after_a_kill_at_a_rung(swept: Path) -> None:
    more = ("--optim.lr", "1e-3,3e-3,1e30", "--optim.max_grad_norm", "0", "--halving", "2", "--run.name", "rungs")
    python("-m", "agnews_dist", "sweep", *arguments(swept, *more))
    path = swept / "runs/rungs"
    before = read(path)[1]
    assert sorted(row["state"] for row in before) == ["diverged", "finished", "halved"]
    # As if it had been killed while the survivor was on its way from the first rung.
    [survivor] = [row["member"] for row in before if row["state"] == "finished"]
    for file in [*path.glob("sweep.*"), *path.glob(f"members/*{survivor}.json"), *path.glob("members/*.rung1")]:
        file.unlink()
    python("-m", "agnews_dist", "sweep", *arguments(swept, *more))
    assert read(path)[1] == before


def test_killed_sweep_continues_without_its_finished_members(swept: Path, tmp_path: Path) -> None:
    words = arguments(tmp_path, *VARIED, "--run.name", "killed", "--batch.bucket_window", "8")
    command = [sys.executable, "-m", "agnews_dist", "sweep", *words]
    members = tmp_path / "runs/killed/members"
    # The first start is killed before a member has ended.
    for awaited in ("status.json", "members/*.json"):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stdout=log, stderr=log)
            assert wait_until(lambda: list(members.parent.glob(awaited)), TIMEOUT)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert "an earlier start was stopped before a member had ended: now 2 members at a time" in (tmp_path / "log").read_text()
    ended = {path: path.stat().st_mtime_ns for path in members.glob("*.json")}
    assert 0 < len(ended) < 6
    assert list_sweep_facts(members.parent).state == "killed"
    python(*command[1:])
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    python("-m", "agnews_dist", "sweep", *arguments(tmp_path, *words[len(arguments(tmp_path)) :], "--run.name", "whole"))
    assert read(tmp_path / "runs/killed")[1] == read(tmp_path / "runs/whole")[1]


def test_sweep_does_not_continue_over_other_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    shutil.copytree(small_run.write_inputs() / "rows", rows)
    more = ("--data.source", str(rows), "--optim.lr", "1e-3,3e-3", "--optim.epochs", "1", "--run.name", "rows")
    python("-m", "agnews_dist", "sweep", *arguments(tmp_path, *more))
    path = tmp_path / "runs/rows"
    for file in (path / "sweep.json", path / "members/00001.json"):
        file.unlink()
    train = (rows / "train.jsonl").read_text().splitlines()
    (rows / "train.jsonl").write_text("\n".join(train[:-40]) + "\n")
    done = python("-m", "agnews_dist", "sweep", *arguments(tmp_path, *more), check=False)
    assert done.returncode == 1
    assert "tokens changed since its first members. Restore them, or set another --run.name." in done.stderr
    assert not (path / "members/00001.json").exists()


def test_member_that_diverges_ends_alone(swept: Path) -> None:
    more = ("--optim.lr", "1e-3,1e30", "--optim.max_grad_norm", "0", "--run.name", "diverged")
    done = python("-m", "agnews_dist", "sweep", *arguments(swept, *more))
    rows = read(swept / "runs/diverged")[1]
    assert [row["state"] for row in rows] == ["finished", "diverged"]
    assert rows[1]["reason"]
    assert "selected" in done.stdout


def test_finished_sweep_and_other_settings_are_refused(swept: Path) -> None:
    again = python("-m", "agnews_dist", "sweep", *arguments(swept, *VARIED, "--run.name", "lr"))
    assert "is finished: nothing is left to do" in again.stdout
    more = ("--optim.lr", "1e-3,3e-3", "--optim.weight_decay", "0.1", "--halving", "2", "--run.name", "lr")
    done = python("-m", "agnews_dist", "sweep", *arguments(swept, *VARIED, *more), check=False)
    assert done.returncode == 2
    assert "another sweep (in halving, optim.weight_decay, varied settings)" in done.stderr
    done = python("-m", "agnews_dist", "sweep", *arguments(swept, "--model.trainable_blocks", "1,99"), check=False)
    assert "model.trainable_blocks 99: the model has" in done.stderr
    assert "train member" not in done.stdout, "known before the first group trains"
    before = read(swept / "runs/lr")
    typo = ("--data.source", str(swept / "typo"), "--run.overwrite", "true", "--run.name", "lr")
    for command in ("sweep", "train"):
        varied = VARIED if command == "sweep" else ()
        done = python("-m", "agnews_dist", command, *arguments(swept, *varied, *typo), check=False)
        assert ("typo" if command == "sweep" else "runs/lr: it is a sweep, and not a run") in done.stderr
        assert read(swept / "runs/lr") == before


def test_finished_sweep_is_distilled_without_training_its_members_again(swept: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "lr"
    shutil.copytree(swept / "runs" / "lr", path)
    best_before = (path / "best/predictions-test.jsonl").read_bytes()
    before = {member: member.read_bytes() for member in (path / "members").glob("*.json")}
    # Weights that were not kept are made again.
    for member in (path / "members").glob("*.safetensors"):
        member.unlink()
    done = python("-m", "agnews_dist", "sweep", *arguments(tmp_path, *VARIED, "--run.name", "lr", "--distil"))
    # What the settings alone do not say, and the report's command would not repeat.
    note = "In place of the labels it learnt the mean probabilities of trainings with these settings and the seeds 0, 1."
    python("-m", "agnews_dist", "report", str(path / "distilled"))
    for file in ("config.yaml", "result.json", "model/README.md", "report.md"):
        assert note in (path / "distilled" / file).read_text()
    assert "agnews_dist.train" not in (path / "distilled/report.md").read_text()
    assert (path / "best/predictions-test.jsonl").read_bytes() == best_before
    assert {member: member.read_bytes() for member in (path / "members").glob("*.json")} == before
    rows = {row["name"]: row for row in read(path)[0]["ensemble"]}
    assert list(rows) == ["best single", "mean single", "ensemble", "distilled"]
    assert "distilled" in done.stdout
    # The probabilities of the exported model, its temperature included, are those that were scored.
    predicted = [json.loads(line) for line in (path / "distilled/predictions-test.jsonl").read_text().splitlines()]
    accuracy = sum(row["prediction"] == row["label"] for row in predicted) / len(predicted)
    assert rows["distilled"]["test"]["accuracy"] == pytest.approx(accuracy)
    texts = [json.loads(line)["text"] for line in (small_run.write_inputs() / "rows/test.jsonl").read_text().splitlines()]
    with pytest.warns(UserWarning, match="truncated to 64 tokens"):
        exported_NC = np.stack([each.probabilities for each in load(path / "distilled" / "model").predict(texts)])
    scored_MC = np.array([row["probabilities"] for row in predicted])
    assert len(scored_MC) == 100
    # The test split is a sample of the rows, in another order.
    nearest_M = np.abs(scored_MC[:, None] - exported_NC[None]).max(axis=2).min(axis=1)
    assert nearest_M.max() < 1e-5
