"""A training of two ranks, and every use of its run directory."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from support import fork_server
from support.events import read_events
from support.processes import python
from support.status_server import StatusServer, serve_status
from support.tools import find_missing, requires_tool
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from agnews_dist.data.corpus import Source, load_corpus

CLASS_NAMES = ("World", "Sports", "Business", "Sci/Tech")
LIMITS = ("--data.limit_train", "480", "--data.limit_validation", "101", "--data.limit_test", "103")
DATA = ("--data.source", "synthetic", *LIMITS)
# 60 steps of this rate are enough for 0.7 on the test rows.
BATCHES = ("--batch.global_batch_size", "24", "--optim.lr", "3e-3")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def status_server(tmp_path_factory) -> Iterator[StatusServer | None]:
    """A status server of Kubeflow Trainer; None without openssl."""
    if find_missing("openssl"):
        yield None
        return
    with serve_status(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory, status_server) -> tuple[Path, subprocess.CompletedProcess]:
    directory = tmp_path_factory.mktemp("runs")
    command = ["-m", "agnews_dist.train", "--model.name", "embedded", *DATA, "--optim.epochs", "3", "--profile"]
    place = ["--run.dir", str(directory), "--run.name", "two", "--data.cache_dir", str(directory / "cache")]
    server = status_server.environ if status_server else {}
    done = fork_server.run_ranks(2, *command, *place, "--batch.max_tokens_per_rank", "512", *BATCHES, **server)
    return directory / "two", done


def test_run_directory_has_the_documented_files(trained):
    directory, _ = trained
    names = {path.name for path in directory.iterdir()}
    files = {"config.yaml", "events.jsonl", "result.json", "predictions-validation.jsonl", "predictions-test.jsonl"}
    assert names == files | {"model", "profile", "checkpoints", "status.json"}
    trace = json.loads((directory / "profile" / "trace.json").read_text())
    assert len(trace["traceEvents"]) > 100
    fork_server.run_python("-m", "agnews_dist.train", "--config", str(directory / "config.yaml"), "--print_config")


def test_result_json_agrees_with_the_predictions(trained):
    directory, _ = trained
    result = json.loads((directory / "result.json").read_text())
    assert result["num_steps"] == 3 * 20
    assert (result["num_ranks"], result["global_batch_size"]) == (2, 24)
    assert set(result["seconds"]) == {"total", "setup", "tokenize", "prefix", "train", "eval"}
    assert result["seconds"]["total"] > result["seconds"]["train"] > result["seconds"]["prefix"] > 0
    assert 0.5 < result["critical_path_efficiency"] <= result["padding_efficiency"] <= 1
    assert result["critical_path_efficiency"] == pytest.approx(result["padding_efficiency"] * result["rank_balance"])
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 10**8
    assert {"torch", "transformers", "python"} <= set(result["versions"])
    assert set(result["splits"]) == {"validation", "test"}
    for name, num_examples in (("validation", 101), ("test", 103)):
        split, rows = result["splits"][name], lines(directory / f"predictions-{name}.jsonl")
        assert [row["id"] for row in rows] == list(range(num_examples))
        labels, predictions = ([row[key] for row in rows] for key in ("label", "prediction"))
        confusion = np.zeros((4, 4), int)
        np.add.at(confusion, (labels, predictions), 1)
        assert split["confusion"] == confusion.tolist()
        assert split["num_examples"] == num_examples
        assert split["num_correct"] == int(np.trace(confusion))
        assert split["accuracy"] == split["num_correct"] / num_examples
        probabilities = np.array([row["probabilities"] for row in rows])
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert split["loss"] == pytest.approx(-np.log(probabilities[range(num_examples), labels]).mean(), rel=1e-4)
    assert result["splits"]["test"]["accuracy"] > 0.5, "three epochs should be well above chance (0.25)"


def test_events_cover_the_whole_run(trained):
    directory, _ = trained
    events = read_events(directory / "events.jsonl")
    steps = [event for event in events if event["event"] == "StepDone"]
    assert [event["step"] for event in steps] == list(range(1, 61))
    assert sum(event["num_examples"] for event in steps[:20]) == 480
    assert steps[0]["lr"] == 3e-3
    assert steps[-1]["lr"] == pytest.approx(3e-3 / 60)
    scored = [(event["split"], event["epoch"]) for event in events if event["event"] == "EvalDone"]
    assert scored[:3] == [("validation", 1), ("validation", 2), ("validation", 3)]
    assert [split for split, _ in scored].count("test") == 1
    # The result and the test score come from the best epoch.
    best = max(
        (event for event in events if event["event"] == "EvalDone" and event["split"] == "validation"),
        key=lambda event: (event["num_correct"], -event["loss"]),
    )
    result = json.loads((directory / "result.json").read_text())
    assert result["splits"]["validation"]["num_correct"] == best["num_correct"]
    assert scored[3] == ("test", best["epoch"])


def test_only_rank_0_prints_and_without_escape_sequences(trained):
    _, done = trained
    assert "\x1b[" not in done.stdout
    assert done.stdout.count("run started") == 1
    assert "Self CPU" in done.stdout, "the profiler's table is printed"
    # The C++ part of the profiler writes two lines.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("USDT:")]
    assert lines == []


@requires_tool("openssl")
def test_rank_0_posts_progress(trained, status_server):
    statuses = [status for _, status in status_server.posts]
    assert [status.progress_percentage for status in statuses].count(100) == 1
    last = statuses[-1]
    assert (last.progress_percentage, last.estimated_remaining_seconds) == (100, 0)
    metrics = {metric.name: metric.value for metric in last.metrics}
    assert metrics["current_step"] == metrics["total_steps"] == "60"
    result = json.loads((trained[0] / "result.json").read_text())
    assert float(metrics["test_accuracy"]) == pytest.approx(result["splits"]["test"]["accuracy"], rel=1e-5)
    assert status_server.num_refused == 0


def test_hugging_face_loads_the_model_and_predicts_the_same(trained):
    directory, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    assert {parameter.dtype.itemsize for parameter in model.parameters()} == {4}
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    texts = (
        load_corpus(
            Source("synthetic"), validation_fraction=0.05, limits={"train": 480, "validation": 101, "test": 103}, seed=0
        )
        .splits["test"]
        .texts
    )
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    found = classify(list(texts), truncation=True, batch_size=16)
    rows = lines(directory / "predictions-test.jsonl")
    assert len(found) == len(rows) == 103
    for scores, row in zip(found, rows, strict=True):
        assert {entry["label"] for entry in scores} == set(CLASS_NAMES)
        ours = dict(zip(CLASS_NAMES, row["probabilities"], strict=True))
        assert {entry["label"]: entry["score"] for entry in scores} == pytest.approx(ours, abs=1e-4)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> dict[int, Path]:
    directory, _ = trained
    found = {}
    for num_ranks in (1, 2, 3):
        output = tmp_path_factory.mktemp(f"evaluated{num_ranks}")
        arguments = ["--model.name", str(directory), *DATA, "--split", "test", "--output", str(output)]
        fork_server.run_ranks(num_ranks, "-m", "agnews_dist", "evaluate", *arguments, XDG_CACHE_HOME=str(directory.parent))
        found[num_ranks] = output
    return found


def test_evaluation_is_the_same_on_1_2_and_3_ranks(trained, evaluated):
    directory, _ = trained
    assert sorted(evaluated) == [1, 2, 3]
    results = {ranks: json.loads((path / "result.json").read_text()) for ranks, path in evaluated.items()}
    assert [results[ranks]["num_ranks"] for ranks in (1, 2, 3)] == [1, 2, 3]
    assert results[1]["splits"] == results[2]["splits"] == results[3]["splits"]
    texts = {(path / "predictions-test.jsonl").read_bytes() for path in evaluated.values()}
    assert len(texts) == 1, "probabilities are equal to the last bit"
    trained_result = json.loads((directory / "result.json").read_text())
    assert results[1]["splits"]["test"]["confusion"] == trained_result["splits"]["test"]["confusion"]


def test_predict_reads_arguments_and_standard_input(trained):
    directory, _ = trained
    texts = ["The striker scored twice in the final.", "Shares fell after the bank cut its forecast."]
    command = ["-m", "agnews_dist", "predict", "--model.name", str(directory), "--format", "jsonl"]
    by_argument = fork_server.run_python(*command, *texts).stdout
    by_stdin = fork_server.run_python(*command, stdin="\n".join(texts) + "\n").stdout
    rows = [json.loads(line) for line in by_argument.splitlines()]
    assert [json.loads(line)["probabilities"] for line in by_stdin.splitlines()] == [row["probabilities"] for row in rows]
    assert len(rows) == 2
    assert {row["prediction"] for row in rows} <= set(CLASS_NAMES)


def test_exported_frozen_weights_equal_the_source(trained):
    from agnews_dist.model.gpt2 import load_backbone
    from agnews_dist.model.pretrained import load_tokenizer

    directory, _ = trained
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    source = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer).model.state_dict()
    exported = load_file(directory / "model" / "model.safetensors")
    frozen = [name for name in source if name.startswith(("wte", "wpe", "h.0.", "h.1.", "h.2."))]
    assert len(frozen) > 30
    for name in frozen:
        assert exported[f"transformer.{name}"].equal(source[name]), name
    assert not exported["transformer.h.3.attn.c_attn.weight"].equal(source["h.3.attn.c_attn.weight"])


def test_a_failing_export_loses_no_scores_and_can_be_repeated(tmp_path: Path) -> None:
    program = """if True:
        import sys
        from agnews_dist.errors import ModelError
        from agnews_dist.model import export

        def fail(*_, **__):
            raise ModelError("the disk is full.")

        export.export_model = fail
        from agnews_dist.__main__ import main
        sys.exit(main(["train", *sys.argv[1:], "--report.write", "false"]))
    """
    limits = [word for split in ("train", "validation", "test") for word in (f"--data.limit_{split}", "16")]
    arguments = ["--data.source", "synthetic", "--model.name", "embedded", "--optim.epochs", "1", *limits]
    arguments += ["--run.dir", str(tmp_path / "runs"), "--run.name", "news", "--data.cache_dir", str(tmp_path / "cache")]
    failed = python("-c", program, *arguments, check=False)
    run = tmp_path / "runs" / "news"
    assert failed.returncode == 1
    assert f"the scores are in {run}. the disk is full. The same command with --run.name news exports again." in failed.stderr
    assert not (run / "model").exists()
    assert json.loads((run / "result.json").read_text())["splits"]["test"]["num_examples"] == 16
    assert len((run / "predictions-test.jsonl").read_text().splitlines()) == 16
    python("-m", "agnews_dist.train", *arguments)
    assert (run / "model" / "model.safetensors").is_file()
