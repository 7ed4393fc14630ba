"""Labelled text of many kinds: trained on one rank and on two, evaluated, predicted and exported, without a change of code."""

import csv
import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from support.events import read_events
from support.fork_server import run_python, run_ranks
from transformers import AutoConfig, pipeline

SHORT = ("--model.name", "embedded", "--engine.device", "cpu", "--data.max_length", "48")
# A rate at which four steps change what the model answers.
STEPS = ("--optim.max_steps", "4", "--batch.global_batch_size", "16", "--optim.lr", "1e-2")
SIZES = {"train": 4, "validation": 1, "test": 2}
"""Rows per class, if there are many classes."""
Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class DataSet:
    """A data set of a user: how it is named on the command line, and what is in it."""

    options: tuple[str, ...]
    class_names: tuple[str, ...]
    test: Rows
    """Texts and class indices of the test split, in file order."""


def make_rows(num_classes: int, per_class: int, seed: int, decoration: str = "") -> Rows:
    """Return shuffled rows whose words depend on the class."""
    draw = random.Random(seed)
    rows = [
        (f"topic{label} is {draw.randrange(10**9)}{decoration} and topic{label % 7}", label)
        for label in range(num_classes)
        for _ in range(per_class)
    ]
    draw.shuffle(rows)
    return rows


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], delimiter: str = ",") -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def make_strings(directory: Path) -> DataSet:
    """Write two classes as strings, with texts that a csv must quote; validation is held out."""
    names = ("ham, not spam", 'spam "offer"')
    splits = {split: make_rows(2, 15 * SIZES[split], seed, ', "quoted"\nnext line') for seed, split in enumerate(SIZES)}
    for split in ("train", "test"):
        write_csv(directory / f"{split}.csv", ("id", "label", "text"), [(9, names[k], text) for text, k in splits[split]])
    return DataSet(("--data.source", str(directory)), names, splits["test"])


def make_integers(directory: Path) -> DataSet:
    """Write twenty classes as integers, which count from 1."""
    splits = {split: make_rows(20, size, seed) for seed, (split, size) in enumerate(SIZES.items())}
    for split, rows in splits.items():
        write_csv(directory / f"{split}.csv", ("category", "content"), [(label + 1, text) for text, label in rows])
    return DataSet(("--data.source", str(directory)), tuple(f"LABEL_{k + 1}" for k in range(20)), splits["test"])


