"""`agnews-dist probe`: against Hugging Face and scikit-learn, on one and two ranks, its page in a browser, bad input."""

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support import fork_server, small_run
from support.report_page import open_browser, show
from transformers import AutoTokenizer, GPT2Model

NUM_BLOCKS = 3


def probe(directory: Path, *more: str, num_ranks: int = 1, check: bool = True):
    settings = {"data.source": small_run.write_inputs() / "rows", "model.name": small_run.write_inputs() / "model"}
    settings |= {"data.max_length": small_run.MAX_LENGTH, "data.cache_dir": directory / "cache"}
    words = ["-m", "agnews_dist", "probe", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
    if num_ranks == 1:
        return fork_server.run_python(*words, *more, check=check)
    return fork_server.run_ranks(num_ranks, *words, *more, check=check)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a probe on one rank, and its output."""
    directory = tmp_path_factory.mktemp("probe")
    done = probe(directory, "--run.dir", str(directory / "runs"), "--run.name", "small")
    return directory / "runs" / "small-probe", done.stdout


def read_csv(directory: Path) -> list[dict[str, str]]:
    with (directory / "probe.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_split(split: str) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray]:
    """Return Hugging Face's features by layer and pooling, text by text without padding, and the labels."""
    inputs = small_run.write_inputs()
    tokenizer, model = AutoTokenizer.from_pretrained(inputs / "model"), GPT2Model.from_pretrained(inputs / "model").eval()
    rows = [json.loads(line) for line in (inputs / "rows" / f"{split}.jsonl").read_text().splitlines()]
    before_norm: list[torch.Tensor] = []
    model.ln_f.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for row in rows:
        tokens = tokenizer(row["text"], truncation=True, max_length=small_run.MAX_LENGTH, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(tokens, output_hidden_states=True).hidden_states
        layers = [*hidden[:-1], before_norm.pop(), hidden[-1]]
        for name, values_1TD in zip(["0", "1", "2", "3", "3 + norm"], layers, strict=True):
            found.setdefault((name, "last"), []).append(values_1TD[0, -1].numpy())
            found.setdefault((name, "mean"), []).append(values_1TD[0].mean(0).numpy())
    return {key: np.stack(values) for key, values in found.items()}, np.array([row["label"] for row in rows])


def test_scores_are_those_of_hugging_face_and_scikit_learn(probed: tuple[Path, str]) -> None:
    train, labels = read_split("train")
    scored, truth = read_split("validation")
    rows = read_csv(probed[0])
    assert [(row["layer"], row["pooling"]) for row in rows] == list(train)
    for row in rows:
        key = row["layer"], row["pooling"]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=float(row["strength"]), tol=1e-3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictions = model.fit(train[key], labels).predict(scored[key])
        # Rounding of the features may change a prediction on the border of two classes.
        assert abs((predictions == truth).sum() - float(row["accuracy"]) * len(truth)) < 2.5
        assert float(row["macro_f1"]) == pytest.approx(f1_score(truth, predictions, average="macro"), abs=0.02)
    assert len({row["accuracy"] for row in rows}) > 3


def test_two_ranks_give_the_same_table_and_never_read_test(probed: tuple[Path, str], tmp_path: Path) -> None:
    probe(tmp_path, "--output", str(tmp_path / "two"), "--data.splits.test", "none", num_ranks=2)
    assert (tmp_path / "two" / "probe.csv").read_bytes() == (probed[0] / "probe.csv").read_bytes()
    assert json.loads((tmp_path / "two" / "probe.json").read_text())["ranks"] == 2


def test_results_say_what_was_measured(probed: tuple[Path, str]) -> None:
    directory, output = probed
    found = json.loads((directory / "probe.json").read_text())
    assert found["rows"] == {"train": small_run.SIZES["train"], "validation": small_run.SIZES["validation"]}
    assert (found["fitted"], found["scored"]) == (small_run.SIZES["train"], small_run.SIZES["validation"])
    assert found["settings"]["data.max_length"] == small_run.MAX_LENGTH
    assert found["conclusion"] in output
    last = found["poolings"]["last"]
    assert last["blocks_above"] == NUM_BLOCKS - int(last["cut"].split()[0])
    suggested = f"--model.trainable_blocks {last['blocks_above'] or 1}"
    assert (suggested in found["conclusion"]) == (last["cut"] != "0")
    assert set(found["fingerprints"]) == {"tokenizer", "tokens", "frozen_weights", "rows"}
    assert "per rank for features and fits" in output


def test_full_fine_tuning_of_means_has_the_same_table_and_the_conclusion_of_the_mean(
    probed: tuple[Path, str], tmp_path: Path
) -> None:
    settings = {"model.trainable_blocks": "all", "model.train_embeddings": "true", "model.pooling": "mean"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    output = probe(tmp_path, *words, "--output", str(tmp_path / "mean")).stdout
    assert (tmp_path / "mean" / "probe.csv").read_bytes() == (probed[0] / "probe.csv").read_bytes()
    found = json.loads((tmp_path / "mean" / "probe.json").read_text())
    assert found["conclusion"].startswith("Features of the mean of all tokens")
    assert found["conclusion"] in output
    assert "The last token is best at layer" in output
    assert not {"model.trainable_blocks", "model.train_embeddings"} & found["settings"].keys()


def test_page_shows_the_figure_and_the_table(probed: tuple[Path, str]) -> None:
    directory, rows = probed[0], read_csv(probed[0])
    expected = [row for pooling in ("last", "mean") for row in rows if row["pooling"] == pooling]
    with open_browser() as browser:
        for width, scheme in ((1280, "light"), (360, "dark")):
            shown = show(browser, directory / "probe.html", width=width, scheme=scheme)
            assert shown.messages == []
            assert shown.requests == [(directory / "probe.html").as_uri()]
            assert shown.measure("document.documentElement.scrollWidth") == width
            assert shown.measure("[...document.querySelectorAll('section')].map(s => s.id)") == [
                "conclusion",
                "layers",
                "setup",
            ]
            assert (
                min(shown.measure("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")) > 7
            )
            table = shown.table("layers")
            assert [line[:3] for line in table] == [
                [row["layer"], row["pooling"], f"{float(row['accuracy']):.4f}"] for row in expected
            ]
            assert [line[6] == "best" for line in table] == [row["is_best"] == "True" for row in expected]
    text = (directory / "probe.md").read_text()
    assert "figures/layers.png" in text
    assert (directory / "figures" / "layers.png").stat().st_size > 5000


def test_another_probe_is_not_overwritten(probed: tuple[Path, str], tmp_path: Path) -> None:
    before = (probed[0] / "probe.json").stat().st_mtime_ns
    words = ("--output", str(probed[0]), "--data.limit_train", "40")
    refused = probe(tmp_path, *words, check=False)
    assert refused.returncode == 1
    assert f"--output {probed[0]}: holds a probe.json of other scores. Set --output" in refused.stderr
    assert (probed[0] / "probe.json").stat().st_mtime_ns == before
    copy = tmp_path / "copy"
    probe(tmp_path, "--output", str(copy), "--data.limit_train", "40")
    probe(tmp_path, "--output", str(copy), "--data.limit_train", "60", "--run.overwrite")
    assert json.loads((copy / "probe.json").read_text())["fitted"] == 60


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--data.limit_train", "8"), "8 training rows of 4 classes are too few to hold some out. Give it more rows of train."),
        (
            ("--report.max_seconds", "0"),
            "report.max_seconds 0: it is the time for the fits of a probe. Set it to some seconds.",
        ),
        (("--report.max_seconds", "1e-6"), "report.max_seconds 1e-06: 500 rows need more than"),
    ],
)
def test_probe_refuses_what_cannot_be_fitted(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    refused = probe(tmp_path, "--output", str(tmp_path / "out"), *words, check=False)
    assert refused.returncode == 1
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
