"""A test split without labels is predicted and not scored, by train on two ranks and by evaluate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.events import read_events
from support.fork_server import run_ranks

# The corpus of the real reader, whose labels of one split are removed: -1 means no label.
COMMAND = """
import sys
from dataclasses import replace

from agnews_dist.__main__ import main
from agnews_dist.data.rows import Corpus, hash_corpus
from agnews_dist.run import setup

load_corpus = setup.load_corpus

def load_without_test_labels(*arguments, **options):
    corpus = load_corpus(*arguments, **options)
    test = corpus.splits["test"]
    splits = {**corpus.splits, "test": replace(test, labels=test.labels * 0 - 1)}
    return Corpus(splits, corpus.class_names, hash_corpus(splits, corpus.class_names))

setup.load_corpus = load_without_test_labels
sys.exit(main(sys.argv[1:]))
"""


class Commands:
    """Runs commands whose test split has no labels."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.run = directory, directory / "runs" / "unlabelled"

    def __call__(self, name: str, num_ranks: int, *words: object, check: bool = True) -> Any:
        return run_ranks(
            num_ranks,
            *("-c", COMMAND, name, "--data.source", "synthetic", "--data.limit_test", "9", "--engine.device", "cpu"),
            *map(str, words),
            check=check,
            XDG_CACHE_HOME=str(self.directory / "cache"),
        )


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    made = Commands(tmp_path_factory.mktemp("unlabelled"))
    limits = ("--data.limit_train", 40, "--data.limit_validation", 8, "--optim.epochs", 1)
    place = ("--run.dir", made.run.parent, "--run.name", made.run.name)
    done = made("train", 2, "--model.name", "embedded", *limits, *place)
    assert done.stdout.count("test: 9 rows without labels: predicted, not scored") == 1
    return made


def read_predictions(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(range(9))
    assert [row["label"] for row in rows] == [None] * 9
    assert all(row["prediction"] == np.argmax(row["probabilities"]) for row in rows)
    return rows


def test_train_predicts_a_test_split_without_labels(commands: Commands) -> None:
    run = commands.run
    result = json.loads((run / "result.json").read_text())
    assert list(result["splits"]) == ["validation"]
    assert result["splits"]["validation"]["num_examples"] == 8
    read_predictions(run / "predictions-test.jsonl")
    assert [event["split"] for event in read_events(run / "events.jsonl", "EvalDone")] == ["validation"]
    (event,) = read_events(run / "events.jsonl", "Predicted")
    assert (event["split"], event["num_examples"]) == ("test", 9)
    (done,) = read_events(run / "events.jsonl", "RunDone")
    assert "validation" in done["facts"]
    assert "test" not in done["facts"]
    assert done["paths"]["test predictions"] == str(run / "predictions-test.jsonl")
    card = (run / "model" / "README.md").read_text()
    assert "| validation | 8 |" in card
    assert "Confusion on test" not in card
    assert "split: test" not in card


def test_evaluate_writes_predictions_and_no_scores(commands: Commands, tmp_path: Path) -> None:
    words = ("--model.name", commands.run, "--split", "test")
    done = commands("evaluate", 2, *words, "--output", tmp_path / "out")
    assert done.stdout.count("test: 9 rows without labels: predicted, not scored") == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["splits"] == {}
    found = read_predictions(tmp_path / "out" / "predictions-test.jsonl")
    trained = read_predictions(commands.run / "predictions-test.jsonl")
    assert [row["prediction"] for row in found] == [row["prediction"] for row in trained]


def test_evaluate_without_output_refuses_a_split_without_labels(commands: Commands) -> None:
    done = commands("evaluate", 2, "--model.name", commands.run, "--split", "test", check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "synthetic has no labels in test: there is nothing to score. Set --output" in line