def make_class_label(directory: Path) -> DataSet:
    """Write parquet with a ClassLabel of 150 classes, more than the model is wide, whose names are not sorted."""
    names = tuple(f"class {(7 * k) % 150}" for k in range(150))
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    splits = {split: make_rows(150, size, seed) for seed, (split, size) in enumerate(SIZES.items())}
    for split, rows in splits.items():
        columns = {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(directory / f"{split}-00000-of-00001.parquet")
    return DataSet(("--data.source", str(directory)), names, splits["test"])


def make_intents(directory: Path) -> DataSet:
    """Write jsonl with other names of columns, and classes that only sorting brings in order."""
    names = ("Überweisung", "book/flight", "音楽", "🙂 small talk")
    assert list(names) != sorted(names)
    splits = {split: make_rows(4, 6 * size, seed, " - für José") for seed, (split, size) in enumerate(SIZES.items())}
    for split, word in (("train", "train"), ("validation", "dev"), ("test", "test")):
        lines = [json.dumps({"utterance": text, "intent": names[label], "slots": []}) for text, label in splits[split]]
        (directory / f"{word}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ordered = tuple(sorted(names))
    return DataSet(("--data.source", str(directory)), ordered, [(text, ordered.index(names[k])) for text, k in splits["test"]])


def make_subsets(directory: Path) -> DataSet:
    """Write a directory as the hub has it: README.md names two subsets, one of which is chosen."""
    splits = {split: make_rows(3, 8 * size, seed) for seed, (split, size) in enumerate(SIZES.items())}
    entries = ""
    for subset, names in (("coarse", ("a", "b", "c")), ("fine", ("neg", "neutral", "pos"))):
        (directory / subset).mkdir()
        entries += f"- config_name: {subset}\n  data_files:\n"
        for split, rows in splits.items():
            lines = [json.dumps({"text": f"{subset} {text}", "label": names[label]}) for text, label in rows]
            (directory / subset / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
            entries += f"  - split: {split}\n    path: {subset}/{split}.json\n"
    (directory / "README.md").write_text(f"---\nlanguage: en\nconfigs:\n{entries}---\n\n# A data set\n", encoding="utf-8")
    options = ("--data.source", str(directory), "--data.subset", "fine")
    return DataSet(options, ("neg", "neutral", "pos"), [(f"fine {text}", label) for text, label in splits["test"]])


MAKERS: dict[str, Callable[[Path], DataSet]] = {
    "two strings, csv": make_strings,
    "20 integers, csv": make_integers,
    "150 ClassLabel, parquet": make_class_label,
    "intents, jsonl": make_intents,
    "a subset, hub layout": make_subsets,
}


@dataclass(frozen=True)
class Trained:
    """A data set with its runs on one rank and on two."""

    data: DataSet
    one: Path
    two: Path
    output: str
    """Standard output of the run on two ranks."""


def train(directory: Path, name: str, num_ranks: int, *options: str) -> Any:
    place = ("--run.dir", str(directory / "runs"), "--run.name", name, "--data.cache_dir", str(directory / "cache"))
    return run_ranks(num_ranks, "-m", "agnews_dist.train", *SHORT, *STEPS, *place, "--verbose", *options)


def read_result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())["splits"]


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def read_predictions(run: Path) -> list[dict[str, Any]]:
    return read_lines((run / "predictions-test.jsonl").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=MAKERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("own")
    (directory / "rows").mkdir()
    data = MAKERS[request.param](directory / "rows")
    train(directory, "one", 1, *data.options)
    done = train(directory, "two", 2, *data.options)
    return Trained(data, directory / "runs" / "one", directory / "runs" / "two", done.stdout)


def test_two_ranks_score_and_answer_as_one(trained: Trained) -> None:
    one, two = read_result(trained.one), read_result(trained.two)
    for split in ("validation", "test"):
        losses = one[split].pop("loss"), two[split].pop("loss")
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert one == two
    left, right = read_predictions(trained.one), read_predictions(trained.two)
    assert [row["label"] for row in left] == [label for _, label in trained.data.test]
    assert [row["prediction"] for row in left] == [row["prediction"] for row in right]
    assert two["test"]["num_correct"] == sum(row["label"] == row["prediction"] for row in right)
    assert len({row["prediction"] for row in right}) > 1


def test_evaluate_gives_the_same_scores(trained: Trained, tmp_path: Path) -> None:
    model = ("--model.name", str(trained.two), "--split", "test", "--output", str(tmp_path / "scores"))
    # Another cache than the training's: the rows are read and tokenised again.
    options = (*trained.data.options, "--data.cache_dir", str(tmp_path / "cache"), "--engine.device", "cpu")
    run_python("-m", "agnews_dist", "evaluate", *model, *options)
    found, expected = read_result(tmp_path / "scores"), read_result(trained.two)
    assert found["test"].pop("loss") == pytest.approx(expected["test"].pop("loss"), abs=1e-6)
    assert found["test"] == expected["test"]


def test_pipeline_and_predict_give_the_probabilities_of_the_run(trained: Trained) -> None:
    names, texts = trained.data.class_names, [text for text, _ in trained.data.test]
    config = AutoConfig.from_pretrained(trained.two / "model")
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: k for k, name in enumerate(names)}
    expected_NC = np.array([row["probabilities"] for row in read_predictions(trained.two)])
    assert expected_NC.shape == (len(texts), len(names))

    answers = pipeline("text-classification", model=str(trained.two / "model"), device="cpu")(
        texts, top_k=None, truncation=True, batch_size=32
    )
    found_NC = np.array([[next(each["score"] for each in row if each["label"] == name) for name in names] for row in answers])
    np.testing.assert_allclose(found_NC, expected_NC, rtol=0, atol=1e-6)

    words = ("--model.name", str(trained.two), "--format", "jsonl", "--engine.device", "cpu")
    predicted = read_lines(run_python("-m", "agnews_dist", "predict", *words, *texts[:5]).stdout)
    assert [row["text"] for row in predicted] == texts[:5]
    assert [row["prediction"] for row in predicted] == [names[k] for k in expected_NC[:5].argmax(axis=1)]
    np.testing.assert_allclose(
        [[row["probabilities"][name] for name in names] for row in predicted], expected_NC[:5], atol=1e-6
    )


def test_header_and_card_are_true_for_the_data(trained: Trained) -> None:
    names = trained.data.class_names
    assert f"{len(names)}: {', '.join(names[:3])}"[:20] in trained.output
    card = (trained.two / "model" / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name in names[:3])
    assert not any(word in card.lower() for word in ("ag news", "ag_news", "ag-news", "world", "sci/tech", "striker"))
    assert "language:" not in card


CLASS_COUNTS = {"urgent": 4, "other": 60, "billing": 12}
"""Training rows of each class, in the order of the class-names file, which is not that of sorting."""
IMBALANCE = ("--optim.class_weights", "balanced", "--optim.label_smoothing", "0.1", "--optim.best_metric", "macro_f1")


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write compressed tsv whose test split has no labels, and a file of class names."""
    directory = tmp_path_factory.mktemp("imbalanced")
    (directory / "rows").mkdir()
    for seed, split in enumerate(("train", "valid", "test")):
        rows = [
            (f"{name} matter {k} of {split}\twith a tab", name)
            for name, count in CLASS_COUNTS.items()
            for k in range(count if split == "train" else 3)
        ]
        random.Random(seed).shuffle(rows)
        header = ("text",) if split == "test" else ("text", "target")
        write_csv(directory / "rows" / f"{split}.tsv.gz", header, [row[: len(header)] for row in rows], "\t")
    (directory / "names.txt").write_text("\n".join(CLASS_COUNTS) + "\n", encoding="utf-8")
    return directory


def test_imbalanced_classes_stop_early_and_predict_a_test_split_without_labels(imbalanced: Path) -> None:
    data = ("--data.source", str(imbalanced / "rows"), "--data.class_names", str(imbalanced / "names.txt"))
    early = ("--optim.max_steps", "200", "--optim.evaluate_every", "2", "--optim.patience", "3")
    outputs = [train(imbalanced, str(n), n, *data, *early, *IMBALANCE).stdout for n in (1, 2)]
    one, two = (imbalanced / "runs" / name for name in "12")
    weights_C = [sum(CLASS_COUNTS.values()) / 3 / count for count in CLASS_COUNTS.values()]
    for output in outputs:
        assert "classes    3: urgent, other, billing" in output
        assert f"label smoothing 0.1, balanced class weights {min(weights_C):.3g} to {max(weights_C):.3g}" in output
        assert output.count("test: 9 rows without labels: predicted, not scored") == 1
        assert output.count("stopped early after step") == 1
    assert AutoConfig.from_pretrained(two / "model").id2label == dict(enumerate(CLASS_COUNTS))
    left, right = read_predictions(one), read_predictions(two)
    assert [(row["label"], row["prediction"]) for row in left] == [(None, row["prediction"]) for row in right]

    results = [read_result(run) for run in (one, two)]
    assert list(results[1]) == ["validation"]
    assert results[0]["validation"]["confusion"] == results[1]["validation"]["confusion"]
    scores = [event["macro_f1"] for event in read_events(two / "events.jsonl", "EvalDone")]
    assert len(scores) < 100, "patience ends the run"
    assert len(scores) - 1 - scores.index(max(scores)) >= 3
    assert results[1]["validation"]["macro_f1"] == max(scores)

    # A file alone is predicted too.
    words = ("--model.name", str(two), "--output", str(imbalanced / "out"), "--data.cache_dir", str(imbalanced / "other"))
    run_python("-m", "agnews_dist", "evaluate", *words, "--data.source", str(imbalanced / "rows" / "test.tsv.gz"))
    (path,) = (imbalanced / "out").glob("predictions-*.jsonl")
    assert [row["prediction"] for row in read_lines(path.read_text())] == [row["prediction"] for row in right]


def test_a_split_that_is_left_out_is_neither_read_nor_scored(imbalanced: Path) -> None:
    (imbalanced / "rows" / "test.tsv.gz").write_bytes(b"not gzip")
    done = train(imbalanced, "none", 1, "--data.source", str(imbalanced / "rows"), "--data.splits.test", "none")
    run = imbalanced / "runs" / "none"
    assert list(read_result(run)) == ["validation"]
    assert not (run / "predictions-test.jsonl").exists()
    assert "76 train, 9 validation; 3 classes\n" in done.stdout
    assert AutoConfig.from_pretrained(run / "model").id2label == dict(enumerate(sorted(CLASS_COUNTS)))
